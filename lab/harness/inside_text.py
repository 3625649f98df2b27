"""The inside of the persistent step on the terminal: where the time of each phase goes, and a layer's
timeline."""

from lab.errors import one_line
from lab.ops.step_layout import PHASES
from lab.records.timeline import middle_layer, segments
from lab.text import columns

WIDE, TALL = 84, 8  # characters and lines of a timeline
OTHERS, TILES, WORK = ".", "-", "#"


def inside_text(rows):
    """The accounts of a run's `inside` records as text."""
    lines = []
    for key in dict.fromkeys((r.model, r.backend, r.dtype, r.context) for r in rows):
        mine = [r for r in rows if (r.model, r.backend, r.dtype, r.context) == key]
        lines += account(sorted(mine, key=lambda r: r.order))
    return "\n".join(lines)


def account(rows):
    one, total = rows[0], rows[-1]
    stored = f" {one.weight_format}" if one.weight_format else ""
    lines = [
        f"\n{one.model} {one.backend} {one.plan} {one.dtype}{stored} batch {one.batch} context {one.context}"
        + (", emulated" if one.emulated else "")
    ]
    if one.error:
        return [*lines, "  " + one_line(f"failed: {one.error}")]
    total = next(r for r in rows if r.row == "total")
    if total.normal_us:
        lines.append(
            f"  recording takes {total.us / total.normal_us - 1:+.1%}: without it {total.normal_us:.1f} us"
        )
    head = "phase", "calls", "us", "others", "tiles", "work", "ahead", "MB", "GB/s", "ceiling", "launch", ""
    cells = [head]
    for r in rows:
        if r.row == "block":
            continue
        numbers = (r.us, r.others_us, r.tiles_us, r.work_us, r.ahead)
        cells.append(
            (
                r.phase or r.row,
                r.calls or "",
                *("" if value is None else f"{value:.1f}" for value in numbers),
                "" if r.bytes is None else f"{r.bytes / 1e6:.1f}",
                "" if r.gbps is None else f"{r.gbps:.0f}",
                "" if r.of_ceiling is None else f"{r.of_ceiling:.1%}",
                f"{r.of_token:.1%}",
                r.flag or "",
            )
        )
    lines += columns(cells, right=range(1, 11), indent="  ")
    lines += [
        "  means of all blocks, us: waiting for others, for tiles of weights or KV; work is all else.",
        "  ahead: tiles that were loaded or under way when a block could begin"
        if one.backend == "cuda"
        else "  this kernel cannot tell waits for tiles from work",
    ]
    return lines + timeline([r for r in rows if r.row == "block"])


def timeline(rows):
    """The middle layer of a few blocks, a character for each short time."""
    few = rows[:: -(-len(rows) // TALL)]
    layer, layers, spans = middle_layer({r.block: segments(r.stamps) for r in few}, len(PHASES))
    begin, end = min(mine[0].begin for mine in spans.values()), max(mine[-1].end for mine in spans.values())
    width = max(end - begin, 1e-9) / WIDE
    lines = [
        f"  layer {layer} of {layers}, {end - begin:.1f} us, block by block: {OTHERS} waiting for others, "
        f"{TILES} for tiles, {WORK} work"
    ]
    for block, mine in spans.items():
        line = "".join(sign_at(mine, begin + (i + 0.5) * width) for i in range(WIDE))
        lines.append(f"  {block:4} {line}")
    latest = max(spans.values(), key=lambda mine: mine[-1].end)
    return [*lines, "       " + names([(one.end - begin) / width for one in latest])]


def sign_at(spans, time):
    """What a block does at a time: " " before the layer and after it."""
    for one in spans:
        if one.begin <= time < one.end:
            waited = time - one.begin
            return OTHERS if waited < one.others else TILES if waited < one.others + one.tiles else WORK
    return " "


def names(places):
    """The phases' names, each left of the place where it ends; only a mark where there is no room."""
    line = ""
    for name, place in zip(PHASES, places, strict=True):
        room = int(place) - len(line)
        line += f"{name}|".rjust(room) if room > len(name) else "|".rjust(room)
    return line
