"""Pictures of a run as a whole: the ceiling, the model's latency, throughput and memory, and the account of a token."""
import numpy as np
import pandas as pd

from lab.report import style
from lab.report.figures import (Figure, amount, command, conditions, dots, from_zero_or_log, legend, line, log_ticks, names, plain_log,
                                short, spread, times, unit, with_share)

DIRECTIONS = {"read": ("o", "-"), "copy": ("s", "--"), "write": ("^", ":")}


def ceiling(run):
    """Bandwidth of a plain stream against its size: the denominator of every share."""
    rows = run.ceiling[run.ceiling["gbps"].notna() & (run.ceiling["bytes"] > 0)]
    if not len(rows):
        return None
    rows = rows.loc[rows.groupby(["direction", "bytes"])["gbps"].idxmax()]
    rows = rows.assign(low=rows["bytes"] / rows["us_p90"] / 1e3, high=rows["bytes"] / rows["us_p10"] / 1e3)
    groups = sorted(rows.groupby("direction"), key=lambda g: list(DIRECTIONS).index(g[0]) if g[0] in DIRECTIONS else 9)

    def draw(canvas, theme):
        ax = canvas.subplots()
        for i, (direction, group) in enumerate(groups):
            marker, dash = DIRECTIONS.get(direction, ("D", "-."))
            group = group.sort_values("bytes")
            ax.errorbar(group["bytes"], group["gbps"], yerr=spread(group, "gbps", "low", "high"), marker=marker, linestyle=dash,
                        color=[theme.ink, theme.muted, style.PARTS[6], style.PARTS[4]][i % 4], label=direction)
        log_ticks(ax.xaxis, rows["bytes"])
        ax.set_ylim(0, rows["gbps"].max() * 1.08)
        ax.set_xlabel("bytes streamed")
        ax.set_ylabel("GB/s")
        legend(canvas, [ax])

    return Figure(
        "ceiling", "The ceiling: bandwidth of a plain stream on this card", conditions(run, rows),
        "Best launch shape of each direction and size. The highest point is 100% in every other picture; a short stream "
        "cannot reach it, which bounds small kernels too.",
        f"Lines of GB/s against stream size for {', '.join(rows['direction'].unique())}; best {rows['gbps'].max():,.0f} GB/s.",
        rows[["direction", "bytes", "backend", "gbps", "us", "us_p10", "us_p90", "n"]].rename(
            columns={"gbps": "GB/s", "us": "median (us)", "us_p10": "p10 (us)", "us_p90": "p90 (us)"}), command("ops", ["embedding"]), 2.6, draw)


def models(run):
    """Model names, in the order of the records."""
    return list(dict.fromkeys([*run.model["model"], *run.ledger["model"]]))


def series(run, model):
    """The rows of one model without overrides, in its main dtype, with one name per line to draw."""
    rows = run.model[(run.model["model"] == model) & (run.model["overrides"].map(len) == 0)]
    if not len(rows):
        return rows.assign(series=[])
    dtype = next((d for d in ("bf16", "fp16", "fp32") if (rows["dtype"] == d).any()), rows["dtype"].iloc[0])
    rows = rows[rows["dtype"] == dtype]
    several = [c for c in ("plan", "mode") if rows.loc[rows[c] != "-", c].nunique() > 1]
    return rows.assign(series=[" ".join([style.backend(r.backend).label] + [getattr(r, c) for c in several if getattr(r, c)
                                                                            not in ("-", "")]) for r in rows.itertuples()])


def _lines(rows):
    """(name, rows, look, line style) of every line, in the backends' order: fused plans dashed, eager steps dotted."""
    for backend in style.backend_order(rows["backend"]):
        for name, group in rows[rows["backend"] == backend].groupby("series", sort=False):
            mode, plan = group["mode"].iloc[0], group["plan"].iloc[0]
            look = style.backend("compile" if mode == "compile" and backend == "torch" else backend)
            yield name, group, look, ":" if mode == "eager" and rows["mode"].nunique() > 1 else "--" if plan == "fused" else "-"


def against(run, model, x):
    """Latency of a step and share of the ceiling against context (at the smallest batch) or batch (at the middle context)."""
    rows = series(run, model)
    other = "batch" if x == "context" else "context"
    if not len(rows) or rows[x].nunique() < 2:
        return None
    values = sorted(rows[other].unique())
    fixed = values[0] if x == "context" else max(values, key=lambda v: ((rows[other] == v).sum(), -v))
    rows = with_share(rows[rows[other] == fixed])
    if rows[x].nunique() < 2:
        return None
    rows = rows.assign(ms=rows["us"] / 1e3, ms_low=rows["us_p10"] / 1e3, ms_high=rows["us_p90"] / 1e3)
    bandwidth = rows[~rows["suspect"] & rows["share"].notna()]
    panels = 1 if run.emulated or not len(bandwidth) else 2

    def draw(canvas, theme):
        axes = canvas.subplots(panels, 1, sharex=True, squeeze=False).ravel()
        for name, group, look, dash in _lines(rows):
            line(axes[0], group, x, "ms", "ms_low", "ms_high", look, name, dash)
        from_zero_or_log(axes[0].yaxis, rows["ms"], rows["ms_high"])
        axes[0].set_ylabel("ms per step" + (", emulated" if run.emulated else ""))
        if panels == 2:
            for name, group, look, dash in _lines(bandwidth):
                line(axes[1], group, x, "share", "share_low", "share_high", look, name, dash)
            axes[1].set_ylim(0, 108)
            axes[1].axhline(100, color=theme.ink, linewidth=1, linestyle=":")
            axes[1].set_ylabel("of the ceiling (%)")
        log_ticks(axes[-1].xaxis, rows[x])
        axes[-1].set_xlabel("context (tokens)" if x == "context" else "batch (sequences)")
        legend(canvas, axes)

    text = f"batch {amount(fixed)}" if other == "batch" else f"context {amount(fixed)}"
    flagged = " Flagged rows are missing from the lower panel." if panels == 2 and len(bandwidth) < len(rows) else ""
    return Figure(
        f"{model}-latency-{x}", f"{model}: latency of a decode step against {x}, {text}",
        conditions(run, rows, _modes(rows)),
        "A step makes one token for every sequence of the batch. " + ("" if panels == 1 else
        "Below: bytes that a step must read (weights and KV) over its time, as share of the measured ceiling.") + flagged,
        f"Lines of {names(rows['backend'])}: milliseconds per step" + (" and share of the ceiling" if panels == 2 else "")
        + f" against {x}, from {amount(rows[x].min())} to {amount(rows[x].max())}.",
        _model_table(rows), command("model", [model], rows), 0.8 + 1.55 * panels, draw)


def latency(run, model):
    """Latency of a decode step for models measured at one batch and one context: one row for every kind of step."""
    rows = series(run, model)
    if not len(rows):
        return None
    rows = rows[(rows["batch"] == rows["batch"].iloc[0]) & (rows["context"] == rows["context"].iloc[0])]
    divisor, unit_name = unit(rows["us"])
    order, scaled = list(dict.fromkeys(rows.sort_values("us")["series"])), times(rows, divisor)

    def draw(canvas, theme):
        ax = canvas.subplots()
        dots(ax, scaled, "series", order, "us", "us_p10", "us_p90", theme)
        from_zero_or_log(ax.xaxis, scaled["us"], scaled["us_p90"])
        ax.set_xlabel(f"{unit_name} per step" + (", emulated" if run.emulated else ""))

    first = rows.iloc[0]
    return Figure(
        f"{model}-latency", f"{model}: latency of a decode step, batch {amount(first['batch'])} @{amount(first['context'])}",
        conditions(run, rows, _modes(rows)), "A step makes one token for every sequence of the batch; further left is faster.",
        f"Dot plot: time of a decode step of {model} for {names(rows['backend'])}.", _model_table(rows),
        command("model", [model], rows), 0.6 + 0.36 * len(order), draw)


def _modes(rows):
    return ", ".join(m for m in dict.fromkeys(rows["mode"]) if m)


def _model_table(rows):
    columns = {"series": "backend", "batch": "batch", "context": "context (tokens)", "us": "median (us)", "us_p10": "p10 (us)",
               "us_p90": "p90 (us)", "us_p99": "p99 (us)", "n": "n", "tokens_per_s": "tokens/s", "ttft_ms": "first token (ms)",
               "gbps": "GB/s", "share": "of ceiling (%)", "linearity": "linearity", "flag": "flag"}
    out = with_share(rows)[list(columns)].replace({"flag": {"": None}})
    return out.dropna(axis="columns", how="all").rename(columns=columns)


def throughput(run, model):
    """Tokens per second against batch, with the line of perfect scaling from each line's first point."""
    rows = series(run, model)
    if not len(rows) or rows["batch"].nunique() < 2:
        return None
    contexts = sorted(rows["context"].unique())
    fixed = max(contexts, key=lambda v: ((rows["context"] == v).sum(), -v))
    rows = rows[rows["context"] == fixed]
    rows = rows.assign(tokens=rows["batch"] / rows["us"] * 1e6, low=rows["batch"] / rows["us_p90"] * 1e6,
                       high=rows["batch"] / rows["us_p10"] * 1e6)
    first = rows.sort_values("batch").groupby("series")[["batch", "tokens"]].first()
    base = rows["series"].map(first["tokens"] / first["batch"])
    rows = rows.assign(linearity=rows["tokens"] / (rows["batch"] * base))

    def draw(canvas, theme):
        ax = canvas.subplots()
        top = rows["batch"].max()
        best = (first["tokens"] / first["batch"]).max()
        x = np.array([rows["batch"].min(), top])
        for name, group, look, dash in _lines(rows):
            line(ax, group, "batch", "tokens", "low", "high", look, name, dash)
        ax.plot(x, best * x, color=theme.muted, linewidth=1, linestyle="-.", label="ideal")
        ends = rows[rows["batch"] == top].sort_values("tokens")
        at = -np.inf
        for row in ends.itertuples():        # labels at the right end, pushed apart in the axis' log scale
            y = max(np.log10(row.tokens), at + np.log10(max(best * top / rows["tokens"].min(), 2)) * 0.07)
            ax.annotate(f"{row.linearity:.0%}", (top, row.tokens), xytext=(top * 1.16, 10 ** y), fontsize=7.5, va="center",
                        color=theme.ink, arrowprops={"arrowstyle": "-", "color": theme.muted, "linewidth": 0.5})
            at = y
        plain_log(ax.yaxis)
        log_ticks(ax.xaxis, rows["batch"])
        ax.set_xlim(right=top * 1.7)
        ax.set_xlabel("batch (sequences)")
        ax.set_ylabel("tokens / s" + (", emulated" if run.emulated else ""))
        legend(canvas, [ax])

    return Figure(
        f"{model}-throughput", f"{model}: throughput against batch, context {amount(fixed)}",
        conditions(run, rows, _modes(rows)),
        "The dash-dotted line is perfect scaling from the best first point. The figure at the end of each line is its linearity: "
        "its throughput over that of perfect scaling from its own smallest batch.",
        f"Lines of tokens per second of {names(rows['backend'])} against batch, with the ideal line.",
        _model_table(rows), command("model", [model], rows), 2.9, draw)


def memory(run, model):
    """What the GPU memory holds: weights, KV cache, workspace; the peak as a mark."""
    rows = series(run, model)
    rows = rows[rows[["weight_bytes", "kv_bytes"]].notna().all(axis=1)]
    if not len(rows):
        return None
    backend = next((b for b in ("cuda", "triton") if (rows["backend"] == b).any()), rows["backend"].iloc[0])
    rows = rows[rows["backend"] == backend]
    rows = rows[rows["series"] == rows["series"].iloc[0]].sort_values(["batch", "context"]).drop_duplicates(["batch", "context"])
    rows = rows.iloc[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 9)).astype(int))]
    parts = {"weights": "weight_bytes", "KV cache": "kv_bytes", "workspace": "workspace_bytes"}
    gib = rows[[*parts.values(), "steady_bytes", "peak_bytes"]] / 2 ** 30

    def draw(canvas, theme):
        ax = canvas.subplots()
        left = np.zeros(len(rows))
        for i, (name, column) in enumerate(parts.items()):
            width = gib[column].fillna(0).to_numpy()
            ax.barh(range(len(rows)), width, left=left, color=[style.PARTS[0], style.PARTS[1], style.PARTS[5]][i], label=name,
                    height=0.68, hatch=["", "", "///"][i], edgecolor=theme.page, linewidth=0.6)
            left += width
        if gib["peak_bytes"].notna().any():
            ax.plot(gib["peak_bytes"], range(len(rows)), linestyle="none", marker="|", markersize=12, markeredgewidth=2,
                    color=theme.ink, label="peak")
        ax.set_yticks(range(len(rows)), [f"batch {amount(r.batch)} @{amount(r.context)}" for r in rows.itertuples()])
        ax.invert_yaxis()
        ax.set_xlim(0, max(np.nanmax(gib["peak_bytes"].fillna(0)), left.max()) * 1.06)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("GiB")
        legend(canvas, [ax])

    shown = rows.assign(**{c + "_gib": gib[c] for c in gib})
    return Figure(
        f"{model}-memory", f"{model}: what the memory holds ({style.backend(backend).label})", conditions(run, rows, _modes(rows))
        .replace("bars p10 to p90", "allocated bytes, no spread"),
        "Allocated between steps; the mark is the highest allocation, prefill and graph capture included. The KV cache is what was "
        "allocated for it; the table gives the share of its pages that held tokens.",
        f"Stacked bars of GiB by batch and context: weights, KV cache, workspace; peak {np.nanmax(gib.fillna(0).to_numpy()):.2f} GiB.",
        shown[["batch", "context", "weight_bytes_gib", "kv_bytes_gib", "workspace_bytes_gib", "steady_bytes_gib",
               "peak_bytes_gib", "page_utilisation"]].rename(columns={
                   "context": "context (tokens)", "weight_bytes_gib": "weights (GiB)", "kv_bytes_gib": "KV (GiB)",
                   "workspace_bytes_gib": "workspace (GiB)", "steady_bytes_gib": "steady (GiB)", "peak_bytes_gib": "peak (GiB)",
                   "page_utilisation": "KV pages in use"}), command("model", [model], rows), 0.9 + 0.3 * len(rows), draw)


# The ledger of a token

def _accounts(run, model):
    """The ledger rows of one model at its first batch and context, with the name of the bar that each belongs to."""
    rows = run.ledger[run.ledger["model"] == model]
    if not len(rows):
        return rows
    first = rows.iloc[0]
    rows = rows[(rows["batch"] == first["batch"]) & (rows["context"] == first["context"]) & (rows["dtype"] == first["dtype"])]
    several = rows["plan"].nunique() > 1
    return rows.assign(bar=[style.backend(r.backend).label + (f" {r.plan}" if several and r.plan else "")
                            for r in rows.itertuples()])


def ledger(run, model):
    """Where the time of one token goes: one stacked bar per backend, by op, with gaps and what is unexplained."""
    rows = _accounts(run, model)
    rows = rows[rows["row"] != "swap"] if len(rows) else rows
    if not len(rows):
        return None
    part = rows["op"].where(rows["op"] != "", rows["kernel"])
    rows = rows.assign(part=part.where(~rows["row"].isin(["gap", "unexplained", "total"]),
                                       rows["row"].map({"gap": "launch gaps"}).fillna(rows["row"])))
    pieces = rows[rows["row"] != "total"]
    bars = list(dict.fromkeys(rows.sort_values("backend", key=lambda c: c.map(style.backend_order(c).index))["bar"]))
    divisor, unit_name = unit(rows["us"])
    sums = pieces.groupby(["bar", "part"], sort=False)["us"].sum() / divisor
    kernels = [p for p in dict.fromkeys(pieces["part"]) if p not in ("launch gaps", "unexplained")]
    kernels.sort(key=lambda p: style.PART_ORDER.index(p) if p in style.PART_ORDER else len(style.PART_ORDER))
    colors = style.part_colors(kernels)
    totals = times(rows[rows["row"] == "total"], divisor)
    total = totals.groupby("bar")["us"].first()

    def draw(canvas, theme):
        ax = canvas.subplots()
        widest = max([*sums.clip(lower=0).groupby("bar").sum(), *total])
        for y, bar in enumerate(bars):
            left = 0.0
            for name in [*kernels, "launch gaps", "unexplained"]:
                us = float(sums.get((bar, name), 0.0))
                if us <= 0:
                    continue
                idle = name in ("launch gaps", "unexplained")
                ax.barh(y, us, left=left, height=0.6, color=theme.grid if idle else colors[name], edgecolor=theme.page,
                        linewidth=0.5, hatch={"launch gaps": "....", "unexplained": "xxxx"}.get(name, ""),
                        label=name if y == next(i for i, b in enumerate(bars) if sums.get((b, name), 0) > 0) else None)
                if us > 0.09 * widest:
                    light = not idle and _dark(colors[name])
                    ax.text(left + us / 2, y, f"{us / sums[bar].sum():.0%}", ha="center", va="center", fontsize=7.5,
                            color="#ffffff" if light else theme.ink if idle else "#1b1f23")
                left += us
            if bar in total:
                ax.plot([total[bar]] * 2, [y - 0.36, y + 0.36], color=theme.ink, linewidth=2,
                        label="token, replayed" if bar == next(b for b in bars if b in total) else None)
                mine = totals[totals["bar"] == bar].iloc[:1]
                ax.errorbar(mine["us"], [y], xerr=spread(mine, "us", "us_p10", "us_p90"), color=theme.ink, linestyle="none")
        ax.set_yticks(range(len(bars)), bars)
        ax.set_ylim(len(bars) - 0.5, -0.5)
        ax.set_xlim(0, widest * 1.04)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(f"{unit_name} of one decode step" + (", emulated" if run.emulated else ""))
        legend(canvas, [ax], 3)

    first = rows.iloc[0]
    off = [f"{bar}: the rows add up to {sums[bar].sum() / total[bar]:.1%} of the replayed token" for bar in bars
           if bar in total and bar in sums.index.get_level_values(0)]
    lead = [f"{bar}: {sums[bar].idxmax()} takes {sums[bar].max() / sums[bar].sum():.0%}" for bar in bars
            if bar in sums.index.get_level_values(0)]
    shown = with_share(rows).assign(of_token=100 * rows["of_token"])
    columns = {"bar": "backend", "part": "op", "role": "use", "kernel": "kernel", "calls": "calls", "us": "us", "us_p10": "p10 (us)",
               "us_p90": "p90 (us)", "n": "n", "bytes": "bytes", "gbps": "GB/s", "share": "of ceiling (%)", "of_token": "of token (%)",
               "flag": "flag"}
    shown = shown[[c for c in columns if c in shown]].replace({c: {"": None} for c in ("kernel", "role", "flag") if c in shown}).dropna(axis="columns", how="all").rename(columns=columns)
    return Figure(
        f"{model}-ledger", f"{model}: where one token goes, batch {amount(first['batch'])} @{amount(first['context'])}",
        conditions(run, rows, first["timer"]), "; ".join(lead) + ". " + "; ".join(off) + (". " if off else "") +
        "The black mark is the whole token as replayed; gaps are the time between kernels.",
        f"Stacked bars, one per backend, of microseconds by op. {'; '.join(lead)}.", shown, command("ledger", [model], rows.iloc[:1]),
        1.15 + 0.5 * len(bars), draw)


def _dark(color):
    r, g, b = (int(color[i:i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.299 * r + 0.587 * g + 0.114 * b < 0.55


def swap(run, model, start="triton", end="cuda"):
    """From the all-Triton token to the all-CUDA one: what swapping each op alone gains, and what is left over."""
    rows = _accounts(run, model)
    if not len(rows) or not (rows["row"] == "swap").any():
        return None
    divisor, unit_name = unit(rows["us"])
    rows = times(rows, divisor)
    digits = 0 if unit_name == "us" else 2
    swaps = rows[rows["row"] == "swap"]
    whole = {}
    for backend in (start, end):
        mine = pd.concat([swaps[(swaps["backend"] == backend) & (swaps["op"] == "")],
                          rows[(rows["row"] == "total") & (rows["backend"] == backend)]])
        if len(mine):
            whole[backend] = mine.iloc[:1]
    alone = swaps[(swaps["backend"] == start) & (swaps["op"] != "")]
    if start not in whole or not len(alone):
        return None
    base = float(whole[start]["us"].iloc[0])
    gains = pd.Series((alone["us"] - base).to_numpy(), index=alone["op"]).sort_values()
    alone = alone.set_index("op").loc[gains.index].reset_index()
    steps = [("all " + style.backend(start).label, None, base, whole[start])]
    level = base
    for (op, gain), (_, row) in zip(gains.items(), alone.iterrows()):
        steps.append((op, (level, gain), row["us"], alone[alone["op"] == op]))
        level += gain
    if end in whole:
        final = float(whole[end]["us"].iloc[0])
        steps.append(("together, not alone", (level, final - level), None, None))
        steps.append(("all " + style.backend(end).label, None, final, whole[end]))
    look = {True: style.backend(end), False: style.backend(start)}

    def draw(canvas, theme):
        ax = canvas.subplots()
        ends = [base, *(_end(s[3], s[2]) for s in steps if s[1] is None), *(s[1][0] + s[1][1] for s in steps if s[1])]
        low = min(ends)
        for y, (name, move, us, row) in enumerate(steps):
            if move is None:
                ax.barh(y, us, height=0.62, color=look["CUDA" in name if end == "cuda" else False].color)
                ax.errorbar([us], [y], xerr=spread(row, "us", "us_p10", "us_p90"), color=theme.ink)
                ax.text(_end(row, us), y, f"  {us:,.{digits}f}", va="center", fontsize=7.5)
                continue
            start_at, gain = move
            together = row is None
            ax.barh(y, gain, left=start_at, height=0.62, color=theme.muted if together else look[gain < 0].color,
                    hatch="////" if together else "", edgecolor=theme.page, linewidth=0.5)
            if not together:
                ax.errorbar([start_at + gain], [y], xerr=spread(row, "us", "us_p10", "us_p90"), color=theme.ink)
            ax.plot([start_at, start_at], [y - 0.7, y + 0.31], color=theme.muted, linewidth=0.7)
            ax.text(max(start_at, start_at + gain, start_at + gain + (0 if together else _end(row, us) - us)), y,
                    f"  {gain:+,.{digits + 1}f}", va="center", fontsize=7.5)
        span = max(base, max(ends)) - low
        left = max(0.0, low - 1.2 * span) if span < 0.5 * base else 0.0
        ax.set_xlim(left, max(base, max(ends)) + 0.16 * (max(base, max(ends)) - left))
        ax.set_yticks(range(len(steps)), [short(s[0]) for s in steps])
        ax.set_ylim(len(steps) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(f"{unit_name} of one decode step" + (", emulated" if run.emulated else "") + ("" if left == 0 else "; axis does not begin at 0"))

    biggest = gains.index[gains.abs().argmax()]
    words = f"Swapping {biggest} alone changes the token by {gains[biggest]:+,.{digits + 1}f} {unit_name} of {base:,.{digits}f}."
    return Figure(
        f"{model}-swap", f"{model}: from all {style.backend(start).label} to all {style.backend(end).label}, op by op",
        conditions(run, alone, alone["timer"].iloc[0]),
        words + f" Each step is one op swapped alone, measured as a whole token; in {style.backend(end).label}'s colour where the swap "
        f"gains, in {style.backend(start).label}'s where it loses. 'Together' is what the swaps gain only in company.",
        f"Waterfall from all {style.backend(start).label} to all {style.backend(end).label}. {words}",
        pd.DataFrame([{"step": s[0], f"change ({unit_name})": s[1][1] if s[1] else None, f"token ({unit_name})": s[2],
                       f"p10 ({unit_name})": s[3]["us_p10"].iloc[0] if s[3] is not None else None,
                       f"p90 ({unit_name})": s[3]["us_p90"].iloc[0] if s[3] is not None else None} for s in steps]),
        command("ledger", [model], alone.iloc[:1], None, "--swap"), 0.75 + 0.3 * len(steps), draw)


def _end(row, us):
    """Where the upper error bar of a row ends."""
    high = float(row["us_p90"].iloc[0])
    return high if high == high else us


def of_model(run, model):
    """The pictures of one model's section."""
    curves = [m for m in (against(run, model, "context"), against(run, model, "batch")) if m] or [latency(run, model)]
    made = [*curves, throughput(run, model), memory(run, model), ledger(run, model), swap(run, model)]
    return [m for m in made if m]
