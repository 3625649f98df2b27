"""The ladders: share of the ceiling rung by rung, from the naive kernel to the op's own."""

from lab.report import style
from lab.report.figures import (
    Figure,
    amount,
    command,
    conditions,
    from_zero_or_log,
    legend,
    names,
    short,
    spread,
    table,
    times,
    unit,
    with_share,
)
from lab.report.ops import shape_text
from lab.rungs import RUNGS, name_of

SAME = 0.01  # a shortfall by less is none


def of_run(run):
    """A picture for each ladder that was measured, at each batch."""
    return [
        climb(run, name, rows, wider=i > 0)
        for name in measured(run)
        for i, rows in enumerate(rows_of(run, name))
    ]


def measured(run):
    """The names of the ladders that were measured, in the order of a decode step."""
    found = dict(zip(names_of(run.ladder), run.ladder["op"]))
    return sorted(found, key=lambda name: (style.part_order(found[name]), name))


def names_of(rows):
    """The name of the ladder of each row."""
    return [name_of(op, form or None) for op, form in zip(rows["op"], rows["weight_format"])]


def rows_of(run, name):
    """The rows of a ladder: a frame for each batch, the smallest first."""
    mine = [found == name for found in names_of(run.ladder)]
    return [rows for _, rows in run.ladder[mine].groupby("batch")]


def climb(run, name, rows, wider):
    """Share of the ceiling (emulated runs: time) against the rung, a line for each language. rows: one of
    rows_of(); wider: not the first of them."""
    rows = with_share(rows)
    rows = rows.assign(
        name=rows["config"].map(lambda c: str(c.get("name", ""))),
        idea=rows["config"].map(lambda c: str(c.get("idea", ""))),
    ).sort_values(["rung", "backend"])
    rows = rows.assign(gain=[gain(rows, row) for row in rows.itertuples()])
    y, low, high = ("us", "us_p10", "us_p90") if run.emulated else ("share", "share_low", "share_high")
    rungs = rows.drop_duplicates("rung")
    divisor, unit_name = unit(rows["us"])

    def draw(canvas):
        ax, shown = canvas.subplots(), times(rows, divisor)
        for backend in style.backend_order(rows["backend"]):
            mine, look = shown[shown["backend"] == backend], style.backend(backend)
            looks = dict(color=look.color, marker=look.marker, label=look.label, linewidth=1)
            ax.errorbar(mine[y], mine["rung"], xerr=spread(mine, y, low, high), **looks)
        ax.set_yticks(rungs["rung"], [f"{r.rung:.0f}. {short(r.name, 17)}" for r in rungs.itertuples()])
        ax.set_ylim(rungs["rung"].max() + 0.5, rungs["rung"].min() - 0.5)
        if run.emulated:
            from_zero_or_log(ax.xaxis, shown["us"], shown["us_p90"])
            ax.set_xlabel(f"time of a call ({unit_name}), emulated")
        else:
            ax.set_xlim(0, 104)
            ax.axvline(100, color=style.INK, linewidth=1, linestyle=":")
            ax.set_xlabel("share of the measured bandwidth (%)")
            said = ax.secondary_yaxis("right")
            said.set_yticks(rungs["rung"], [promise(rows, r) for r in rungs.itertuples()], fontsize=7.5)
            said.tick_params(length=0)
            said.spines["right"].set_visible(False)
        legend(canvas, [ax])

    first = rows.iloc[0]
    batch = f"{first['batch']:.0f}"
    at = f"{shape_text(first['shape'])}, batch {amount(first['batch'])}"
    if first["context"] == first["context"]:
        at += f", context {amount(first['context'])}"
    return Figure(
        name=f"ladder-{name}" + (f"-b{batch}" if wider else ""),
        title=name + (f", batch {batch}" if wider else ""),
        conditions=conditions(run, rows, *set(rows["timer"])),
        reading=f"{at}. {climbed(rows)}",
        more=shortfalls(run, rows, name),
        alt=f"Lines of {names(rows['backend'])} over {len(rungs)} rungs of {name}: "
        + ("time of a call." if run.emulated else "share of the bandwidth ceiling."),
        table=table(
            rows,
            "rung name idea backend tuning us us_p10 us_p90 n gbps share gain",
            gain="times faster than the rung before",
        ),
        command=command("ops", [name], None, None, "--ladder"),
        height=0.75 + 0.24 * len(rungs),
        draw=draw,
        width=3.7,
    )


def gain(rows, row):
    """How many times faster a rung is than the one below it in the same language; NaN for the lowest."""
    below = rows[(rows["backend"] == row.backend) & (rows["rung"] < row.rung)]
    return below.loc[below["rung"].idxmax(), "us"] / row.us if len(below) else float("nan")


def promise(rows, rung):
    """ "2x: 1.90, 2.1": what a rung promised over the one before, and what it gave in each language; a dash
    where it is absent."""

    def told(gain):
        return "–" if gain != gain else f"{gain:.{2 if gain < 2 else 1 if gain < 10 else 0}f}"

    gains = {r.backend: r.gain for r in rows[rows["rung"] == rung.rung].itertuples()}
    gave = [told(gains.get(name, float("nan"))) for name in style.backend_order(rows["backend"])]
    promised = rung.config.get("promised")
    known = isinstance(promised, (int, float)) and set(gave) != {"–"}
    return f"{promised:g}x: {', '.join(gave)}" if known else ""


def climbed(rows):
    words = []
    for backend in style.backend_order(rows["backend"]):
        mine = rows[rows["backend"] == backend].sort_values("rung")
        low, top = mine.iloc[0], mine.iloc[-1]
        words.append(
            f"{style.backend(backend).label}: {low['name']} to {top['name']} is {low['us'] / top['us']:.3g} "
            f"times faster in {len(mine)} rungs."
        )
    return " ".join(words)


def shortfalls(run, rows, ladder):
    """Where a rung gained less than it promised over the one below it, and why that can be."""
    if run.emulated:
        return "Emulated times say nothing of what a rung gains on a GPU."
    words = []
    for row in rows.itertuples():
        promised = row.config.get("promised", 1.0)
        if row.gain == row.gain and isinstance(promised, (int, float)) and row.gain < promised * (1 - SAME):
            why = row.note or next(
                (r.otherwise for r in RUNGS if (r.ladder, r.number) == (ladder, row.rung)), ""
            )
            words.append(
                f"{style.backend(row.backend).label} {row.rung:.0f}. {row.name} gained {row.gain:.2f}x where "
                f"{promised:g}x was promised. {why}".strip()
            )
    return " ".join(words) or "Every rung gained what it promised."
