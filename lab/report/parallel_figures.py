"""What several GPUs pass to each other, and the tokens of models that they divide."""

import pandas as pd

from lab.report import style
from lab.report.figures import Figure, amount, command, conditions, legend, log_ticks, plain_log, table

ON_THE_LINK = 2.0  # bytes for each byte of a message: 32 bits of data travel with a tag of 32 bits
LINK = "direction bytes us gbps n"
TOKENS = "model backend plan ranks dtype weight_format batch context us tokens_per_s gbps"
EXCHANGE = "op backend shots ranks bytes us p10_us p90_us floor_us of_floor n"
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


def tables(run):
    """[(title, frame)]: the link, and a token of the models that several GPUs divide."""
    made = []
    if len(run.divided):
        rows = run.divided.assign(backend=[style.backend(name).label for name in run.divided["backend"]])
        made.append(("A token of models that several GPUs divide", table(rows, TOKENS, **HEADS)))
    if len(run.links):
        made.append(("The link between two GPUs", table(run.links, LINK, **HEADS)))
    return made
