"""Pictures of a run as a whole: the ceiling, and a model's latency, throughput and memory."""

import numpy as np

from lab.report import ledger_figures, style
from lab.report.figures import (
    Figure,
    amount,
    command,
    conditions,
    dots,
    from_zero_or_log,
    legend,
    line,
    log_ticks,
    names,
    plain_log,
    spread,
    table,
    times,
    unit,
    with_share,
)

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
    """Model names, in the order of the records."""
    return list(dict.fromkeys([*run.model["model"], *run.ledger["model"]]))


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


def _lines(rows):
    """(name, rows, look, (line style, markers)) of every line, in the backends' order: eager steps dotted,
    the others in their plan's style, and where there are several plans, with its markers."""
    several, plans = rows["mode"].nunique() > 1, rows["plan"].nunique() > 1
    for backend in style.backend_order(rows["backend"]):
        for name, group in rows[rows["backend"] == backend].groupby("series", sort=False):
            mode, plan = group["mode"].iloc[0], group["plan"].iloc[0]
            look = style.backend("compile" if mode == "compile" and backend == "torch" else backend)
            dash, markers = style.PLANS.get(plan, ("-", "full"))
            yield (
                name,
                group,
                look,
                (":" if several and mode == "eager" else dash, markers if plans else "full"),
            )


def _modes(rows):
    return ", ".join(m for m in dict.fromkeys(rows["mode"]) if m)


def _fixed(rows, column):
    """The value of a column at which the most rows were measured; the smallest of several such."""
    return max(sorted(rows[column].unique()), key=lambda v: ((rows[column] == v).sum(), -v))


def against(run, model, x):
    """Latency of a step and its share of the ceiling against context (smallest batch) or batch (one
    context)."""
    rows = series(run, model)
    if not len(rows):
        return None
    other = "batch" if x == "context" else "context"
    fixed = rows["batch"].min() if x == "context" else _fixed(rows, "context")
    rows = with_share(rows[rows[other] == fixed])
    if rows[x].nunique() < 2:
        return None
    divisor, unit_name = unit(rows["us"])
    scaled = times(rows, divisor)
    bandwidth = scaled[~rows["suspect"] & rows["share"].notna()]
    panels = 1 if run.emulated or not len(bandwidth) else 2

    def draw(canvas):
        axes = canvas.subplots(panels, 1, sharex=True, squeeze=False).ravel()
        for name, group, look, drawn in _lines(scaled):
            line(axes[0], group, x, "us", "us_p10", "us_p90", look, name, *drawn)
        from_zero_or_log(axes[0].yaxis, scaled["us"], scaled["us_p90"])
        axes[0].set_ylabel(f"{unit_name} per step" + (", emulated" if run.emulated else ""))
        if panels == 2:
            for name, group, look, drawn in _lines(bandwidth):
                line(axes[1], group, x, "share", "share_low", "share_high", look, name, *drawn)
            axes[1].set_ylim(0, 108)
            axes[1].axhline(100, color=style.INK, linewidth=1, linestyle=":")
            axes[1].set_ylabel("of the ceiling (%)")
        log_ticks(axes[-1].xaxis, rows[x])
        axes[-1].set_xlabel("context (tokens)" if x == "context" else "batch (sequences)")
        legend(canvas, axes)

    how = "A step makes one token for every sequence of the batch."
    if panels == 2:
        how += (
            " Below: the bytes that a step must read (weights and KV) over its time, as share of the ceiling."
        )
        how += " Flagged rows are missing from the lower panel." if len(bandwidth) < len(rows) else ""
    what = "time per step" + (" and share of the ceiling" if panels == 2 else "")
    return Figure(
        name=f"{model}-latency-{x}",
        title=f"{model}: latency of a decode step against {x}, {other} {amount(fixed)}",
        conditions=conditions(run, rows, _modes(rows)),
        reading=how,
        alt=f"Lines of {names(rows['backend'])}: {what} against {x} from {amount(rows[x].min())} to "
        f"{amount(rows[x].max())}.",
        table=model_table(rows),
        command=command("model", [model], rows),
        height=0.8 + 1.55 * panels,
        draw=draw,
    )


def latency(run, model):
    """Latency of a decode step for models measured at one batch and one context: one row for every kind of
    step."""
    rows = series(run, model)
    if not len(rows):
        return None
    rows = rows[(rows["batch"] == rows["batch"].iloc[0]) & (rows["context"] == rows["context"].iloc[0])]
    divisor, unit_name = unit(rows["us"])
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
    """Tokens per second against batch, with the line of perfect scaling."""
    rows = series(run, model)
    if not len(rows):
        return None
    fixed = _fixed(rows, "context")
    rows = rows[rows["context"] == fixed]
    if rows["batch"].nunique() < 2:
        return None
    tokens = rows["batch"] * 1e6
    rows = rows.assign(
        tokens_per_s=tokens / rows["us"], low=tokens / rows["us_p90"], high=tokens / rows["us_p10"]
    )
    first = rows.sort_values("batch").groupby("series")[["batch", "tokens_per_s"]].first()
    per_sequence = first["tokens_per_s"] / first["batch"]
    rows = rows.assign(linearity=rows["tokens_per_s"] / (rows["batch"] * rows["series"].map(per_sequence)))

    def draw(canvas):
        ax = canvas.subplots()
        low, top = rows["batch"].min(), rows["batch"].max()
        ideal = per_sequence.max()
        for name, group, look, drawn in _lines(rows):
            line(ax, group, "batch", "tokens_per_s", "low", "high", look, name, *drawn)
        ax.plot(
            [low, top],
            [ideal * low, ideal * top],
            color=style.MUTED,
            linewidth=1,
            linestyle="-.",
            label="ideal",
        )
        # The linearity at the right end of each line, pushed apart upwards; eager steps have theirs in the
        # table only.
        ends = rows[(rows["batch"] == top) & ((rows["mode"] != "eager") | (rows["mode"] == "eager").all())]
        at, step = -np.inf, 0.08 * np.log10(max(ideal * top / rows["tokens_per_s"].min(), 2))
        for row in ends.sort_values("tokens_per_s").itertuples():
            at = max(np.log10(row.tokens_per_s), at + step)
            ax.annotate(
                f"{row.linearity:.0%}",
                (top, row.tokens_per_s),
                xytext=(top * 1.16, 10**at),
                fontsize=7.5,
                va="center",
                arrowprops={"arrowstyle": "-", "color": style.MUTED, "linewidth": 0.5},
            )
        plain_log(ax.yaxis)
        ax.set_ylim(top=max(ax.get_ylim()[1], 10 ** (at + step)))
        log_ticks(ax.xaxis, rows["batch"])
        ax.set_xlim(right=top * 1.7)
        ax.set_xlabel("batch (sequences)")
        ax.set_ylabel("tokens / s" + (", emulated" if run.emulated else ""))
        legend(canvas, [ax])

    return Figure(
        name=f"{model}-throughput",
        title=f"{model}: throughput against batch, context {amount(fixed)}",
        conditions=conditions(run, rows, _modes(rows)),
        reading="The dash-dotted line is perfect scaling from the best first point. The figure at the end "
        "of a line is "
        "its linearity: its throughput over that of perfect scaling from its own smallest batch.",
        alt=f"Lines of tokens per second of {names(rows['backend'])} against batch, with the ideal line.",
        table=model_table(rows),
        command=command("model", [model], rows),
        height=2.9,
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


def of_model(run, model):
    """The pictures of one model's section."""
    curves = [m for m in (against(run, model, "context"), against(run, model, "batch")) if m]
    made = [
        *(curves or [latency(run, model)]),
        throughput(run, model),
        memory(run, model),
        ledger_figures.ledger(run, model),
        *ledger_figures.swaps(run, model),
    ]
    return [m for m in made if m]
