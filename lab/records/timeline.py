"""The timelines of `inside` records: what a block of the persistent step did, phase by phase."""

from typing import NamedTuple

NO_LAYER = 3  # phases of a step that are of no layer: start, lm_head and end


class Segment(NamedTuple):
    """A phase of a block, in microseconds. When it is drawn its waits come first, though waits for tiles lie
    between the work."""

    begin: float
    end: float
    others: float  # waiting for other blocks
    tiles: float  # waiting for weights or KV


def segments(stamps) -> list[Segment]:
    """A block's phases in their order."""
    found, begin = [], 0.0
    for i in range(0, len(stamps), 3):
        end, others, tiles = (value / 1e3 for value in stamps[i : i + 3])
        found.append(Segment(begin, end, others, tiles))
        begin = end
    return found


def middle_layer(timelines, phases):
    """(number of the middle layer, number of layers, {block: its segments of that layer}). timelines: {block:
    segments}; phases: of a layer."""
    layers = (len(next(iter(timelines.values()))) - NO_LAYER) // phases
    first = 1 + layers // 2 * phases
    return layers // 2, layers, {block: all[first : first + phases] for block, all in timelines.items()}
