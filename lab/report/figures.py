"""What every picture has in common: its conditions, its table, its command, and how it is drawn.

Pictures are narrow, so that their text can be read on a phone. Error bars are p10 and p90 of the samples.
"""

import shlex
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure as Canvas

from lab.report import style, svg

WIDTH = 4.6  # inches
LEGEND = 0.17  # inches of a row of it
POINTS = 60  # of one line; the page says so under "How to read this page"


@dataclass
class Shown:
    """Something that shows measurements, and what stands around it."""

    name: str  # file name without ending; unique in a run
    title: str
    conditions: str  # device, dtype, cache, ceiling, n
    reading: str  # what it shows and how to read it
    alt: str
    table: pd.DataFrame
    command: str  # reproduces the records behind it
    more: str = field(default="", kw_only=True)  # said beside the table, not beside the picture
    css: str = field(default="", kw_only=True)  # classes by which the page hides it


@dataclass
class Figure(Shown):
    """A picture. `draw(canvas)` fills an empty matplotlib figure."""

    height: float  # inches; a legend of one row included
    draw: Callable
    width: float = WIDTH  # inches


@dataclass
class Cell:
    """What a grid says of one case at one batch."""

    words: str
    backend: str = ""  # whose colour it has; "" where nothing was decided
    strength: float = 1.0  # of that colour, 0 to 1
    note: str = ""


@dataclass
class Grid(Shown):
    """Cases down, batches across, as a table in the page's own text."""

    batches: list
    rows: list  # (group, case, [Cell, or None where nothing was measured])


def compose(figure, emulated=False):
    """The picture as a matplotlib figure; call it inside rc_context(style.rc())."""
    canvas = Canvas(figsize=(figure.width, figure.height))
    FigureCanvasAgg(canvas)  # measures text
    figure.draw(canvas)
    legend_rows = sum(-(-len(found.get_texts()) // found._ncols) for found in canvas.legends)
    height = figure.height + LEGEND * max(0, legend_rows - 1)
    canvas.set_size_inches(figure.width, height)
    # Without a rectangle matplotlib lays out once, with one twice.
    rect = (0, (LEGEND * legend_rows + 0.05) / height, 1, 1) if legend_rows else None
    canvas.tight_layout(pad=0.3, rect=rect)
    if emulated:
        for ax in canvas.axes:
            ax.text(
                0.5,
                0.5,
                "emulated",
                transform=ax.transAxes,
                ha="center",
                va="center",
                fontsize=26,
                color=style.MUTED,
                alpha=0.16,
                rotation=20,
                zorder=0,
            )
    return canvas


def drawn(figure, emulated=False):
    """The picture as an SVG tree of lab.report.svg."""
    with matplotlib.rc_context(style.rc()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a record may hold any character; the font draws a box
        return svg.draw(compose(figure, emulated))


# The words of a picture

HOW = {  # timer of a row: in words
    "graph": "device time inside one CUDA graph",
    "event": "launched one by one, the host included",
    "wall": "host clock",
}


def conditions(run, rows, *extra):
    """Device, dtype, weight formats, cache state, timer, ceiling and sample count of the rows a picture
    shows, one line."""
    words = [f"EMULATED on {run.device}: says nothing about a GPU" if run.emulated else run.device]
    for column in ("dtype", "cache"):
        if column in rows and len(rows):
            values = [v for v in dict.fromkeys(rows[column]) if v]
            what = " cache" if column == "cache" else ""
            words.append(
                ", ".join(v.replace("_", " ") for v in values) + what if values else f"{column} not recorded"
            )
    if "weight_format" in rows:
        words += [f"weights {v}" for v in dict.fromkeys(rows["weight_format"]) if v]
    if "kv_dtype" in rows:
        words += [f"KV cache {v}" for v in dict.fromkeys(rows["kv_dtype"]) if v]
    words += [HOW.get(e, e) for e in extra if e]
    words += filter(None, [untuned_words(rows)])
    if not run.emulated:
        words.append(ceiling_words(run))
    counts = rows["n"].dropna() if "n" in rows else pd.Series(dtype=float)
    if len(counts):
        low, high = int(counts.min()), int(counts.max())
        words.append(f"n {low}" if low == high else f"n {low} to {high}")
    else:
        words.append("n not recorded")
    timed = rows[rows["n"].notna()] if "n" in rows else rows
    spread = {"us_p10", "us_p90"} <= set(rows) and timed[["us_p10", "us_p90"]].notna().all(axis=None)
    words.append("bars p10 to p90" if spread and len(timed) else "p10 and p90 not recorded for all")
    return " · ".join(words)


def untuned_words(rows):
    """ "untuned: Triton decode_attention" for the rows of a picture (frames of lab.report.load), "" where all
    are tuned."""
    if "tuning" not in rows:
        return ""
    found = rows[rows["tuning"] != ""]
    which = [
        f"{style.backend(r.backend).label} {getattr(r, 'op', '') or r.tuning.partition(': ')[2]}"
        for r in found.itertuples()
    ]
    return f"untuned: {', '.join(dict.fromkeys(which))}" if which else ""


def ceiling_words(run):
    """The denominators of all shares: ops that read are held to the read ceiling, ops that copy to the copy
    ceiling."""
    best = {direction: run.best_ceiling(direction) for direction in dict.fromkeys(run.ceiling["direction"])}
    words = ", ".join(
        f"{direction} {best[direction]:,.0f}" for direction in ("read", "copy") if best.get(direction)
    )
    return f"ceiling of this run {words} GB/s" if words else "no ceiling measured"


def command(what, ops=(), rows=None, model=None, *flags):
    """The command line that measures these rows again and draws them: `lab bench WHAT NAMES ... && lab report
    ...`."""
    if rows is not None and "preset" in rows and len(rows):  # of models, whose names say their formats, too
        ops, flags = dict.fromkeys(rows["preset"]), (*_format_flags(rows), *flags)
    words = ["lab bench", what, *map(shlex.quote, ops)]
    if model:
        words += ["--model", shlex.quote(model)]
    for option in ("dtype", "batch", "context"):
        values = pd.Series(dtype=object) if rows is None or option not in rows else rows[option].dropna()
        values = values.mode()[:1] if option == "dtype" else sorted(set(values))
        if len(values):
            words += [
                f"--{option}",
                shlex.quote(",".join(v if isinstance(v, str) else f"{v:.0f}" for v in values)),
            ]
    return " ".join([*words, *flags, "--out out/again && lab report out/again"])


def body_format(name):
    """Of "int4-g128, lm_head int8" what stands before the output head's format."""
    return name.partition(", lm_head")[0]


def _format_flags(rows):
    """The options for the formats of weights that were rounded for the run, and of the KV cache."""
    rounded = rows[rows["weights"] == "random"] if "weights" in rows else rows
    formats = list(dict.fromkeys(body_format(name) or "none" for name in rounded["weight_format"]))
    if formats and formats != ["none"]:
        yield f"--weight-format {','.join(formats)}"
    caches = set(rows["kv_dtype"])
    if len(caches) == 1 and caches != {""}:
        yield f"--kv-dtype {caches.pop()}"


def names(backends):
    labels = [style.backend(b).label for b in style.backend_order(backends)]
    return " and ".join(filter(None, [", ".join(labels[:-1]), labels[-1] if labels else ""]))


def amount(value):
    """1024 -> 1k, 1048576 -> 1M; other numbers as they are."""
    value = float(value)
    for size, unit in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "k")):
        if value >= size and value % size == 0:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def unit(us):
    """(divisor, name) of the unit in which times of this many microseconds read best."""
    top = np.nanmax(np.asarray(us, float))
    return (1e6, "s") if top >= 2e6 else (1e3, "ms") if top >= 2e4 else (1.0, "us")


def token_unit(us):
    """As `unit` for times of whole steps, which are told in ms from 1 ms on."""
    return (1e3, "ms") if 1e3 <= np.nanmax(np.asarray(us, float)) < 2e6 else unit(us)


def digits(value):
    """A number in three significant digits: 5.01, 12.3, 415, 4,321."""
    return f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


AHEAD = "\u2002"  # before a label at the end of a bar: SVG drops plain spaces there


def times(rows, divisor):
    """us, us_p10 and us_p90 divided by a unit's divisor."""
    return rows.assign(**{c: rows[c] / divisor for c in ("us", "us_p10", "us_p90")})


def short(text, width=34):
    text = str(text)
    return text if len(text) <= width else text[: width - 1] + "…"


HEADS = {  # column of a frame: head of a table
    "case": "op",
    "series": "backend",
    "bar": "backend",
    "part": "op",
    "role": "use",
    "context": "context (tokens)",
    "us": "median (us)",
    "us_p10": "p10 (us)",
    "us_p90": "p90 (us)",
    "us_p99": "p99 (us)",
    "gbps": "GB/s",
    "share": "of ceiling (%)",
    "of_token": "of token (%)",
    "flops": "flop",
    "intensity": "flop/byte",
    "tflops": "Tflop/s",
    "tokens_per_s": "tokens/s",
    "ttft_ms": "first token, prefill by torch (ms)",
    "page_utilisation": "KV pages in use",
    "tuning": "settings",
}


def table(rows, columns, **heads):
    """The numbers behind a picture: these columns, as far as they hold anything, with units in their
    heads."""
    if "of_ceiling" in rows:
        rows = with_share(rows)
    shown = rows[[c for c in columns.split() if c in rows]]
    empty = [c for c in shown if shown[c].isna().all() or (shown[c] == "").all()]
    return shown.drop(columns=empty).rename(columns={**HEADS, **heads})


# The marks of a picture


def spread(rows, y, low, high):
    """Asymmetric error bars of y, zero where an end is absent."""
    down = np.nan_to_num((rows[y] - rows[low]).to_numpy(float)).clip(0)
    up = np.nan_to_num((rows[high] - rows[y]).to_numpy(float)).clip(0)
    return np.vstack([down, up])


def with_share(rows):
    """Adds share, share_low, share_high in per cent of the ceiling; the spread is that of the time."""
    share = 100 * rows["of_ceiling"]
    return rows.assign(
        share=share,
        share_low=share * rows["us"] / rows["us_p90"],
        share_high=share * rows["us"] / rows["us_p10"],
    )


def thinned(rows, most=POINTS):
    """At most so many of the rows, evenly chosen, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return rows.iloc[np.unique(np.linspace(0, len(rows) - 1, most).round().astype(int))]


def line(ax, rows, x, y, low, high, look, label, gid=None):
    """A line with its spread through at most POINTS of the rows. gid: of everything drawn."""
    rows = thinned(rows.dropna(subset=[x, y]).sort_values(x))
    if len(rows):
        drawn = ax.errorbar(
            rows[x],
            rows[y],
            yerr=spread(rows, y, low, high),
            color=look.color,
            marker=look.marker,
            label=label,
        )
        for artist in (drawn.lines[0], *drawn.lines[2]):
            artist.set_gid(gid)


def floors(rows, keys):
    """A row for each of the keys with `floor`, the time in us that the bytes take at the ceiling; rows that
    do not know it are left out."""
    known = rows[rows["of_ceiling"].notna() & ~rows["suspect"]]
    return (
        known.assign(floor=known["us"] * known["of_ceiling"]).groupby(keys, as_index=False)["floor"].median()
    )


def draw_floor(ax, x, floor):
    if len(floor):
        ax.plot(x, floor, color=style.INK, linewidth=1.2, linestyle=":", label="bandwidth floor")


def dots(ax, rows, column, order, x, low, high):
    """One row of the axis per value of `column`, top down in `order`; one mark with its spread per backend in
    each."""
    backends = style.backend_order(rows["backend"])
    place = {name: i for i, name in enumerate(order)}
    apart = 0.7 / len(backends) if rows[column].duplicated().any() else 0
    for i, name in enumerate(backends):
        mine, look = rows[rows["backend"] == name], style.backend(name)
        at = np.array([place[v] for v in mine[column]]) + (i - (len(backends) - 1) / 2) * apart
        ax.errorbar(
            mine[x],
            at,
            xerr=spread(mine, x, low, high),
            linestyle="none",
            color=look.color,
            marker=look.marker,
            label=look.label,
        )
    for i in range(0, len(order), 2):
        ax.axhspan(i - 0.5, i + 0.5, color=style.GRID, alpha=0.35, zorder=0, linewidth=0)
    ax.set_yticks(range(len(order)), [short(v) for v in order])
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def log_ticks(axis, values, base=2):
    """A log axis whose ticks are the measured values, as long as they do not collide."""
    ticks = sorted(set(float(v) for v in values if v > 0))
    set_scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    set_scale("log", base=base)
    if len(ticks) > 7:
        ticks = ticks[:: -(-len(ticks) // 7)]
    axis.set_ticks(ticks, [amount(t) for t in ticks])
    axis.set_ticks([], minor=True)
    if len(ticks) == 1:
        axis.axes.set(**{f"{axis.axis_name}lim": (ticks[0] / base, ticks[0] * base)})


def plain_log(axis):
    """A log axis labelled with plain numbers, a few per decade."""
    set_scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    set_scale("log")
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high < 300 * low else (1,)
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs, numticks=9))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:,.10g}"))


def from_zero_or_log(axis, values, ends):
    """A linear axis from zero, or a log axis where the values span more than a factor of eight.

    ends: upper ends of the error bars, which must fit as well.
    """
    if values.max() > 8 * values.min():
        plain_log(axis)
    else:
        (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(
            0, max(values.max(), ends.max()) * 1.08
        )


def legend(canvas, axes):
    """One legend under all axes, backends first, in as many columns as its longest label leaves room for."""
    found = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            bars = isinstance(handle, ErrorbarContainer) and handle.lines[0] is not None
            found.setdefault(label, handle.lines[0] if bars else handle)
    first = [look.label for look in style.BACKENDS.values()]
    order = sorted(found, key=lambda label: first.index(label) if label in first else len(first))
    if found:
        column = 0.68 + 0.068 * max(map(len, found))  # inches: handle and gap, and 8-point letters
        width = canvas.get_size_inches()[0]
        canvas.legend(
            [found[label] for label in order],
            order,
            loc="lower center",
            borderaxespad=0.2,
            handlelength=2.4,
            columnspacing=1.2,
            ncols=max(1, min(len(found), int(width / column))),
        )


def grid_of(canvas, count, xlabel, columns=2, **options):
    """`count` axes in rows of `columns`, as a flat list; the lowest of each column carries `xlabel`."""
    columns = min(columns, count)
    axes = list(canvas.subplots(-(-count // columns), columns, squeeze=False, **options).ravel())
    for ax in axes[count:]:
        ax.remove()
    for ax in axes[max(0, count - columns) : count]:
        ax.set_xlabel(xlabel)
    return axes[:count]
