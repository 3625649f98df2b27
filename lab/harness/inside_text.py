"""The inside of the persistent step on the terminal: where the time of each phase goes, and a layer's
timeline."""

from lab.errors import one_line
from lab.ops.step_layout import PHASES
from lab.text import columns

WIDE, TALL = 84, 8  # characters and lines of a timeline
# In a phase what a block waited for is drawn before what it did, though waits for tiles lie between the work.
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
    lines.append(
        "  means of all blocks: us waiting for others, for tiles of weights or KV, and the rest, work; ahead: "
        "tiles loaded or under way when a block could begin"
    )
    return lines + timeline([r for r in rows if r.row == "block"])


def timeline(rows):
    """The middle layer of a few blocks, a character for each short time."""
    layers = (len(rows[0].stamps) // 3 - 3) // len(PHASES)
    first = 1 + layers // 2 * len(PHASES)
    spans = {r.block: segments(r.stamps)[first : first + len(PHASES)] for r in rows[:: -(-len(rows) // TALL)]}
    begin, end = min(s[0][0] for s in spans.values()), max(s[-1][1] for s in spans.values())
    width = max(end - begin, 1e-9) / WIDE
    lines = [
        f"  layer {layers // 2} of {layers}, {end - begin:.1f} us, block by block: {OTHERS} waiting for others, "
        f"{TILES} for tiles, {WORK} work"
    ]
    for block, mine in spans.items():
        line = [" "] * WIDE
        for start, stop, others, tiles in mine:
            for i in range(WIDE):
                at = begin + (i + 0.5) * width
                if start <= at < stop:
                    line[i] = (
                        OTHERS if at < start + others else TILES if at < start + others + tiles else WORK
                    )
        lines.append(f"  {block:4} {''.join(line)}")
    ends = max(spans.values(), key=lambda mine: mine[-1][1])
    lines.append("       " + marks([(stop - begin) / width for _, stop, *_ in ends]))
    return lines


def marks(places):
    """The phases' names, each left of where it ends."""
    line = ""
    for name, place in zip(PHASES, places):
        line += f"{name}|".rjust(int(place) - len(line)) if int(place) - len(line) > len(name) else "|"
    return line


def segments(stamps):
    """[(begin, end, waiting for others, waiting for tiles)] of a block's phases, us."""
    found, begin = [], 0.0
    for i in range(0, len(stamps), 3):
        end, others, tiles = (value / 1e3 for value in stamps[i : i + 3])
        found.append((begin, end, others, tiles))
        begin = end
    return found
