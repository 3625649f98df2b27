"""The ladders: what each rung gains over the one that it changes, from the naive kernel to the op's own."""

import pandas as pd

from lab.report import style
from lab.report.figures import (
    Figure,
    amount,
    command,
    conditions,
    from_zero_or_log,
    legend,
    names,
    plain_log,
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
    """The rows of whole ladders of a name: a frame for each batch, the smallest first."""
    return [rows for _, rows in _rows(run, name, partial=False).groupby("batch")]


def _rows(run, name, partial):
    mine = [found == name for found in names_of(run.ladder)]
    rows = run.ladder[mine]
    return rows[[bool(config.get("partial")) is partial for config in rows["config"]]]


def steps(run, name, rows):
    """The differences between rungs: a frame of the rungs of `rows`, one of rows_of(), that are judged at
    this size, and with the first of these frames of those that are judged at sizes of their own. `gain`: how
    many times faster than the rung that it changes; `at`: that size, "" for that of the ladder."""
    found, first = [(rows, "")], rows_of(run, name)[0]
    if rows.index.equals(first.index):
        elsewhere = _rows(run, name, partial=True)
        keys = [(batch, shape_text(shape)) for batch, shape in zip(elsewhere["batch"], elsewhere["shape"])]
        for key in dict.fromkeys(keys):
            there = elsewhere[[k == key for k in keys]]
            words = key[1] if key[1] != shape_text(first.iloc[0]["shape"]) else f"batch {key[0]:.0f}"
            found.append((there, words))
    judged = [
        {**dict(zip(one_size.columns, one)), "gain": gain(one_size, one), "at": words}
        for one_size, words in found
        for one in one_size.itertuples(index=False)
        if one.config.get("judged", True)
    ]
    return pd.DataFrame(judged).sort_values(["rung", "backend"])


def climb(run, name, rows, wider):
    """What each rung gains over the one that it changes (emulated runs: the time of each). rows: one of
    rows_of(); wider: not the first of them."""
    rows = with_share(rows)
    rows = rows.assign(
        name=rows["config"].map(lambda c: str(c.get("name", ""))),
        idea=rows["config"].map(lambda c: str(c.get("idea", ""))),
    ).sort_values(["rung", "backend"])
    gains = steps(run, name, rows)
    rungs = rows.drop_duplicates("rung")
    first = rows.iloc[0]
    batch = f"{first['batch']:.0f}"
    at = f"{shape_text(first['shape'])}, batch {amount(first['batch'])}"
    if first["context"] == first["context"]:
        at += f", context {amount(first['context'])}"
    shown = rows.merge(gains[["rung", "backend", "gain", "at"]], how="left", on=["rung", "backend"])
    return Figure(
        name=f"ladder-{name}" + (f"-b{batch}" if wider else ""),
        title=name + (f", batch {batch}" if wider else ""),
        conditions=conditions(run, rows, *set(rows["timer"])),
        reading=" ".join(filter(None, [f"{at}. {climbed(rows)}", elsewhere_words(gains)])),
        more=shortfalls(run, gains, name),
        alt=f"{'Lines' if run.emulated else 'Bars'} of {names(rows['backend'])} over {len(rungs)} rungs of "
        f"{name}: " + ("time of a call." if run.emulated else "how many times faster each rung is."),
        table=table(
            shown,
            "rung name idea backend tuning us us_p10 us_p90 n gbps share gain at",
            gain="times faster than the rung that it changes",
            at="judged at",
        ),
        command=command("ops", [name], None, None, "--ladder"),
        height=0.75 + 0.24 * len(rungs),
        draw=draw_times(rows, rungs) if run.emulated else draw_gains(rows, rungs, gains),
        width=3.7,
    )


def _rung_axis(ax, rungs, words):
    ax.set_yticks(rungs["rung"], words)
    ax.set_ylim(rungs["rung"].max() + 0.5, rungs["rung"].min() - 0.5)
    ax.grid(axis="y", visible=False)


def draw_times(rows, rungs):
    """A line for each language: the time of each rung."""
    divisor, unit_name = unit(rows["us"])

    def draw(canvas):
        ax, shown = canvas.subplots(), times(rows, divisor)
        for backend in style.backend_order(rows["backend"]):
            mine, look = shown[shown["backend"] == backend], style.backend(backend)
            looks = dict(color=look.color, marker=look.marker, label=look.label, linewidth=1)
            ax.errorbar(mine["us"], mine["rung"], xerr=spread(mine, "us", "us_p10", "us_p90"), **looks)
        _rung_axis(ax, rungs, [f"{r.rung:.0f}. {short(r.name, 17)}" for r in rungs.itertuples()])
        from_zero_or_log(ax.xaxis, shown["us"], shown["us_p90"])
        ax.set_xlabel(f"time of a call ({unit_name}), emulated")
        legend(canvas, [ax])

    return draw


def draw_gains(rows, rungs, gains):
    """A bar for each rung and language: how many times faster it is than the rung that it changes, from 1 on.
    A mark at the promise; on the right the share of the bandwidth that the rung reaches."""
    backends = style.backend_order(rows["backend"])
    high = 0.76 / len(backends)
    elsewhere = set(gains.loc[gains["at"] != "", "rung"])

    def draw(canvas):
        ax = canvas.subplots()
        ax.set_xscale("log")
        for i, backend in enumerate(backends):
            mine, look = gains[(gains["backend"] == backend) & gains["gain"].notna()], style.backend(backend)
            at = mine["rung"] + (i - (len(backends) - 1) / 2) * high
            ax.barh(at, mine["gain"] - 1, 0.9 * high, left=1, color=look.color, label=look.label)
        promised = [(r.rung, r.config.get("promised")) for r in gains.drop_duplicates("rung").itertuples()]
        promised = [(n, p) for n, p in promised if isinstance(p, (int, float)) and p > 1]
        if promised:
            ax.plot(
                [p for _, p in promised],
                [n for n, _ in promised],
                linestyle="none",
                marker="|",
                markersize=13,
                markeredgewidth=2,
                color=style.INK,
                label="promised",
            )
        ax.axvline(1, color=style.INK, linewidth=1)
        _rung_axis(
            ax,
            rungs,
            [f"{r.rung:.0f}. {short(r.name, 17)}" + "*" * (r.rung in elsewhere) for r in rungs.itertuples()],
        )
        plain_log(ax.xaxis)
        ax.set_xlabel("times as fast as the rung that it changes")
        said = ax.secondary_yaxis("right")
        said.set_yticks(
            rungs["rung"], [shares(rows, r.rung, backends) for r in rungs.itertuples()], fontsize=7.5
        )
        said.tick_params(length=0)
        said.spines["right"].set_visible(False)
        legend(canvas, [ax])

    return draw


def shares(rows, rung, backends):
    """ "95, 94 %": the share of the bandwidth that a rung reaches in each language; a dash where it is
    absent."""
    found = {r.backend: r.share for r in rows[rows["rung"] == rung].itertuples() if r.share == r.share}
    told = [f"{found[b]:.0f}" if b in found else "–" for b in backends]
    return f"{', '.join(told)} %" if found else ""


def told(step):
    """ ", 5.10 times as fast as rung 7 at batch 8" for a row of steps(); "" for the lowest rung."""
    changes = step.config.get("over") or step.rung - 1
    at = f" at {step.at}" if step.at else ""
    return f", {step.gain:.2f} times as fast as rung {changes:.0f}{at}" if step.gain == step.gain else ""


def elsewhere_words(gains):
    """Which rungs are judged at which other sizes."""
    found = gains[gains["at"] != ""].drop_duplicates("rung")
    said = [f"{r.rung:.0f} at {r.at}" for r in found.itertuples()]
    return f"* judged where it matters: rung {', '.join(said)}." if said else ""


def gain(rows, row):
    """How many times faster a rung is than the one that it changes, or the next below that which its language
    has; NaN for the lowest. rows: of one size."""
    changes = row.config.get("over") or row.rung - 1
    below = rows[(rows["backend"] == row.backend) & (rows["rung"] <= changes)]
    return below.loc[below["rung"].idxmax(), "us"] / row.us if len(below) else float("nan")


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


def shortfalls(run, gains, ladder):
    """Where a rung gained less than it promised, and why that can be. gains: of steps()."""
    if run.emulated:
        return "Emulated times say nothing of what a rung gains on a GPU."
    words = []
    for row in gains.itertuples():
        promised = row.config.get("promised", 1.0)
        if row.gain == row.gain and isinstance(promised, (int, float)) and row.gain < promised * (1 - SAME):
            why = row.note or next(
                (r.otherwise for r in RUNGS if (r.ladder, r.number) == (ladder, row.rung)), ""
            )
            words.append(
                f"{style.backend(row.backend).label} {row.rung:.0f}. {row.config.get('name', '')} gained "
                f"{row.gain:.2f}x where {promised:g}x was promised. {why}".strip()
            )
    return " ".join(words) or "Every rung gained what it promised."
