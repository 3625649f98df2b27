"""Inside the persistent step: what its blocks do over time, and where the time of each phase goes."""

import numpy as np

from lab.records.timeline import middle_layer, segments
from lab.report import style
from lab.report.figures import AHEAD, Figure, amount, conditions, digits, legend, table, token_unit

# What a block does, in the order in which it is drawn: a column of the records and its colour.
PARTS = {
    "waiting for other blocks": ("others_us", style.REST),
    "waiting for weights or KV": ("tiles_us", "#a5654b"),
    "work": ("work_us", "#5f55c4"),
}
OTHERS, TILES, WORK = PARTS
BLOCKS = 8  # in the picture of the whole token
SMALLEST = 1 / 3000  # of a picture's width: shorter waits are not drawn in it


def of_model(run, model):
    """A picture for each launch of this model's step that was recorded."""
    rows = run.inside[run.inside["model"] == model]
    keys = ["backend", "dtype", "context", "weight_format"]
    return [picture(run, mine) for _, mine in rows.groupby(keys, sort=False)] if len(rows) else []


def picture(run, rows):
    """The whole token and its middle layer, blocks by time, and the phases as stacked bars."""
    rows = rows.sort_values("order")
    total, phases = rows[rows["row"] == "total"].iloc[0], rows[rows["row"] == "phase"]
    timelines = {int(r.block): segments(r.stamps) for r in rows[rows["row"] == "block"].itertuples()}
    in_layer = list(phases["phase"].iloc[1:-2])
    layer, layers, spans = middle_layer(timelines, len(in_layer))
    backend, model = total["backend"], total["model"]
    parts = [part for part in PARTS if phases[PARTS[part][0]].notna().any()]
    divisor, unit_name = token_unit([total["us"]])

    def draw(canvas):
        whole, zoom, bars = canvas.subplots(3, 1, height_ratios=(0.9, 1.3, 0.22 * len(phases)))
        few = list(timelines)[:: -(-len(timelines) // BLOCKS)]
        draw_blocks(whole, {block: timelines[block] for block in few}, divisor, parts)
        whole.set_title(f"the whole token, {unit_name}", loc="left")
        _, narrow = token_unit([max(one.end - one.begin for mine in spans.values() for one in mine)])
        begin = min(mine[0].begin for mine in spans.values())
        draw_blocks(zoom, spans, 1e3 if narrow == "ms" else 1.0, parts, begin)
        draw_names(zoom, spans, in_layer, 1e3 if narrow == "ms" else 1.0, begin)
        zoom.set_title(f"layer {layer} of {layers}, {narrow}", loc="left")
        draw_phases(bars, phases, divisor, parts)
        bars.set_title(f"each phase, all layers, mean of all blocks, {unit_name}", loc="left")
        legend(canvas, [bars])

    covered = phases["us"].sum() / total["us"]
    waits = phases["others_us"].sum() / total["us"]
    longest = phases.loc[phases["us"].idxmax()]
    said = (
        f"The phases add up to {covered:.1%} of the launch. Blocks wait for others {waits:.0%} of the time. "
        f"The longest phase is {longest['phase']}, {longest['us'] / total['us']:.0%}. "
    )
    if np.isfinite(total["normal_us"]):
        said += f"Recording changes the launch by {total['us'] / total['normal_us'] - 1:+.1%}. "
    shown = rows[rows["row"] != "block"]
    shown = shown.assign(share=100 * shown["of_ceiling"], of_token=100 * shown["of_token"])
    return Figure(
        name=f"{model}-inside-{backend}",
        title=f"{model}: inside the persistent step, {style.backend(backend).label}, "
        f"context {amount(total['context'])}",
        conditions=conditions(run, rows[rows["row"] == "total"], total["timer"]),
        reading=said
        + "Above, each line is a block. In each phase its waits are drawn first, though waits for weights "
        "lie between the work. The next weights are loaded during all waits, so a phase may seem to read "
        "faster than the ceiling: its first tiles came in the phase before."
        + ("" if TILES in parts else " This kernel cannot tell waits for weights from work."),
        alt=f"Timelines of blocks, and stacked bars of the phases' {unit_name}. {said}",
        table=table(
            shown.drop(columns="of_ceiling"),
            "row phase calls us others_us tiles_us work_us ahead bytes gbps share of_token flag",
            others_us="waiting for blocks (us)",
            tiles_us="waiting for tiles (us)",
            work_us="work (us)",
            ahead="tiles ahead",
            us="us",
            of_token="of the launch (%)",
        ),
        command=again(total),
        height=2.6 + 0.22 * len(phases) + 1.1,
        draw=draw,
    )


def again(total):
    """The command that measures this launch again and draws it."""
    return (
        f"lab ledger {total['model']} --inside --backend {total['backend']} --dtype {total['dtype']} "
        f"--context {total['context']:.0f} --out out/again && lab report out/again"
    )


def draw_blocks(ax, timelines, divisor, parts, origin=0.0):
    """A line for each block, top down: work, and over it the waits."""
    end = max(mine[-1].end for mine in timelines.values())
    least, spans = (end - origin) * SMALLEST, {part: [] for part in parts}
    for y, mine in enumerate(timelines.values()):
        spans[WORK].append((y, mine[0].begin, mine[-1].end))
        for one in mine:
            arrived = one.begin + one.others
            spans[OTHERS].append((y, one.begin, arrived))
            if TILES in spans:
                spans[TILES].append((y, arrived, arrived + one.tiles))
    for part in (WORK, OTHERS, TILES):
        found = [(y, low, high) for y, low, high in spans.get(part, ()) if high - low >= least]
        x = [(at - origin) / divisor for _, low, high in found for at in (low, high, np.nan)]
        (line,) = ax.plot(
            x,
            [value for y, *_ in found for value in (y, y, np.nan)],
            color=PARTS[part][1],
            linewidth=0.62 * height_of(ax) / len(timelines),
            solid_capstyle="butt",
        )
        line.get_path().should_simplify = False
    ax.set_xlim(0, (end - origin) / divisor)
    ax.set_ylim(len(timelines) - 0.4, -0.6)
    ax.set_yticks(range(0, len(timelines), 3), [str(block) for block in list(timelines)[::3]])
    ax.set_ylabel("block")
    ax.grid(axis="y", visible=False)


def draw_names(ax, spans, names, divisor, origin):
    """Where each phase of a layer ends, and its name above the blocks, where there is room."""
    for y, mine in enumerate(spans.values()):
        ends = [(one.end - origin) / divisor for one in mine[:-1]]
        ax.vlines(ends, y - 0.36, y + 0.36, color=style.PAGE, linewidth=1.2)
    ax.set_ylim(len(spans) - 0.4, -0.6 - 0.12 * len(spans))
    widest = ax.get_xlim()[1]
    for name, *same in zip(names, *spans.values(), strict=True):
        begin = sum(one.begin - origin for one in same) / len(same) / divisor
        end = sum(one.end - origin for one in same) / len(same) / divisor
        if end - begin > 0.018 * len(name) * widest:
            at = dict(ha="center", va="bottom", fontsize=7.5, color=style.MUTED)
            ax.text((begin + end) / 2, -0.55, name, **at)


def height_of(ax):
    """Points of an axis' height, about: the layout is not final while it is drawn."""
    return ax.get_position().height * ax.figure.get_size_inches()[1] * 72


def draw_phases(ax, phases, divisor, parts):
    """Stacked bars, with the share of the ceiling where it is known."""
    left = np.zeros(len(phases))
    for part in parts:
        column, color = PARTS[part]
        width = (phases[column] / divisor).fillna(0.0).to_numpy()
        ax.barh(range(len(phases)), width, left=left, height=0.62, color=color, label=part)
        left += width
    for y, r in enumerate(phases.itertuples()):
        share = f", {r.of_ceiling:.0%} of the ceiling" if np.isfinite(r.of_ceiling) else ""
        ax.text(left[y], y, f"{AHEAD}{digits(r.us)} us{share}", va="center", fontsize=7.5)
    ax.set_yticks(range(len(phases)), list(phases["phase"]))
    ax.set_ylim(len(phases) - 0.5, -0.5)
    ax.set_xlim(0, left.max() * (1.5 if phases["of_ceiling"].notna().any() else 1.16))
    ax.grid(axis="y", visible=False)
