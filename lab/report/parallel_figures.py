"""What several GPUs pass to each other, and the tokens of models that they divide."""

import pandas as pd

from lab.report import style
from lab.report.figures import (
    AHEAD,
    Figure,
    amount,
    command,
    conditions,
    digits,
    legend,
    log_ticks,
    plain_log,
    table,
    times,
    token_unit,
)
from lab.report.sides import fastest, first_size, launched, side_look, with_side, words
from lab.report.tables import duration

ON_THE_LINK = 2.0  # bytes for each byte of a message: 32 bits of data travel with a tag of 32 bits
LINK = "direction bytes us gbps n"
TOKENS = "model backend plan ranks dtype weight_format batch context us tokens_per_s gbps"
EXCHANGE = "op backend shots ranks bytes us p10_us p90_us floor_us of_floor n"
TOKEN_MODELS, TOKEN_BARS = 4, 4  # of the picture of tokens: models, and of each our steps
HEADS = {
    "direction": "what",
    "bytes": "bytes",
    "ranks": "GPUs",
    "floor_us": "floor (us)",
    "of_floor": "of the floor (%)",
    "gbps": "GB/s",
}


def exchanges(run):
    """The op rows of calls between ranks, with the bytes of a rank's message, and what the link allows: the
    time of one word and, at its bandwidth, that of the bytes that reach a rank."""
    rows = run.between[run.between["us"].notna()].copy()
    shapes = list(rows["shape"])
    rows["ranks"] = [float(s["ranks"]) for s in shapes]
    rows["shots"] = [float(s.get("shots", 1)) for s in shapes]
    size = {"fp32": 4, "fp16": 2, "bf16": 2}
    rows["bytes"] = [float(s["n"] * size[dtype]) for s, dtype in zip(shapes, rows["dtype"])]
    word = run.links.loc[run.links["direction"] == "link word", "us"]
    peak = run.links.loc[run.links["direction"] == "link write", "gbps"].max()
    if len(word) and pd.notna(peak):
        rows["floor_us"] = word.iloc[0] + ON_THE_LINK * rows["bytes"] * (rows["ranks"] - 1) / peak / 1e3
        rows["of_floor"] = 100 * rows["floor_us"] / rows["us"]
    return rows


def exchange(run):
    """Time against bytes of the sum over ranks: our kernels, one shot and two, and their peers."""
    rows = exchanges(run)
    rows = rows[rows["op"] == "all_reduce_add"]
    if not len(rows):
        return None
    emulated = ", emulated" if run.emulated else ""
    drawn = rows[rows["backend"] != "torch_one_shot"]  # the slower of torch's two; the table has it

    def draw(canvas):
        ax = canvas.subplots()
        for (backend, shots), mine in drawn.groupby(["backend", "shots"], sort=False):
            look = style.backend(backend)
            mine = mine.sort_values("bytes")
            ax.plot(
                mine["bytes"],
                mine["us"],
                color=look.color,
                marker=look.marker,
                linestyle="--" if shots > 1 else "-",
                linewidth=1.5,
                label="" if shots > 1 else look.label,
            )
        if "floor_us" in rows:
            floor = rows.drop_duplicates("bytes").sort_values("bytes")
            ax.plot(
                floor["bytes"], floor["floor_us"], color=style.REST, linestyle=":", label="floor of the link"
            )
        plain_log(ax.yaxis)
        log_ticks(ax.xaxis, rows["bytes"])
        ax.set_xlabel("bytes of a rank's message")
        ax.set_ylabel("us" + emulated)
        legend(canvas, [ax])

    small = rows[(rows["bytes"] == rows["bytes"].min()) & (rows["shots"] == 1)]
    said = ", ".join(f"{style.backend(r.backend).label} {r.us:.3g} us" for r in small.itertuples())
    count = f"{rows['ranks'].iloc[0]:.0f}"
    return Figure(
        name="exchange",
        title=f"A sum over {count} GPUs, added to the residual",
        conditions=conditions(run, rows).replace("bars p10 to p90", "no spread drawn"),
        reading=f"At {amount(rows['bytes'].min())} bytes: {said}. Dashed: two shots. The peers only add up; "
        "they do not add to a residual. Dotted: a word's time on the link, and that of the bytes at its "
        "bandwidth.",
        alt="Lines of microseconds against the bytes of a message, for each backend and its peers.",
        table=table(rows, EXCHANGE, **HEADS),
        command=command("exchange", (), None, None, f"--tensor-parallel {count}"),
        height=2.3,
        draw=draw,
    )


def plain(rows):
    """Rows with a time, plain weights, a plain KV cache and no op of another backend."""
    usable = rows["us"].notna() & (rows["weight_format"] == "") & (rows["kv_dtype"] == "")
    return rows[usable & (rows["overrides"].map(len) == 0)]


def at_point(rows, dtype, batch, context):
    return rows[(rows["dtype"] == dtype) & (rows["batch"] == batch) & (rows["context"] == context)]


def point_of(run):
    """(dtype, batch, context) at which all tokens are compared, or None."""
    rows = plain(run.divided)
    for dtype in ("bf16", "fp16", "fp32"):
        mine = first_size(rows[rows["dtype"] == dtype])
        if len(mine):
            return dtype, mine["batch"].iloc[0], mine["context"].iloc[0]
    return None


def tokens_of(run, model):
    """Rows of a model's token at point_of(): the fastest step of one GPU, if measured, and those of several,
    our fastest and the best peer's, with the column `gpus`."""
    point = point_of(run)
    if point is None:
        return run.divided.head(0)
    rows = at_point(plain(run.divided[run.divided["model"] == model]), *point)
    if not len(rows):
        return rows
    rows = with_side(launched(rows)).sort_values("us", kind="stable")
    ours = rows[rows["side"] != "peer"].head(TOKEN_BARS)
    peers = rows[rows["side"] == "peer"].head(1)
    several = pd.concat([ours, peers]).sort_values("us")
    several = several.assign(gpus=several["ranks"].astype(float), tuning="")
    one = launched(at_point(plain(run.model[run.model["model"] == model]), *point))
    return pd.concat([fastest(one).head(1).assign(gpus=1.0), several]) if len(one) else several


def tokens(run):
    """Bars of a token's time for each model that several GPUs divide: one GPU, and several."""
    models = [m for m in dict.fromkeys(run.divided["model"]) if len(tokens_of(run, m))][:TOKEN_MODELS]
    if not models:
        return None
    found = {model: tokens_of(run, model) for model in models}
    rows = pd.concat(found.values())
    peak = run.best_ceiling("read")

    def draw(canvas):
        counts = [len(mine) + 1 for mine in found.values()]
        axes = canvas.subplots(len(models), 1, squeeze=False, height_ratios=counts)[:, 0]
        for ax, (model, mine) in zip(axes, found.items()):
            divisor, unit_name = token_unit(mine["us"])
            scaled = times(mine, divisor)
            at = range(len(mine))
            ax.barh(at, scaled["us"], color=[side_look(side).color for side in mine["side"]], height=0.66)
            for y, row in zip(at, scaled.itertuples()):
                ax.text(row.us, y, f"{AHEAD}{digits(row.us)}", va="center", weight="bold")
                floor = row.bytes / peak / 1e3 / divisor if peak else None
                if floor:
                    ax.vlines(floor, y - 0.42, y + 0.42, color=style.INK, linestyle=":", linewidth=1.4)
            ax.set_xlim(0, scaled["us"].max() * 1.13)
            ax.set_yticks(at, [_told(row) for row in mine.itertuples()])
            ax.set_ylim(len(mine) - 0.5, -0.6)
            ax.grid(axis="y", visible=False)
            ax.set_title(model, loc="left")
            ax.set_xlabel(f"{unit_name} a token" + (", emulated" if run.emulated else ""))

    several = rows[rows["gpus"] > 1]
    counts = [amount(count) for count in sorted(set(several["gpus"]))]
    dtype, batch, context = point_of(run)
    return Figure(
        name="several-gpus",
        title=f"One token on {' and '.join(counts)} GPUs, {dtype}, batch {amount(batch)}, "
        f"context {amount(context)}",
        conditions=conditions(run, several).replace("bars p10 to p90", "no spread drawn"),
        reading="For each model the fastest step of one GPU, if it fits, our fastest of several, and the "
        "best peer, which may be our kernels with sums by a library (NCCL)."
        + (" Dotted: the bytes of one GPU at the bandwidth that was measured." if peak else ""),
        alt="Bars: " + "; ".join(f"{r.model} {_told(r)} {duration(r.us)}" for r in rows.itertuples()),
        table=table(rows, TOKENS, **HEADS),
        command=command("model", models, several, None, f"--tensor-parallel {','.join(['1', *counts])}"),
        height=0.45 * len(models) + 0.22 * len(rows),
        draw=draw,
    )


def _told(row):
    return f"{words(row)}, {amount(row.gpus)} GPU" + ("s" if row.gpus > 1 else "")


def sentence(run):
    """What dividing the first model gains, or None."""
    models = list(dict.fromkeys(run.divided["model"]))
    rows = next((found for found in (tokens_of(run, m) for m in models) if len(found)), None)
    if rows is None:
        return None
    several = rows[rows["gpus"] == rows["gpus"].max()].sort_values("us")
    best = fastest(several)
    told = ", ".join(f"{duration(r.us)} with {words(r)}" for r in best.itertuples())
    count, model = amount(several["gpus"].iloc[0]), rows["model"].iloc[0]
    said = f"Divided among {count} GPUs a token of {model} takes {told}"
    alone = rows[rows["gpus"] == 1]
    if len(alone):
        said += f": {alone['us'].iloc[0] / several['us'].iloc[0]:.2f} times as fast as one GPU"
    return said + (", emulated." if run.emulated else ".")


def tables(run):
    """[(title, frame)]: the link, and a token of the models that several GPUs divide."""
    made = []
    if len(run.divided):
        rows = run.divided.assign(backend=[style.backend(name).label for name in run.divided["backend"]])
        made.append(("A token of models that several GPUs divide", table(rows, TOKENS, **HEADS)))
    if len(run.links):
        made.append(("The link between two GPUs", table(run.links, LINK, **HEADS)))
    return made
