"""Pictures of the machine: the ceiling, which every share is of, and all ops under it."""

import numpy as np

from lab.report import style
from lab.report.figures import (
    Figure,
    amount,
    command,
    conditions,
    legend,
    log_ticks,
    names,
    plain_log,
    short,
    spread,
    table,
    thinned,
)
from lab.report.ops import chosen, labelled

DIRECTIONS = {"read": ("o", "-"), "copy": ("s", "--"), "write": ("^", ":")}
DOTS = 500  # of one backend in the roofline


def ceiling(run):
    """Bandwidth of plain reads, copies and writes against their size: the denominator of every share."""
    rows = run.ceiling[run.ceiling["gbps"].notna() & (run.ceiling["bytes"] > 0)]
    if not len(rows):
        return None
    rows = rows.loc[rows.groupby(["direction", "bytes"])["gbps"].idxmax()]
    rows = rows.assign(low=rows["bytes"] / rows["us_p90"] / 1e3, high=rows["bytes"] / rows["us_p10"] / 1e3)
    groups = sorted(
        rows.groupby("direction"), key=lambda g: list(DIRECTIONS).index(g[0]) if g[0] in DIRECTIONS else 9
    )

    def draw(canvas):
        ax = canvas.subplots()
        colors = (style.INK, style.MUTED, "#cc6677", "#999933")
        for i, (direction, group) in enumerate(groups):
            marker, dash = DIRECTIONS.get(direction, ("D", "-."))
            group = group.sort_values("bytes")
            ax.errorbar(
                group["bytes"],
                group["gbps"],
                yerr=spread(group, "gbps", "low", "high"),
                marker=marker,
                linestyle=dash,
                color=colors[i % 4],
                label=direction,
            )
        log_ticks(ax.xaxis, rows["bytes"])
        ax.set_ylim(0, rows["gbps"].max() * 1.08)
        ax.set_xlabel("bytes streamed")
        ax.set_ylabel("GB/s")
        legend(canvas, [ax])

    return Figure(
        name="ceiling",
        title="The ceiling: plain reads, copies and writes on this card",
        conditions=conditions(run, rows),
        reading="Best launch shape of each direction and size. The highest point of a direction is 100% for "
        "the ops "
        "that it bounds; a short stream cannot reach it, and no more can a small kernel.",
        alt=f"Lines of GB/s against stream size for {', '.join(d for d, _ in groups)}; best "
        f"{rows['gbps'].max():,.0f}.",
        table=table(rows, "direction bytes backend gbps us us_p10 us_p90 n"),
        command=command("ops", ["embedding"]),
        height=2.6,
        draw=draw,
    )


def roofline(run, f):
    """Every op on a log-log plot of flop/s against flop/byte, under the measured bandwidth roof."""
    if run.emulated or run.best_ceiling() is None:
        return None
    rows = labelled(chosen(run.op, f))
    rows = rows[~rows["suspect"] & (rows["flops"] > 0) & (rows["bytes"] > 0) & rows["gbps"].notna()]
    if not len(rows):
        return None
    tera = rows["flops"] / 1e6  # flop per us -> Tflop/s
    rows = rows.assign(
        intensity=rows["flops"] / rows["bytes"],
        tflops=tera / rows["us"],
        low=tera / rows["us_p90"],
        high=tera / rows["us_p10"],
    )
    crowded = rows["backend"].value_counts().max() > DOTS
    roof = run.best_ceiling() / 1e3  # TB/s: Tflop/s at 1 flop/byte

    def draw(canvas):
        ax = canvas.subplots()
        x = np.array([rows["intensity"].min() / 2, rows["intensity"].max() * 2])
        floor, top = rows["tflops"].min() / 2, roof * x[1] * 1.3
        ax.plot(x, roof * x, color=style.INK, linewidth=1.2)
        ax.fill_between(x, roof * x, roof * x * 100, color=style.GRID, alpha=0.5, linewidth=0)
        for name in style.backend_order(rows["backend"]):
            mine, look = thinned(rows[rows["backend"] == name], DOTS), style.backend(name)
            ax.errorbar(
                mine["intensity"],
                mine["tflops"],
                yerr=spread(mine, "tflops", "low", "high"),
                alpha=0.85,
                color=look.color,
                marker=look.marker,
                label=look.label,
                markersize=4,
                linestyle="none",
            )
        plain_log(ax.xaxis)
        plain_log(ax.yaxis)
        ax.set_xlim(*x)
        ax.set_ylim(floor, top)
        # Each op is named at its slowest point, names pushed apart upwards.
        at, step = -np.inf, 0.05 * np.log10(top / floor)
        for row in rows.loc[rows.groupby("op")["tflops"].idxmin()].sort_values("tflops").itertuples():
            at = max(np.log10(row.tflops), at + step)
            right = row.intensity < x[1] / 8
            ax.text(
                row.intensity * (1.25 if right else 0.8),
                10**at,
                short(row.op),
                fontsize=7.5,
                va="center",
                ha="left" if right else "right",
            )
        ax.set_xlabel("arithmetic intensity (flop / byte)")
        ax.set_ylabel("Tflop/s")
        legend(canvas, [ax])

    return Figure(
        name="roofline",
        title="Roofline: every op under the measured memory roof",
        conditions=conditions(run, rows, f.timer),
        reading="The line is the measured bandwidth times the intensity; no kernel that moves its bytes "
        "through DRAM "
        "can lie in the grey. The vertical distance to the line is what is left to gain. Each op runs from "
        f"batch {amount(rows['batch'].min())} to {amount(rows['batch'].max())}. The arithmetic peak was not "
        "measured and is not drawn; ops that only move data have no place here."
        + (f" Of each backend {DOTS} points at most are drawn, evenly chosen." if crowded else ""),
        alt=f"Roofline on log axes: {len(rows)} points of {names(rows['backend'])} below the line of the "
        "bandwidth.",
        table=table(rows, "case backend tuning batch intensity tflops us us_p10 us_p90 n gbps share"),
        command=command("ops", (), rows, f.model),
        height=3.2,
        draw=draw,
    )
