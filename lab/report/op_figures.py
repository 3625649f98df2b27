"""Pictures of single ops: share of the ceiling, roofline, time against batch or context, caches."""

import numpy as np

from lab.report import heatmaps, style
from lab.report.figures import (
    Figure,
    amount,
    command,
    conditions,
    dots,
    from_zero_or_log,
    grid_of,
    legend,
    line,
    log_ticks,
    names,
    plain_log,
    short,
    spread,
    table,
    thinned,
    times,
    unit,
    with_share,
)
from lab.report.ops import chosen, first_of, in_order, labelled, of_model, score, score_words

PANELS = 8  # of one picture
DOTS = 500  # of one backend in the roofline
COLUMNS = "case backend tuning batch context us us_p10 us_p90 n bytes gbps share"


def utilisation(run, f):
    """Share of the ceiling per op and backend at the smallest batch; emulated runs show time instead."""
    rows = labelled(chosen(run.op, f))
    rows = rows[rows["batch"] == rows["batch"].min()]
    if not run.emulated:
        rows = rows[~rows["suspect"] & rows["of_ceiling"].notna()]
    if not len(rows):
        return None
    rows = with_share(rows).sort_values("context", kind="stable", na_position="first")
    order, left = first_of(in_order(rows["case"]))
    everything, rows = rows, rows[rows["case"].isin(order)]
    divisor, unit_name = unit(rows["us"])

    def draw(canvas):
        ax = canvas.subplots()
        if run.emulated:
            dots(ax, times(rows, divisor), "case", order, "us", "us_p10", "us_p90")
            plain_log(ax.xaxis)
            ax.set_xlabel(f"time of a call ({unit_name}, log scale), emulated")
        else:
            dots(ax, rows, "case", order, "share", "share_low", "share_high")
            ax.set_xlim(0, 106)
            ax.axvline(100, color=style.INK, linewidth=1, linestyle=":")
            ax.text(100, -0.62, "ceiling", ha="center", va="bottom", fontsize=7, color=style.MUTED)
            ax.set_xlabel("share of the measured bandwidth ceiling (%)")
        legend(canvas, [ax])

    if run.emulated:
        what, found, how = "Time of a call", "", "One row per op and shape; further left is faster."
    else:
        what, found = (
            "Bandwidth utilisation",
            f"{score_words(score(everything))} {_best_words(everything)} ".lstrip(),
        )
        how = (
            "One row per op and shape; the dotted line is the bandwidth that plain access reached on this "
            "card. "
            "Ops that move little are bound by their launch, not by memory, and stay far from it."
        )
    return Figure(
        name="utilisation",
        title=f"{what} per op, batch {amount(rows['batch'].iloc[0])}{f.of_model}",
        conditions=conditions(run, rows, f.timer),
        reading=found + how + left,
        alt=f"Dot plot, one row per op: {what.lower()} of {names(rows['backend'])}. {found}".strip(),
        table=table(everything, COLUMNS),
        command=command("ops", (), rows, f.model),
        height=0.9 + 0.30 * len(order),
        draw=draw,
    )


def _best_words(rows):
    words = []
    for name in ("cuda", "triton"):
        mine = rows[rows["backend"] == name]
        if len(mine):
            best = mine.loc[mine["share"].idxmax()]
            words.append(f"{style.backend(name).label} reaches at most {best['share']:.0f}% ({best['case']})")
    return "; ".join(words) + "." if words else ""


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
        height=3.6,
        draw=draw,
    )


def against(run, f, op, y):
    """One op's time (y = "us") or share of the ceiling ("share") against context where it has several, else
    batch."""
    rows = chosen(run.op, f)
    rows = with_share(labelled(rows[rows["op"] == op]))
    share = y == "share"
    if share:
        rows = rows[~rows["suspect"] & rows["share"].notna()]
    if not len(rows):
        return None
    by_context = rows["context"].nunique() > 1
    x = "context" if by_context else "batch"
    if rows[x].nunique() == 1:
        return None if share else _once(run, f, op, rows)
    rows = rows.assign(panel="batch " + rows["batch"].map(amount) if by_context else rows["case"])
    panels = list(
        dict.fromkeys(rows.sort_values("batch", kind="stable")["panel"] if by_context else rows["panel"])
    )
    left = (
        f" The first {PANELS} of {len(panels):,} panels are drawn; all rows are in records.jsonl."
        if len(panels) > PANELS
        else ""
    )
    panels = panels[:PANELS]
    rows = rows[rows["panel"].isin(panels)]
    divisor, unit_name = unit(rows["us"])

    def draw(canvas):
        axes = grid_of(
            canvas, len(panels), "context (tokens)" if by_context else "batch (sequences)", sharey=share
        )
        for ax, name in zip(axes, panels):
            here = times(rows[rows["panel"] == name], divisor)
            for backend in style.backend_order(here["backend"]):
                look = style.backend(backend)
                ends = ("share_low", "share_high") if share else ("us_p10", "us_p90")
                line(ax, here[here["backend"] == backend], x, y, *ends, look, look.label)
            log_ticks(ax.xaxis, rows[x])
            ax.set_title(short(name), loc="left")
            if share:
                ax.set_ylim(0, 108)
                ax.axhline(100, color=style.INK, linewidth=1, linestyle=":")
            else:
                from_zero_or_log(ax.yaxis, here["us"], here["us_p90"])
        canvas.supylabel(
            "share of the ceiling (%)" if share else f"time of a call ({unit_name})", fontsize=8.5
        )
        legend(canvas, axes)

    what = "share of the bandwidth ceiling" if share else "time of a call"
    how = (
        "Higher is better; the dotted line is the measured ceiling."
        if share
        else "Lower is better. A flat stretch is launch cost or weights, a rising one what each sequence or "
        "token adds."
    )
    return Figure(
        name=f"{op}-{'share' if share else 'time'}",
        title=f"{op}: {what} against {x}{f.of_model}",
        conditions=conditions(run, rows, f.timer),
        reading=how + left,
        alt=f"Lines of {names(rows['backend'])}: {what} of {op} against {x}, {len(panels)} panels.",
        table=table(rows.sort_values(["panel", "backend", x]), COLUMNS),
        command=command("ops", [op], rows, f.model),
        height=0.9 + 1.55 * -(-len(panels) // 2),
        draw=draw,
    )


def _once(run, f, op, rows):
    """The time of an op that was measured at one size of each use only."""
    divisor, unit_name = unit(rows["us"])
    order, left = first_of(list(dict.fromkeys(rows["case"])))
    drawn = rows[rows["case"].isin(order)]

    def draw(canvas):
        ax, scaled = canvas.subplots(), times(drawn, divisor)
        dots(ax, scaled, "case", order, "us", "us_p10", "us_p90")
        from_zero_or_log(ax.xaxis, scaled["us"], scaled["us_p90"])
        ax.set_xlabel(f"time of a call ({unit_name})")
        legend(canvas, [ax])

    return Figure(
        name=f"{op}-time",
        title=f"{op}: time of a call, batch {amount(rows['batch'].iloc[0])}{f.of_model}",
        conditions=conditions(run, rows, f.timer),
        reading="Further left is faster." + left,
        alt=f"Dot plot: time of one call of {op} for {names(rows['backend'])}.",
        table=table(rows, COLUMNS),
        command=command("ops", [op], rows, f.model),
        height=0.9 + 0.34 * len(order),
        draw=draw,
    )


def caches(run, f, op):
    """One op at the smallest batch and its largest case: cold, warm, in the model, and with the host's
    time."""
    rows = run.op[run.op["op"] == op]
    rows = of_model(
        rows[rows["dtype"] == (f.dtype if (rows["dtype"] == f.dtype).any() else rows["dtype"].iloc[0])], f
    )
    rows = rows[(rows["batch"] == rows["batch"].min()) & ~rows["suspect"]]
    if not len(rows):
        return None
    rows = labelled(rows)
    rows = rows[rows["case"] == rows.loc[rows["bytes"].fillna(0).idxmax(), "case"]]
    state = rows["timer"].where(rows["timer"] != "graph", rows["cache"])
    rows = rows.assign(state=state.replace({"in_model": "in model", "event": "eager, host included"}))
    states = [
        s for s in ("cold", "in model", "warm", "eager, host included", "wall") if (rows["state"] == s).any()
    ]
    if len(states) < 2:
        return None
    divisor, unit_name = unit(rows["us"])

    def draw(canvas):
        ax, scaled = canvas.subplots(), times(rows, divisor)
        dots(ax, scaled, "state", states, "us", "us_p10", "us_p90")
        ax.set_xlim(0, scaled["us_p90"].fillna(scaled["us"]).max() * 1.08)
        ax.set_xlabel(f"time of a call ({unit_name})")
        legend(canvas, [ax])

    case = rows["case"].iloc[0]
    return Figure(
        name=f"{op}-caches",
        title=f"{op}: what caches and the host change ({case}, batch {amount(rows['batch'].iloc[0])})",
        conditions=conditions(run, rows),
        reading="Cold: every call reads memory that no cache holds. In model: weights cold, activations "
        "warm. Warm: the same buffers again. Eager: launched one by one, the host's time included; "
        "the others are device time inside one graph.",
        alt=f"Dot plot: time of one call of {case} by cache state for {names(rows['backend'])}.",
        table=table(rows, "state backend tuning us us_p10 us_p90 n gbps"),
        command=command("ops", [op], rows, f.model),
        height=0.9 + 0.38 * len(states),
        draw=draw,
    )


def of_op(run, f, op):
    """The pictures of one op's section."""
    made = [
        against(run, f, op, "us"),
        None if run.emulated else against(run, f, op, "share"),
        heatmaps.winners(run, f, op),
        caches(run, f, op),
    ]
    return [m for m in made if m]
