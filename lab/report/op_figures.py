"""Pictures of single ops: share of the ceiling, roofline, time against batch or context, caches."""

import numpy as np

from lab.report import style
from lab.report.figures import (
    Figure,
    amount,
    command,
    conditions,
    dots,
    draw_floor,
    floors,
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
    times,
    unit,
    with_share,
)
from lab.report.ops import chosen, first_of, in_order, labelled, of_model, score, score_words, shape_text

PANELS = 8  # of one picture
LINES = 3  # of other backends than CUDA and Triton in one picture
FAR = 0.1  # of the fastest time: a floor further below is not drawn, as it would press all lines together
TINY = 1.0  # us: ops that move less than the card reads in this time are bound by their launch
COLUMNS = "case backend tuning batch context us us_p10 us_p90 n bytes gbps share"


def _overview(run, f):
    """(rows of the smallest batch, which of them move less than the card reads in TINY microseconds)."""
    rows = labelled(chosen(run.op, f))
    rows = rows[rows["batch"] == rows["batch"].min()]
    rows = with_share(rows[~rows["suspect"]]).sort_values("context", kind="stable", na_position="first")
    ceiling = run.best_ceiling("read") or run.best_ceiling()
    return rows, rows["bytes"] < TINY * ceiling * 1e3 if ceiling else rows["bytes"] < 0


def utilisation(run, f):
    """Share of the ceiling per op at the smallest batch, ops that memory bounds; emulated runs show the time
    of all ops."""
    rows, small = _overview(run, f)
    if not run.emulated:
        rows = rows[~small & rows["share"].notna()]
    if not len(rows):
        return None
    order, left = first_of(in_order(rows["case"]))
    divisor, unit_name = unit(rows["us"])
    low = max(0, 10 * np.floor(rows["share"].min() / 10 - 0.3)) if rows["share"].notna().any() else 0

    def draw(canvas):
        ax = canvas.subplots()
        if run.emulated:
            dumbbells(ax, times(rows, divisor), order, "us", "us_p10", "us_p90")
            plain_log(ax.xaxis)
            ax.set_xlabel(f"time of a call ({unit_name}, log scale), emulated")
        else:
            dumbbells(ax, rows, order, "share", "share_low", "share_high")
            ax.set_xlim(low, max(106, rows["share"].max() + 3))
            ax.axvline(100, color=style.INK, linewidth=1, linestyle=":")
            ax.set_xlabel("share of the measured bandwidth (%)" + ("; begins above 0" if low else ""))
        legend(canvas, [ax])

    if run.emulated:
        what, found, how = "Time of a call", "", "Further left is faster."
    else:
        what, found = "Share of the bandwidth", f"{score_words(score(rows))} {_best_words(rows)} ".lstrip()
        how = "The dotted line is what plain reads reached on this card."
    return Figure(
        name="utilisation",
        title=f"{what}, batch {amount(rows['batch'].iloc[0])}{f.of_model}",
        conditions=conditions(run, rows, f.timer),
        reading=found + how + left,
        alt=f"Dots on one line per op: {what.lower()} of {names(rows['backend'])}. {found}".strip(),
        table=table(rows, COLUMNS),
        command=command("ops", (), rows, f.model),
        height=0.75 + 0.21 * len(order),
        draw=draw,
    )


def tiny(run, f):
    """Time of the ops that move so little that a launch, not memory, bounds them; smallest batch."""
    rows, small = _overview(run, f)
    rows = rows[small]
    if run.emulated or not len(rows):
        return None
    order, left = first_of(in_order(rows["case"]))

    def draw(canvas):
        ax = canvas.subplots()
        dumbbells(ax, rows, order, "us", "us_p10", "us_p90")
        from_zero_or_log(ax.xaxis, rows["us"], rows["us_p90"])
        ax.set_xlabel("time of a call (us)")
        legend(canvas, [ax])

    return Figure(
        name="tiny",
        title=f"The small ops, in microseconds, batch {amount(rows['batch'].iloc[0])}{f.of_model}",
        conditions=conditions(run, rows, f.timer),
        reading=f"They move less than this card reads in {TINY:g} us, so that starting a kernel bounds them, "
        f"not memory. {score_words(score(rows))}" + left,
        alt=f"Dots on one line per op: time of a call of {names(rows['backend'])}.",
        table=table(rows, COLUMNS),
        command=command("ops", (), rows, f.model),
        height=0.75 + 0.21 * len(order),
        draw=draw,
    )


def dumbbells(ax, rows, order, x, low, high):
    """A line of the axis for each case, top down in `order`: CUDA's and Triton's marks joined by a bar, the
    fastest of their peers, and a kernel of the user's own."""
    place = {case: i for i, case in enumerate(order)}
    rows = rows[rows["case"].isin(order)]
    own = [name for name in style.backend_order(rows["backend"]) if name not in style.BACKENDS]
    ours = rows["backend"].isin(["cuda", "triton"])
    ends = rows[ours].groupby("case")[x].agg(["min", "max"])
    at = [place[case] for case in ends.index]
    ax.hlines(at, ends["min"], ends["max"], color=style.GRID, linewidth=4)
    others = rows[~ours & ~rows["backend"].isin(own)].sort_values("us").drop_duplicates("case")
    if len(others):
        at = [place[case] for case in others["case"]]
        ax.plot(others[x], at, "D", color=style.MUTED, fillstyle="none", markersize=4, label="best peer")
    for name in ("cuda", "triton", *own):
        mine, look = rows[rows["backend"] == name], style.backend(name)
        if len(mine):
            at = [place[case] for case in mine["case"]]
            spreads = spread(mine, x, low, high)
            ax.errorbar(
                mine[x], at, xerr=spreads, fmt=look.marker, color=look.color, label=look.label, markersize=5.5
            )
    ax.set_yticks(range(len(order)), [short(case, 30) for case in order])
    ax.set_ylim(len(order) - 0.4, -0.6)


def _best_words(rows):
    words = []
    for name in ("cuda", "triton"):
        mine = rows[rows["backend"] == name]
        if len(mine):
            best = mine.loc[mine["share"].idxmax()]
            words.append(f"{style.backend(name).label} reaches at most {best['share']:.0f}% ({best['case']})")
    return "; ".join(words) + "." if words else ""


def telling(rows):
    """The rows of CUDA, Triton and LINES other backends, a kernel of the user's own first, then the fastest
    peers: more lines than that cannot be told apart."""
    behind = rows["us"] / rows.groupby(["case", "batch"])["us"].transform("min")
    behind = behind.groupby(rows["backend"]).mean()
    own = [name for name in behind.index if name not in style.BACKENDS]
    peers = behind.drop(["cuda", "triton", *own], errors="ignore").nsmallest(LINES - len(own[:LINES]))
    return rows[rows["backend"].isin(["cuda", "triton", *own[:LINES], *peers.index])]


def against(run, f, op):
    """One op's time against context where it has several, else against batch, with the bandwidth floor."""
    rows = chosen(run.op, f)
    rows = with_share(labelled(rows[rows["op"] == op]))
    if not len(rows):
        return None
    rows = telling(rows)
    by_context = rows["context"].nunique() > 1
    x = "context" if by_context else "batch"
    if rows[x].nunique() == 1:
        return _once(run, f, op, rows)
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
    floor = floors(rows, ["panel", x])
    lowest = floor["panel"].map(rows.groupby("panel")["us"].min())
    floor = floor[floor["floor"] > FAR * lowest]

    def draw(canvas):
        axes = grid_of(canvas, len(panels), "context (tokens)" if by_context else "batch (sequences)")
        for ax, name in zip(axes, panels):
            here = times(rows[rows["panel"] == name], divisor)
            for backend in style.backend_order(here["backend"]):
                look = style.backend(backend)
                line(ax, here[here["backend"] == backend], x, "us", "us_p10", "us_p90", look, look.label)
            below = floor[floor["panel"] == name]
            draw_floor(ax, below[x], below["floor"] / divisor)
            log_ticks(ax.xaxis, rows[x])
            ax.set_title(short(name), loc="left")
            from_zero_or_log(ax.yaxis, here["us"], here["us_p90"])
        for ax in axes[::2]:
            ax.set_ylabel(f"{unit_name} a call")
        legend(canvas, axes)

    return Figure(
        name=f"{op}-time",
        title=f"{op}: time of a call against {x}{f.of_model}",
        conditions=conditions(run, rows, f.timer),
        reading="Lower is better."
        + (" The dotted line is the floor: the op's bytes over the measured bandwidth." if len(floor) else "")
        + left,
        alt=f"Lines of {names(rows['backend'])}: time of a call of {op} against {x}, {len(panels)} panels.",
        table=table(rows.sort_values(["panel", "backend", x]), COLUMNS),
        command=command("ops", [op], rows, f.model),
        height=0.7 + 1.2 * -(-len(panels) // 2),
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


STATES = {  # what a row's cache, or its timer, is called in the table of caches()
    "cold": "cold: every call reads memory that no cache holds",
    "in_model": "in a model: weights cold, activations warm",
    "warm": "warm: the same buffers again",
    "event": "cold, launched one by one, the host's time included",
    "wall": "host clock",
}


def caches(run, f, op):
    """(caption, frame) of one op's times in us at the smallest batch and its largest case by cache state;
    None where there is one state only."""
    rows = run.op[run.op["op"] == op]
    rows = of_model(
        rows[rows["dtype"] == (f.dtype if (rows["dtype"] == f.dtype).any() else rows["dtype"].iloc[0])], f
    )
    rows = rows[(rows["batch"] == rows["batch"].min()) & ~rows["suspect"]]
    if not len(rows):
        return None
    rows = labelled(rows)
    rows = rows[rows["case"] == rows.loc[rows["bytes"].fillna(0).idxmax(), "case"]]
    rows = rows.assign(state=rows["timer"].where(rows["timer"] != "graph", rows["cache"]))
    found = rows.drop_duplicates(["state", "backend"]).pivot(index="state", columns="backend", values="us")
    states = [s for s in STATES if s in found.index]
    if len(states) < 2:
        return None
    frame = found.loc[states, style.backend_order(found.columns)]
    frame.columns = [f"{style.backend(b).label} (us)" for b in frame.columns]
    frame.insert(0, "buffers", [STATES[s] for s in states])
    case = rows["case"].iloc[0]
    caption = f"What caches and the host change: {case}, batch {amount(rows['batch'].iloc[0])}, medians"
    return caption, frame


def all_rows(rows):
    """Every measurement of one op, for the page's table."""
    listed = labelled(rows).assign(shape=rows["shape"].map(shape_text))
    columns = (
        "case weight_format backend tuning dtype batch context shape cache timer us us_p10 us_p90 n bytes "
        "gbps share flag"
    )
    return table(listed, columns)
