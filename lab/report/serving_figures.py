"""The picture of many sequences in one queue: tokens per second against the rows of the batch."""

from lab.report import style
from lab.report.figures import Figure, amount, command, conditions, legend, log_ticks, names, plain_log, table

COLUMNS = (
    "backend plan batch weight_format kv_dtype tokens_per_s ideal_tokens_per_s ideal us after_prefill_us "
    "graph_us more used prefills context sequences tokens paused n"
)
HEADS = {
    "tokens_per_s": "tokens / s",
    "ideal_tokens_per_s": "ideal tokens / s",
    "ideal": "of the ideal (%)",
    "us": "step in the queue (us)",
    "after_prefill_us": "after a prefill (us)",
    "graph_us": "its graph alone (us)",
    "more": "more than its graph (%)",
    "used": "rows used (%)",
    "prefills": "time of prefills (%)",
    "context": "mean context",
}


def throughput(run, model):
    """What the sequences of one model got, the ideal, and what they would get without prefills. Of a backend
    with several plans or formats the best at each batch is drawn; the table has all."""
    rows = run.serving[run.serving["model"] == model]
    rows = rows[rows[["tokens_per_s", "graph_us"]].notna().all(axis=1)].sort_values(["backend", "batch"])
    if not len(rows):
        return None
    rows = rows.assign(
        ideal=100 * rows["of_ideal"],
        more=100 * (rows["of_graph"] - 1),
        used=100 * rows["rows_used"],
        prefills=100 * rows["prefill_share"],
        stepping=rows["tokens_per_s"] / (1 - rows["prefill_share"]).clip(lower=1e-3),
    )
    best = rows.loc[rows.groupby(["backend", "batch"])["tokens_per_s"].idxmax()]
    lines = (
        ("tokens_per_s", "-", ""),
        ("stepping", ":", " without prefills"),
        ("ideal_tokens_per_s", "-.", " ideal"),
    )

    def draw(canvas):
        ax = canvas.subplots()
        for backend in style.backend_order(best["backend"]):
            mine, look = best[best["backend"] == backend], style.backend(backend)
            for column, dashes, what in lines:
                ax.plot(
                    mine["batch"],
                    mine[column],
                    linestyle=dashes,
                    linewidth=1.2 if what else 1.8,
                    marker="" if what else look.marker,
                    color=look.color,
                    label=look.label + what,
                )
        plain_log(ax.yaxis)
        log_ticks(ax.xaxis, best["batch"])
        ax.set_xlabel("rows of the batch")
        ax.set_ylabel("tokens / s" + (", emulated" if run.emulated else ""))
        legend(canvas, [ax])

    lengths = ", ".join(dict.fromkeys(rows["lengths"]))
    scale = "" if (rows["scale"] == 1).all() else f", times {rows['scale'].iloc[0]:.3g}"
    last = best[best["batch"] == best["batch"].max()]
    said = "; ".join(
        f"{style.backend(r.backend).label} {r.ideal:.0f}% of the ideal, a step {r.more:+.1f}% on its graph"
        for r in last.itertuples()
    )
    words = conditions(run, rows, f"lengths {lengths}{scale}")
    return Figure(
        name=f"{model}-serving",
        title=f"{model}: many sequences in one queue",
        conditions=words.replace("bars p10 to p90", "no spread drawn"),
        reading="Sequences take turns in the rows; their lengths are drawn. Dash-dotted: all rows always "
        "full and each step as long as its graph alone; dotted: as measured, without the time of prefills. "
        f"At {amount(best['batch'].max())} rows: {said}.",
        alt=f"Lines of tokens per second of {names(best['backend'])} against the rows of the batch: "
        "measured, without prefills, and ideal.",
        table=table(rows, COLUMNS, **HEADS),
        command=command("serving", [model], rows.drop(columns="context")),
        height=2.3,
        draw=draw,
    )
