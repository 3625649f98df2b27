"""Pictures of a run as a whole: the ceiling, and a model's latency, throughput and memory."""

import numpy as np
import pandas as pd

from lab.report import style
from lab.report.figures import (
    AHEAD,
    Figure,
    amount,
    command,
    conditions,
    digits,
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
    token_unit,
)

SIDES = ("cuda", "triton", "peer")  # peer: the fastest of the other backends
BARS = 5  # of our steps in the first picture
BARS_MODELS = 8  # of the picture of all models
MODES = {  # how a step was launched: in words
    "graph": "one CUDA graph a step",
    "eager": "kernels launched one by one",
    "compile": "torch.compile",
}
DIRECTIONS = {"read": ("o", "-"), "copy": ("s", "--"), "write": ("^", ":")}
HELD = (
    ("weights", "weight_bytes", "#5f55c4", ""),
    ("KV cache", "kv_bytes", "#88ccee", ""),
    ("workspace", "workspace_bytes", "#ddcc77", "///"),
)
COLUMNS = (
    "series tuning batch context us us_p10 us_p90 us_p99 n tokens_per_s ttft_ms gbps share linearity flag"
)


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


def models(run):
    """Model names, the one that holds the most bytes first."""
    names = list(dict.fromkeys([*run.model["model"], *run.ledger["model"]]))
    held = run.model.groupby("model")["weight_bytes"].max().fillna(0)
    return sorted(names, key=lambda name: -held.get(name, 0))


def series(run, model):
    """The rows of one model without overrides, in its main dtype; `series` names the line that each belongs
    to."""
    rows = run.model[(run.model["model"] == model) & (run.model["overrides"].map(len) == 0)]
    if not len(rows):
        return rows.assign(series=[])
    dtype = next((d for d in ("bf16", "fp16", "fp32") if (rows["dtype"] == d).any()), rows["dtype"].iloc[0])
    rows = rows[rows["dtype"] == dtype]
    several = [c for c in ("plan", "mode") if rows.loc[rows[c] != "-", c].nunique() > 1]
    told = [[style.backend(r.backend).label, *(getattr(r, c) for c in several)] for r in rows.itertuples()]
    return rows.assign(series=[" ".join(w for w in words if w not in ("", "-")) for words in told])


def model_table(rows):
    return table(rows, COLUMNS)


def launched(rows, eager=False):
    """The rows of steps that a graph replays, or of those launched one by one; all rows where there is one
    kind only. torch.compile counts as the first."""
    right = (rows["mode"] == "eager") == eager
    return rows[right] if right.any() else rows


def first_size(rows):
    """The rows of the smallest batch and, of those, of the smallest context."""
    rows = rows[rows["batch"] == rows["batch"].min()]
    return rows[rows["context"] == rows["context"].min()]


def with_side(rows):
    """Adds `side`: cuda, triton, or peer for every other backend."""
    return rows.assign(side=rows["backend"].where(rows["backend"].isin(["cuda", "triton"]), "peer"))


def fastest(rows, keys=()):
    """The fastest row of each side, or of each side and each value of the keys."""
    return with_side(rows).sort_values("us", kind="stable").drop_duplicates(["side", *keys])


def side_look(side):
    """Label, colour and marker of one of the three sides."""
    return style.backend(side) if side != "peer" else style.Look("best peer", style.MUTED, "D")


def words(row):
    """ "CUDA persistent", "torch.compile": what a row of series() ran."""
    if row.mode == "compile":
        return f"{style.backend(row.backend).label}.compile"
    return " ".join([style.backend(row.backend).label, *(w for w in (row.plan,) if w not in ("", "-"))])


def floor_of(rows):
    """The time in us that the bytes of these rows (of one size) take at the measured bandwidth, or None."""
    known = rows[rows["of_ceiling"].notna() & ~rows["suspect"]]
    return float((known["us"] * known["of_ceiling"]).median()) if len(known) else None


def main_model(run):
    """The model of which most is said first: the one that holds the most bytes of those that CUDA or Triton
    ran; None without model rows."""
    rows = run.model
    ours = rows[rows["backend"].isin(["cuda", "triton"])]
    rows = ours if len(ours) else rows
    held = rows.groupby("model", sort=False)["weight_bytes"].max().fillna(0)
    return None if not len(rows) else held.idxmax()


def headline(run):
    """Bars of the time of a token of the main model: our fastest steps and the best peer."""
    model = main_model(run)
    rows = launched(first_size(series(run, model))) if model else []
    if not len(rows):
        return None
    rows = with_side(rows).sort_values("us", kind="stable")
    peer, ours = rows[rows["side"] == "peer"].head(1), rows[rows["side"] != "peer"].head(BARS)
    shown, floor = pd.concat([ours, peer]).sort_values("us"), floor_of(rows)
    divisor, unit_name = token_unit(shown["us"])

    def draw(canvas):
        ax, scaled = canvas.subplots(), times(shown, divisor)
        colors = [side_look(side).color for side in shown["side"]]
        spreads = spread(scaled, "us", "us_p10", "us_p90")
        at = range(len(shown))
        ax.barh(at, scaled["us"], xerr=spreads, color=colors, height=0.66, ecolor=style.INK)
        for y, row in zip(at, scaled.itertuples()):
            end = row.us if row.us_p90 != row.us_p90 else row.us_p90
            ax.text(end, y, f"{AHEAD}{digits(row.us)}", va="center", weight="bold")
        if floor:
            look = dict(color=style.INK, linewidth=1.2, linestyle=":")
            ax.vlines(floor / divisor, -0.5, len(shown) - 0.5, **look)
            ax.text(
                floor / divisor,
                -0.6,
                f"floor {digits(floor / divisor)}",
                ha="center",
                va="bottom",
                fontsize=8,
            )
        ax.set_xlim(0, scaled["us"].max() * 1.13)
        ax.set_yticks(at, [words(row) for row in shown.itertuples()])
        ax.set_ylim(len(shown) - 0.5, -1.1)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(f"{unit_name} a token" + (", emulated" if run.emulated else ""))

    first = shown.iloc[0]
    at = f"batch {amount(first['batch'])}, context {amount(first['context'])}"
    floor_words = (
        " The dotted line is the floor: its weights and KV cache at the bandwidth that was measured."
        if floor
        else ""
    )
    return Figure(
        name="verdict",
        title=f"One token of {model}, {at}",
        conditions=conditions(run, shown, _modes(shown)),
        reading=f"The {len(ours)} fastest of our steps"
        + (" and the best peer." if len(peer) else ".")
        + floor_words,
        alt="Bars: "
        + "; ".join(f"{words(row)} {digits(row.us / divisor)} {unit_name}" for row in shown.itertuples())
        + (f"; floor {digits(floor / divisor)}" if floor else ""),
        table=model_table(shown),
        command=command("model", [model], shown),
        height=0.62 + 0.25 * len(shown),
        draw=draw,
    )


def overview(run):
    """Bars of every model's token: best CUDA, best Triton, best peer, with the bandwidth floor."""
    found = []
    for model in models(run):
        rows = series(run, model)
        if len(rows):
            rows = launched(first_size(rows))
            found.append(fastest(rows).assign(floor=floor_of(rows) or np.nan))
    if not found:
        return None
    rows = pd.concat(found)
    order = list(dict.fromkeys(rows["model"]))[:BARS_MODELS]
    rows = rows[rows["model"].isin(order)]
    divisor, unit_name = token_unit(rows["us"])
    sides = [s for s in SIDES if (rows["side"] == s).any()]

    def draw(canvas):
        ax, scaled = canvas.subplots(), times(rows, divisor)
        for i, side in enumerate(sides):
            mine, look = scaled[scaled["side"] == side], side_look(side)
            at = np.array([order.index(m) for m in mine["model"]]) + (i - (len(sides) - 1) / 2) * 0.27
            spreads = spread(mine, "us", "us_p10", "us_p90")
            ax.barh(
                at,
                mine["us"],
                xerr=spreads,
                height=0.25,
                color=look.color,
                label=look.label,
                ecolor=style.INK,
            )
            for y, row in zip(at, mine.itertuples()):
                said = f"{AHEAD}{digits(row.us)}" + (
                    f" {words(row)}" if side == "peer" else f" {row.plan}".rstrip("- ")
                )
                ax.text(max(row.us, row.us_p90), y, said, va="center", fontsize=7)
        floors = scaled.drop_duplicates("model")
        at = np.array([order.index(m) for m in floors["model"]])
        if floors["floor"].notna().any():
            ax.vlines(
                floors["floor"] / divisor,
                at - 0.42,
                at + 0.42,
                color=style.INK,
                linestyle=":",
                linewidth=1.4,
                label="bandwidth floor",
            )
        ax.set_yticks(range(len(order)), [short(m, 16) for m in order])
        ax.set_ylim(len(order) - 0.45, -0.55)
        ax.set_xlim(0, scaled["us"].max() * 1.3)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(f"{unit_name} a token" + (", emulated" if run.emulated else ""))
        legend(canvas, [ax])

    first = rows.iloc[0]
    return Figure(
        name="models",
        title="Time of a token, smallest batch and context",
        conditions=conditions(run, rows, _modes(rows)),
        reading=f"Smallest batch and context of each model ({amount(first['batch'])} and "
        f"{amount(first['context'])} tokens here). The dotted mark is the floor: the bytes of weights and KV "
        "cache over the measured bandwidth." * bool(rows["floor"].notna().any()),
        alt=f"Bars of the time of a token for {len(order)} models: best CUDA, best Triton and best peer.",
        table=table(
            rows,
            "model side backend plan mode tuning batch context us us_p10 us_p90 n floor share",
            floor="bandwidth floor (us)",
        ),
        command=command("model", order, rows),
        height=0.75 + 0.2 * len(sides) * len(order) * 1.15,
        draw=draw,
    )


def _modes(rows):
    return ", ".join(MODES.get(m, m) for m in dict.fromkeys(rows["mode"]) if m)


def _fixed(rows, column):
    """The value of a column at which the most rows were measured; the smallest of several such."""
    return max(sorted(rows[column].unique()), key=lambda v: ((rows[column] == v).sum(), -v))


def lines(run, model, eager=False):
    """Latency of a decode step against batch and against context: CUDA, Triton and the best peer.

    Drawn for the fastest plan at each point (class k0) and for each plan (k1, k2 ...); the page shows one."""
    rows = series(run, model)
    if not len(rows) or (eager and not ((rows["mode"] == "eager").any() and (rows["mode"] != "eager").any())):
        return None
    rows = with_side(launched(rows, eager))
    context, batch = _fixed(rows, "context"), rows["batch"].min()
    panels = [
        (x, found)
        for x, found in (
            ("batch", rows[rows["context"] == context]),
            ("context", rows[rows["batch"] == batch]),
        )
        if found[x].nunique() > 1
    ]
    if not panels:
        return None if eager else latency(run, model)
    drawn = pd.concat([found for _, found in panels])
    drawn = drawn[~drawn.index.duplicated()]
    divisor, unit_name = token_unit(drawn["us"])
    plans = ["best", *plans_of(rows)]

    def draw(canvas):
        axes = grid_of(canvas, len(panels), "", sharey=True)
        for ax, (x, found) in zip(axes, panels):
            for i, plan in enumerate(plans):
                mine = found if plan == "best" else found[found["plan"] == plan]
                mine = times(fastest(mine, [x]), divisor)
                for side in SIDES:
                    look = side_look(side)
                    label = look.label if plan == "best" else "_"
                    gid = f"class s k{i}"
                    line(ax, mine[mine["side"] == side], x, "us", "us_p10", "us_p90", look, label, gid)
            floor = floors(found, [x])
            draw_floor(ax, floor[x], floor["floor"] / divisor)
            log_ticks(ax.xaxis, found[x])
            fixed = f"context {amount(context)}" if x == "batch" else f"batch {amount(batch)}"
            ax.set_xlabel(f"{'batch' if x == 'batch' else 'context (tokens)'}, at {fixed}")
        plain_log(axes[0].yaxis)
        axes[0].set_ylabel(f"{unit_name} a step" + (", emulated" if run.emulated else ""))
        legend(canvas, axes)

    how = "launched one by one" if eager else _modes(rows)
    return Figure(
        name=f"{model}-{'eager' if eager else 'latency'}",
        title=f"{model}: time of a decode step" + (", kernels launched one by one" if eager else ""),
        conditions=conditions(run, drawn, how),
        reading="A step makes one token for each sequence of the batch; lower is better. The fastest plan is "
        "chosen at each point.",
        alt=f"Lines of the best CUDA, the best Triton and the best peer: time of a step of {model} against "
        f"{' and '.join(x for x, _ in panels)}.",
        table=model_table(drawn),
        command=command("model", [model], drawn),
        css="eager" if eager else "graph",
        height=2.3,
        draw=draw,
    )


def plans_of(rows):
    """The plans that CUDA or Triton ran, where there are several; in their order."""
    found = set(rows.loc[rows["backend"].isin(["cuda", "triton"]), "plan"]) - {"", "-"}
    return (
        sorted(found, key=lambda p: (style.PLANS.index(p) if p in style.PLANS else 9, p))
        if len(found) > 1
        else []
    )


def latency(run, model):
    """Latency of a decode step for models measured at one batch and one context: one row for every kind of
    step."""
    rows = series(run, model)
    if not len(rows):
        return None
    rows = rows[(rows["batch"] == rows["batch"].iloc[0]) & (rows["context"] == rows["context"].iloc[0])]
    divisor, unit_name = token_unit(rows["us"])
    order = list(dict.fromkeys(rows.sort_values("us")["series"]))

    def draw(canvas):
        ax, scaled = canvas.subplots(), times(rows, divisor)
        dots(ax, scaled, "series", order, "us", "us_p10", "us_p90")
        from_zero_or_log(ax.xaxis, scaled["us"], scaled["us_p90"])
        ax.set_xlabel(f"{unit_name} per step" + (", emulated" if run.emulated else ""))

    at = f"batch {amount(rows['batch'].iloc[0])} @{amount(rows['context'].iloc[0])}"
    return Figure(
        name=f"{model}-latency",
        title=f"{model}: latency of a decode step, {at}",
        conditions=conditions(run, rows, _modes(rows)),
        reading="A step makes one token for every sequence of the batch; further left is faster.",
        alt=f"Dot plot: time of a decode step of {model} for {names(rows['backend'])}.",
        table=model_table(rows),
        command=command("model", [model], rows),
        height=0.6 + 0.36 * len(order),
        draw=draw,
    )


def throughput(run, model):
    """Tokens per second against batch: the best of each side, with the line of perfect scaling."""
    rows = series(run, model)
    if not len(rows):
        return None
    fixed = _fixed(rows, "context")
    rows = launched(rows[rows["context"] == fixed])
    if rows["batch"].nunique() < 2:
        return None
    rows = fastest(rows, ["batch"])
    tokens = rows["batch"] * 1e6
    rows = rows.assign(
        tokens_per_s=tokens / rows["us"], low=tokens / rows["us_p90"], high=tokens / rows["us_p10"]
    )
    first = rows.sort_values("batch").groupby("side")[["batch", "tokens_per_s"]].first()
    per_sequence = first["tokens_per_s"] / first["batch"]
    rows = rows.assign(linearity=rows["tokens_per_s"] / (rows["batch"] * rows["side"].map(per_sequence)))

    def draw(canvas):
        ax = canvas.subplots()
        ends = np.array([rows["batch"].min(), rows["batch"].max()])
        for side in SIDES:
            mine, look = rows[rows["side"] == side], side_look(side)
            line(ax, mine, "batch", "tokens_per_s", "low", "high", look, look.label)
        ax.plot(
            ends, per_sequence.max() * ends, color=style.MUTED, linewidth=1, linestyle="-.", label="ideal"
        )
        plain_log(ax.yaxis)
        log_ticks(ax.xaxis, rows["batch"])
        ax.set_xlabel("batch (sequences)")
        ax.set_ylabel("tokens / s" + (", emulated" if run.emulated else ""))
        legend(canvas, [ax])

    last = rows[rows["batch"] == rows["batch"].max()]
    kept = ", ".join(f"{side_look(r.side).label} {r.linearity:.0%}" for r in last.itertuples())
    return Figure(
        name=f"{model}-throughput",
        title=f"{model}: throughput against batch, context {amount(fixed)}",
        conditions=conditions(run, rows, _modes(rows)),
        reading="The dash-dotted line is perfect scaling from the best first point. Of its own perfect "
        f"scaling remains at batch {amount(rows['batch'].max())}: {kept}.",
        alt=f"Lines of tokens per second of {names(rows['backend'])} against batch, with the ideal line.",
        table=model_table(rows),
        command=command("model", [model], rows),
        height=2.3,
        draw=draw,
    )


def memory(run, model):
    """What the memory holds: weights, KV cache, workspace; the peak as a mark. One backend: they hold the
    same."""
    rows = series(run, model)
    rows = rows[rows[["weight_bytes", "kv_bytes"]].notna().all(axis=1)]
    if not len(rows):
        return None
    backend = next((b for b in ("cuda", "triton") if (rows["backend"] == b).any()), rows["backend"].iloc[0])
    rows = rows[rows["backend"] == backend]
    rows = rows[rows["series"] == rows["series"].iloc[0]]
    rows = rows.sort_values(["batch", "context"]).drop_duplicates(["batch", "context"])
    rows = rows.iloc[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 9)).astype(int))]
    gib = {
        c: rows[c] / 2**30
        for c in ("weight_bytes", "kv_bytes", "workspace_bytes", "steady_bytes", "peak_bytes")
    }
    top = np.nanmax([*sum(gib[column].fillna(0) for _, column, *_ in HELD), *gib["peak_bytes"].fillna(0)])

    def draw(canvas):
        ax = canvas.subplots()
        left = np.zeros(len(rows))
        for name, column, color, hatch in HELD:
            width = gib[column].fillna(0).to_numpy()
            ax.barh(
                range(len(rows)),
                width,
                left=left,
                color=color,
                label=name,
                height=0.68,
                hatch=hatch,
                edgecolor=style.PAGE,
                linewidth=0.6,
            )
            left += width
        if gib["peak_bytes"].notna().any():
            ax.plot(
                gib["peak_bytes"],
                range(len(rows)),
                linestyle="none",
                marker="|",
                markersize=12,
                markeredgewidth=2,
                color=style.INK,
                label="peak",
            )
        ax.set_yticks(
            range(len(rows)), [f"batch {amount(r.batch)} @{amount(r.context)}" for r in rows.itertuples()]
        )
        ax.invert_yaxis()
        ax.set_xlim(0, top * 1.06)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("GiB")
        legend(canvas, [ax])

    return Figure(
        name=f"{model}-memory",
        title=f"{model}: what the memory holds ({style.backend(backend).label})",
        conditions=conditions(run, rows, _modes(rows)).replace(
            "bars p10 to p90", "allocated bytes, no spread"
        ),
        reading="Allocated between steps; the mark is the highest allocation, prefill and graph capture "
        "included. The "
        "KV cache is what was allocated for it; the table gives the share of its pages that held tokens.",
        alt=f"Stacked bars of GiB by batch and context: weights, KV cache, workspace; at most {top:.2f} GiB.",
        table=table(
            rows.assign(**gib),
            "batch context weight_bytes kv_bytes workspace_bytes steady_bytes peak_bytes page_utilisation",
            **{c: f"{c.removesuffix('_bytes')} (GiB)" for c in gib},
        ),
        command=command("model", [model], rows),
        height=0.9 + 0.3 * len(rows),
        draw=draw,
    )
