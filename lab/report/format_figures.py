"""Pictures of weight formats: how much of the time that fewer bytes promise is gained, and what they cost in
accuracy. In all of them a language is a panel, and a format a colour and a marker."""

import numpy as np
import pandas as pd

from lab.report import style
from lab.report.figures import (
    Figure,
    amount,
    body_format,
    command,
    conditions,
    from_zero_or_log,
    grid_of,
    legend,
    line,
    log_ticks,
    names,
    plain_log,
    spread,
    table,
    times,
    token_unit,
    unit,
    with_share,
)
from lab.report.op_figures import dumbbells
from lab.report.ops import first_of, labelled
from lab.report.sides import fastest, first_size, launched, modes

DRAWN = 5  # formats of one picture, beside the ceiling: more cannot be told apart
LAYER = ("qkv", "o", "gate_up", "down")  # the products of a layer
SMALLEST = 1e-6  # nats: where a divergence of nothing is drawn on a log axis
COLUMNS = "case format backend batch us us_p10 us_p90 n bytes gbps share rms_error"
LANGUAGES = ("cuda", "triton")


def packed(run):
    """The rows of linear with packed weights, and those with plain ones at the same sizes: of one model,
    dtype, timer and cache state, with `format`; None without packed ones."""
    rows = run.packed[run.packed["op"] == "linear"]
    if not len(rows):
        return None
    for column, wishes in (
        ("timer", ("graph", "wall", "event")),
        ("dtype", ("bf16", "fp16", "fp32")),
        ("cache", ("cold", "in_model", "warm")),
    ):
        value = next((w for w in wishes if (rows[column] == w).any()), rows[column].iloc[0])
        rows = rows[rows[column] == value]
    model = rows["models"].map(lambda found: str(found[0]) if found else "").mode()[0]
    rows = rows[rows["models"].map(lambda found: not model or model in map(str, found)).astype(bool)]
    here, plain = rows.iloc[0], run.op
    for column in ("op", "timer", "dtype", "cache"):
        plain = plain[plain[column] == here[column]]
    sizes = {(str(shape), batch) for shape, batch in zip(rows["shape"], rows["batch"])}
    same = [(str(shape), batch) in sizes for shape, batch in zip(plain["shape"], plain["batch"])]
    both = pd.concat([plain[np.array(same, bool)], rows], ignore_index=True)
    both = both.assign(format=both["weight_format"].where(both["weight_format"] != "", both["dtype"]))
    return with_share(labelled(both)).assign(model=model)


def looks(run, formats):
    """{format: its look} of the formats that a picture shows. A format looks the same in all pictures of a
    run; plain weights, which are named by their dtype, are grey."""
    recorded = [*run.packed["weight_format"], *run.accuracy["weight_format"]]
    every = {body_format(name) for name in recorded}
    order = sorted(every) + [name for name in formats if name not in every]
    markers, found = "osD^vP", {}
    for name in drawn(formats):
        i = order.index(name)
        marker = markers[(i + i // len(markers)) % len(markers)]
        found[name] = style.Look(name, style.OTHERS[i % len(style.OTHERS)], marker)
        if name in ("bf16", "fp16", "fp32"):
            found[name] = style.Look(name, style.MUTED, "X")
    return found


def drawn(formats):
    """DRAWN of the formats, the first and the last among them."""
    if len(formats) <= DRAWN:
        return list(formats)
    return [formats[i] for i in np.linspace(0, len(formats) - 1, DRAWN).round().astype(int)]


def formats_of(rows):
    """Names of the formats of rows, the one with the most bytes first."""
    return list(rows.groupby("format")["bytes"].max().sort_values(ascending=False, kind="stable").index)


def left_words(formats):
    left = [name for name in formats if name not in drawn(formats)]
    return f" Not drawn, but in the table: {', '.join(left)}." if left else ""


def languages_of(rows):
    """Backends that have a panel: CUDA and Triton, or whatever there is."""
    found = style.backend_order(rows["backend"])
    return [name for name in found if name in LANGUAGES] or found[:2]


def products(run):
    """Time of each product against its bytes by format, a panel for each language, with the ceiling."""
    rows = packed(run)
    if rows is None:
        return None
    rows = rows[(rows["batch"] == rows["batch"].min()) & ~rows["suspect"]]
    if not len(rows):
        return None
    panels, formats = languages_of(rows), formats_of(rows)
    rows = rows[rows["backend"].isin(panels) | ~rows["backend"].isin(LANGUAGES)]
    shown = rows[rows["backend"].isin(panels)]
    ceiling = None if run.emulated else run.best_ceiling("read")
    divisor, unit_name = unit(shown["us"])

    def draw(canvas):
        axes = grid_of(canvas, len(panels), "bytes of a call (MB)", sharey=True, sharex=True)
        for ax, name in zip(axes, panels):
            mine = times(shown[shown["backend"] == name], divisor)
            for format, look in looks(run, formats).items():
                here = mine[mine["format"] == format]
                ax.errorbar(
                    here["bytes"] / 1e6,
                    here["us"],
                    yerr=spread(here, "us", "us_p10", "us_p90"),
                    linestyle="none",
                    color=look.color,
                    marker=look.marker,
                    label=look.label,
                )
            if ceiling:
                ends = np.array([shown["bytes"].min() / 1.3, shown["bytes"].max() * 1.3])
                floor = ends / ceiling / 1e3 / divisor
                ax.plot(ends / 1e6, floor, color=style.INK, linewidth=1.2, linestyle=":", label="ceiling")
            plain_log(ax.xaxis)
            plain_log(ax.yaxis)
            ax.set_title(style.backend(name).label, loc="left")
        axes[0].set_ylabel(f"{unit_name} a call" + (", emulated" if run.emulated else ""))
        legend(canvas, axes)

    return Figure(
        name="formats-products",
        title=f"linear: time against bytes by weight format, batch {amount(rows['batch'].iloc[0])}"
        f"{_of(rows)}",
        conditions=conditions(run, shown, shown["timer"].iloc[0]),
        reading="One mark for each product of the model. "
        + ("The dotted line is the time that the bytes take at the measured bandwidth. " if ceiling else "")
        + "Bytes are those of the codes and scales, of x and of y."
        + left_words(formats),
        alt=f"Marks of {', '.join(drawn(formats))}: time of linear against its bytes, for {names(panels)}.",
        table=table(rows.sort_values(["case", "bytes"]), COLUMNS, **HEADS),
        command=_again(rows, formats),
        height=2.5,
        draw=draw,
    )


def shares(run):
    """Share of the ceiling of each product and format at the smallest batch; None for emulated runs."""
    rows = packed(run)
    if rows is None or run.emulated:
        return None
    rows = rows[(rows["batch"] == rows["batch"].min()) & ~rows["suspect"] & rows["share"].notna()]
    if not len(rows):
        return None
    cases = rows["case"].str.removeprefix("linear ").str.partition(" n=")[0]
    rows = rows.assign(use=cases, case=cases + " " + rows["format"])
    by_size = {name: i for i, name in enumerate(formats_of(rows))}
    uses = list(dict.fromkeys(rows["use"]))
    ordered = sorted(zip(rows["use"], rows["format"]), key=lambda of: (uses.index(of[0]), by_size[of[1]]))
    order, left = first_of(list(dict.fromkeys(f"{use} {name}" for use, name in ordered)))

    def draw(canvas):
        ax = canvas.subplots()
        dumbbells(ax, rows, order, "share", "share_low", "share_high")
        ax.set_xlim(0, max(106, rows["share"].max() + 3))
        ax.axvline(100, color=style.INK, linewidth=1, linestyle=":")
        ax.set_xlabel("share of the measured bandwidth (%)")
        legend(canvas, [ax])

    return Figure(
        name="formats-shares",
        title=f"linear: share of the bandwidth by weight format, batch {amount(rows['batch'].iloc[0])}"
        f"{_of(rows)}",
        conditions=conditions(run, rows, rows["timer"].iloc[0]),
        reading="Fewer bytes leave a kernel less time to hide anything, so its share falls as its time does."
        + left,
        alt="Dots on one line for each product and format: share of the bandwidth of "
        f"{names(rows['backend'])}.",
        table=table(rows, COLUMNS, **HEADS),
        command=_again(rows, list(by_size)),
        height=0.75 + 0.21 * len(order),
        draw=draw,
    )


def layer(run):
    """Time of the products of a layer together against the batch, a line for each format."""
    rows = packed(run)
    if rows is None:
        return None
    rows = rows[rows["role"].isin(LAYER) & ~rows["suspect"]]
    keys = ["backend", "format", "batch"]
    sums = rows.groupby(keys, as_index=False).agg(
        us=("us", "sum"),
        us_p10=("us_p10", "sum"),
        us_p90=("us_p90", "sum"),
        n=("n", "min"),
        bytes=("bytes", "sum"),
        count=("role", "nunique"),
    )
    sums = sums[(sums["count"] == len(LAYER)) & sums["backend"].isin(languages_of(rows))]
    if sums["batch"].nunique() < 2:
        return None
    panels, formats = languages_of(sums), formats_of(sums)
    divisor, unit_name = unit(sums["us"])

    def draw(canvas):
        axes = grid_of(canvas, len(panels), "batch (sequences)", sharey=True)
        for ax, name in zip(axes, panels):
            mine = times(sums[sums["backend"] == name], divisor)
            for format, look in looks(run, formats).items():
                here = mine[mine["format"] == format]
                line(ax, here, "batch", "us", "us_p10", "us_p90", look, look.label)
            log_ticks(ax.xaxis, sums["batch"])
            from_zero_or_log(ax.yaxis, sums["us"] / divisor, sums["us_p90"] / divisor)
            ax.set_title(style.backend(name).label, loc="left")
        axes[0].set_ylabel(f"{unit_name} a layer" + (", emulated" if run.emulated else ""))
        legend(canvas, axes)

    return Figure(
        name="formats-layer",
        title=f"The four products of a layer together, by weight format{_of(rows)}",
        conditions=conditions(run, rows, rows["timer"].iloc[0]),
        reading="The times of qkv, o, gate and up, and down, added; lower is better." + left_words(formats),
        alt=f"Lines of {', '.join(drawn(formats))}: time of the products of a layer against the batch, for "
        f"{names(panels)}.",
        table=table(sums, "backend format batch us us_p10 us_p90 n bytes", **HEADS),
        command=_again(rows, formats),
        height=2.3,
        draw=draw,
    )


def accuracy(run, model):
    """Divergence of a model's distributions against the time of a token, or where it was not timed, against
    the bytes of the weights that a token reads."""
    rows = run.accuracy[(run.accuracy["model"] == model) & run.accuracy["kl"].notna()]
    if not len(rows):
        return None
    rows = rows.assign(format=[body_format(name) for name in rows["weight_format"]])
    rows = rows.sort_values("bytes", ascending=False, kind="stable")
    if rows["format"].duplicated().any():  # with several formats of the output head
        rows = rows.assign(format=rows["weight_format"])
    plain, timed = _timed(run, rows)
    formats = list(rows["format"])
    asked = ",".join(dict.fromkeys(body_format(name) for name in formats))
    panels = languages_of(timed) if len(timed) else [None]
    divisor, unit_name = token_unit(timed["us"]) if len(timed) else (1e6, "MB")
    before = rows["bytes_before"].iloc[0]
    widest = pd.concat([plain["us"], timed["us"]]).max() if len(timed) else max(before, rows["bytes"].max())

    def draw(canvas):
        label = f"{unit_name} a token" if len(timed) else "MB of weights that a token reads"
        axes = grid_of(canvas, len(panels), label, sharey=True, sharex=True)
        for ax, name in zip(axes, panels):
            for format, look in looks(run, formats).items():
                here = timed[timed["backend"] == name] if name else rows.assign(us=rows["bytes"])
                here = here[here["format"] == format]
                at = here["kl"].clip(lower=SMALLEST)
                ax.plot(
                    here["us"] / divisor, at, look.marker, color=look.color, label=look.label, markersize=6.5
                )
            without = plain.loc[plain["backend"] == name, "us"].min() if name else before
            if without == without:
                dtype = rows["dtype"].iloc[0]
                ax.axvline(without / divisor, color=style.INK, linewidth=1.2, linestyle=":", label=dtype)
            plain_log(ax.yaxis)
            ax.set_ylim(max(rows["kl"].min(), SMALLEST) / 1.6, max(rows["kl"].max(), SMALLEST) * 1.6)
            ax.set_xlim(0, 1.08 * widest / divisor)
            if name:
                ax.set_title(style.backend(name).label, loc="left")
        axes[0].set_ylabel("KL divergence (nats)")
        legend(canvas, axes)

    first = rows.iloc[0]
    shown = pd.concat([plain, timed]) if len(timed) else rows.assign(n=np.nan, us_p10=np.nan, us_p90=np.nan)
    said = conditions(run, shown, modes(timed) if len(timed) else "")
    if not len(timed):
        said = said.replace("n not recorded · p10 and p90 not recorded for all", "n 1, no spread")
    stored = f" (its file stores them as {first['stored']})" if first["stored"] else ""
    return Figure(
        name=f"{model}-accuracy",
        title=f"{model}: what a weight format costs in accuracy, and what it gains",
        conditions=f"{said} · text {first['text']!r}, {amount(first['tokens'])} tokens",
        reading="Lower and further left is better. How far the distribution of the next token moves from "
        f"that of the weights that were not rounded{stored}, on average over a fixed text. The dotted line "
        f"is the token with those weights in {first['dtype']}." + left_words(formats),
        alt=f"Marks of {', '.join(drawn(formats))}: mean KL divergence against "
        + ("the time of a token." if len(timed) else "bytes a token reads."),
        table=_accuracy_table(rows, timed),
        command=command("accuracy", [model], None, None, f"--weight-format {asked}"),
        height=2.4,
        draw=draw,
    )


def _timed(run, rows):
    """(rows of tokens with plain weights, those in the formats of accuracy rows with their `format` and
    `kl`): the fastest of each backend at the smallest size."""
    found = run.model[(run.model["preset"] == rows["model"].iloc[0]) & ~run.model["emulated"]]
    found = found[found["dtype"] == rows["dtype"].iloc[0]]
    if not len(found):
        return found, found.assign(format=[], kl=[])
    found = fastest(launched(first_size(found)), ["weight_format"])
    found = found[found["side"] != "peer"]
    known = rows.set_index("weight_format")
    timed = found[found["weight_format"].isin(known.index)]
    return found[found["weight_format"] == ""], timed.assign(
        format=timed["weight_format"].map(known["format"]), kl=timed["weight_format"].map(known["kl"])
    )


def _accuracy_table(rows, timed):
    listed = rows.assign(top1=100 * rows["top1"], bytes=rows["bytes"] / 1e6)
    for name in dict.fromkeys(timed["backend"]):
        mine = timed[timed["backend"] == name].set_index("weight_format")["us"]
        listed[f"{style.backend(name).label} (us a token)"] = listed["weight_format"].map(mine)
    uses = list(dict.fromkeys(use for found in rows["products"] for use in found))
    for use in uses:
        listed[f"error of {use} (%)"] = [100 * found.get(use, np.nan) for found in rows["products"]]
    columns = [c for c in listed if c.endswith("a token)")] + [f"error of {use} (%)" for use in uses]
    shown = listed[["weight_format", "bytes", "kl", "top1", *columns]]
    return shown.rename(
        columns={
            "weight_format": "weights",
            "bytes": "MB a token reads",
            "kl": "KL divergence (nats)",
            "top1": "same best token (%)",
        }
    )


def errors(run):
    """(caption, frame) of the error of each product by format in per cent, or None."""
    rows = run.packed[run.packed["rms_error"].notna()]
    if not len(rows):
        return None
    rows = rows.assign(
        case=[f"{r.op} {r.role}".strip() for r in rows.itertuples()], error=100 * rows["rms_error"]
    )
    found = rows.pivot_table(index="case", columns="weight_format", values="error", aggfunc="max", sort=False)
    frame = found.reset_index().rename(columns={"case": "op"})
    caption = (
        "Error of each product's result against that with the weights before they were rounded to a format, "
        "of random numbers: RMS in per cent, the largest of all sizes and backends"
    )
    return caption, frame


HEADS = {"format": "weights", "rms_error": "error (RMS)"}


def _of(rows):
    model = rows["model"].iloc[0]
    return f", {model}" if model else ""


def _again(rows, formats):
    plain = set(rows["dtype"])
    chosen = ",".join("none" if name in plain else name for name in formats)
    return command("ops", ["linear"], rows, rows["model"].iloc[0] or None, f"--weight-format {chosen}")
