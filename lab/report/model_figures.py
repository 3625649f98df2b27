"""Pictures of one model: latency, throughput and memory."""

import numpy as np
import pandas as pd

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
    table,
    times,
    token_unit,
)
from lab.report.sides import (
    SIDES,
    fastest,
    launched,
    measurements,
    modes,
    plans_of,
    series,
    side_look,
    with_side,
)

HELD = (
    ("weights", "weight_bytes", "#5f55c4"),
    ("KV cache", "kv_bytes", "#88ccee"),
    ("workspace", "workspace_bytes", "#ddcc77"),
)


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

    how = "launched one by one" if eager else modes(rows)
    return Figure(
        name=f"{model}-{'eager' if eager else 'latency'}",
        title=f"{model}: time of a decode step" + (", kernels launched one by one" if eager else ""),
        conditions=conditions(run, drawn, how),
        reading="A step makes one token for each sequence of the batch; lower is better. The fastest plan is "
        "chosen at each point.",
        alt=f"Lines of the best CUDA, the best Triton and the best peer: time of a step of {model} against "
        f"{' and '.join(x for x, _ in panels)}.",
        table=measurements(drawn),
        command=command("model", [model], drawn),
        css="eager" if eager else "graph",
        height=2.3,
        draw=draw,
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
        conditions=conditions(run, rows, modes(rows)),
        reading="A step makes one token for every sequence of the batch; further left is faster.",
        alt=f"Dot plot: time of a decode step of {model} for {names(rows['backend'])}.",
        table=measurements(rows),
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
        conditions=conditions(run, rows, modes(rows)),
        reading="The dash-dotted line is perfect scaling from the best first point. Of its own perfect "
        f"scaling remains at batch {amount(rows['batch'].max())}: {kept}.",
        alt=f"Lines of tokens per second of {names(rows['backend'])} against batch, with the ideal line.",
        table=measurements(rows),
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
        for name, column, color in HELD:
            width = gib[column].fillna(0).to_numpy()
            ax.barh(
                range(len(rows)),
                width,
                left=left,
                color=color,
                label=name,
                height=0.68,
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
        conditions=conditions(run, rows, modes(rows)).replace(
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


def _fixed(rows, column):
    """The value of a column at which the most rows were measured; the smallest of several such."""
    return max(sorted(rows[column].unique()), key=lambda v: ((rows[column] == v).sum(), -v))
