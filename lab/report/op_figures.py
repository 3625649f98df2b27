"""Pictures of single ops: share of the ceiling, roofline, time against batch or context, who wins where."""
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from lab.harness import compare
from lab.report import style
from lab.report.figures import (Figure, amount, command, conditions, dots, from_zero_or_log, grid_of, legend, line, log_ticks, names, plain_log, short,
                                spread, times, unit, with_share)

AHEAD = {"faster": "ahead", "slower": "behind"}


@dataclass(frozen=True)
class Focus:
    """The rows that the overview shows: one dtype, one timer, one cache state, and the shapes of one model."""
    dtype: str
    timer: str
    cache: str
    model: str | None


def focus(run):
    """bf16, graph time and cold caches where the run has them; the largest model with the most rows. None: no rows."""
    rows = run.op
    if not len(rows):
        return None
    pick = lambda column, wishes: next((w for w in wishes if (rows[column] == w).any()), rows[column].mode()[0])
    timer = pick("timer", ("graph", "wall", "event"))
    rows = rows[rows["timer"] == timer]
    dtype = pick("dtype", ("bf16", "fp16", "fp32"))
    rows = rows[rows["dtype"] == dtype]
    cache = pick("cache", ("cold", "in_model", "warm"))
    sizes = {}
    for models, nbytes in zip(rows["models"], rows["bytes"]):
        for model in models:
            count, most = sizes.get(str(model), (0, 0))
            sizes[str(model)] = (count + 1, max(most, nbytes if nbytes == nbytes else 0))
    return Focus(dtype, timer, cache, max(sizes, key=sizes.get) if sizes else None)


def chosen(rows, f, cache=True):
    """The rows of a focus. An op that has none in its dtype (sample takes float32 logits) is shown in its own."""
    other = ~rows["op"].isin(rows.loc[rows["dtype"] == f.dtype, "op"])
    keep = ((rows["dtype"] == f.dtype) | other) & (rows["timer"] == f.timer)
    if cache:
        keep &= rows["cache"] == f.cache
    if f.model:
        keep &= rows["models"].map(lambda m: not m or f.model in map(str, m))
    return rows[keep]


def label_of(row, context=True):
    words = [row.op, row.role, row.plan if row.plan not in ("", "basic") else ""]
    if context and row.context == row.context:
        words.append(f"@{amount(row.context)}")
    return " ".join(w for w in words if w)


def labelled(rows, context=True):
    return rows.assign(case=[label_of(r, context) for r in rows.itertuples()] if len(rows) else [])


def table(rows, *columns):
    """The numbers behind a picture, with units in the heads."""
    heads = {"case": "op", "context": "context (tokens)", "us": "median (us)", "us_p10": "p10 (us)", "us_p90": "p90 (us)",
             "gbps": "GB/s", "share": "of ceiling (%)", "bytes": "bytes", "flops": "flop", "shape": "shape"}
    columns = columns or ("case", "backend", "batch", "context", "us", "us_p10", "us_p90", "n", "bytes", "gbps", "share")
    out = with_share(rows)[[c for c in columns if c in rows or c == "share"]]
    return out.dropna(axis="columns", how="all").rename(columns=heads)


def verdict(row, other):
    """faster | slower | same | ambiguous: `row` next to `other`; the harness's own word where it left one."""
    if row.verdict.get(other.backend) in ("faster", "slower", "same", "ambiguous"):
        return row.verdict[other.backend]
    filled = [pd.Series({k: None if v != v else v for k, v in r._asdict().items() if k.startswith("us") or k == "n"})
              for r in (other, row)]
    return compare.verdict(*filled)


def pairs(rows, a, b, by):
    """(key, row of a, row of b) wherever both backends have a row; suspects take no part."""
    rows = rows[~rows["suspect"]]
    for key, group in rows.groupby(by, dropna=False, sort=False):
        found = {r.backend: r for r in group.itertuples()}
        if a in found and b in found:
            yield key, found[a], found[b]


def score(rows, a="cuda", b="triton"):
    """How often a is faster than, slower than, or not told from b."""
    counts = dict.fromkeys(("faster", "slower", "same", "ambiguous"), 0)
    for _, one, other in pairs(labelled(rows), a, b, ["case", "batch", "context"]):
        counts[verdict(one, other)] += 1
    return counts


def score_words(counts, a="cuda", b="triton"):
    total = sum(counts.values())
    if not total:
        return ""
    a, b = style.backend(a).label, style.backend(b).label
    return (f"{a} is faster in {counts['faster']} of {total} cases, {b} in {counts['slower']}; "
            f"{counts['same']} are the same and {counts['ambiguous']} too close to call.")


# Figures

def utilisation(run, f):
    """Share of the ceiling per op and backend at the smallest batch; emulated runs show time instead."""
    rows = labelled(chosen(run.op, f))
    rows = rows[rows["batch"] == rows["batch"].min()]
    if not run.emulated:
        rows = rows[~rows["suspect"] & rows["of_ceiling"].notna()]
    if not len(rows):
        return None
    rows = with_share(rows).sort_values("context", kind="stable", na_position="first")
    order = list(dict.fromkeys(sorted(rows["case"], key=_op_order)))
    backends = style.backend_order(rows["backend"])
    x, low, high = ("us", "us_p10", "us_p90") if run.emulated else ("share", "share_low", "share_high")
    divisor, unit_name = unit(rows["us"])
    scaled = times(rows, divisor)

    def draw(canvas, theme):
        ax = canvas.subplots()
        dots(ax, scaled, "case", order, x, low, high, theme)
        if run.emulated:
            plain_log(ax.xaxis)
            ax.set_xlabel(f"time of a call ({unit_name}, log scale), emulated")
        else:
            ax.set_xlim(0, 106)
            ax.axvline(100, color=theme.ink, linewidth=1, linestyle=":")
            ax.text(100, -0.62, "ceiling", ha="center", va="bottom", fontsize=7, color=theme.muted)
            ax.set_xlabel("share of the measured bandwidth ceiling (%)")
        legend(canvas, [ax])

    what = "Time of a call" if run.emulated else "Bandwidth utilisation"
    top = "" if run.emulated else _best_words(rows)
    won = "" if run.emulated else score_words(score(rows))
    return Figure(
        "utilisation", f"{what} per op, batch {amount(rows['batch'].iloc[0])}" + (f", {f.model}" if f.model else ""),
        conditions(run, rows, f.timer), (f"{won} {top} ".lstrip() + (
            "One row per op and shape; further left is faster. " if run.emulated else
            "One row per op and shape; the dotted line is the bandwidth that a plain stream reached on this card. "
            "Ops that move little are bound by their launch, not by memory, and stay far from it.")).strip(),
        f"Dot plot, one row per op: {what.lower()} of {names(backends)}. {won} {top}".strip(),
        table(rows), command("ops", (), rows, f.model), 0.9 + 0.30 * len(order), draw)


def _best_words(rows):
    words = []
    for name in ("cuda", "triton"):
        mine = rows[rows["backend"] == name]
        if len(mine):
            best = mine.loc[mine["share"].idxmax()]
            words.append(f"{style.backend(name).label} reaches at most {best['share']:.0f}% ({best['case']})")
    return "; ".join(words) + "." if words else ""


def _op_order(case):
    op = case.split(" ")[0]
    order = style.PART_ORDER
    return order.index(op) if op in order else len(order)


def roofline(run, f):
    """Every op on a log-log plot of flop/s against flop/byte, under the measured bandwidth roof."""
    if run.emulated or run.best_ceiling() is None:
        return None
    rows = labelled(chosen(run.op, f), context=False)
    rows = rows[~rows["suspect"] & (rows["flops"] > 0) & (rows["bytes"] > 0) & rows["gbps"].notna()]
    if not len(rows):
        return None
    rows = rows.assign(intensity=rows["flops"] / rows["bytes"], tflops=rows["flops"] / rows["us"] / 1e6)
    rows = rows.assign(low=rows["flops"] / rows["us_p90"] / 1e6, high=rows["flops"] / rows["us_p10"] / 1e6)
    roof = run.best_ceiling() / 1e3

    def draw(canvas, theme):
        ax = canvas.subplots()
        x = np.array([rows["intensity"].min() / 2, rows["intensity"].max() * 2])
        ax.plot(x, roof * x, color=theme.ink, linewidth=1.2)
        ax.fill_between(x, roof * x, roof * x * 100, color=theme.grid, alpha=0.5, linewidth=0)
        for name in style.backend_order(rows["backend"]):
            mine, look = rows[rows["backend"] == name], style.backend(name)
            ax.errorbar(mine["intensity"], mine["tflops"], yerr=spread(mine, "tflops", "low", "high"), linestyle="none",
                        color=look.color, marker=look.marker, label=look.label, markersize=4, alpha=0.85)
        plain_log(ax.xaxis)
        plain_log(ax.yaxis)
        ax.set_xlim(*x)
        floor = rows["tflops"].min() / 2
        ax.set_ylim(floor, roof * x[1] * 1.3)
        # Each op is named at its slowest point, names pushed apart upwards.
        at = -np.inf
        step = 0.05 * np.log10(roof * x[1] * 1.3 / floor)
        for row in rows.loc[rows.groupby("op")["tflops"].idxmin()].sort_values("tflops").itertuples():
            at = max(np.log10(row.tflops), at + step)
            right = row.intensity < x[1] / 8
            ax.annotate(row.op, (row.intensity, row.tflops), xytext=(row.intensity * (1.25 if right else 0.8), 10 ** at),
                        fontsize=7.5, va="center", ha="left" if right else "right")
        ax.set_xlabel("arithmetic intensity (flop / byte)")
        ax.set_ylabel("Tflop/s")
        legend(canvas, [ax])

    return Figure(
        "roofline", "Roofline: every op under the measured memory roof", conditions(run, rows, f.timer),
        "The line is the measured bandwidth times the intensity; no kernel that moves its bytes through DRAM can lie in "
        "the grey. The vertical distance to the line is what is left to gain. Each op runs from batch "
        f"{amount(rows['batch'].min())} to {amount(rows['batch'].max())}. The arithmetic peak was not measured and is not drawn; ops that only move data have no place here.",
        f"Roofline on log axes: {len(rows)} points of {names(rows['backend'])} below the line of the measured bandwidth.",
        table(rows, "case", "backend", "batch", "intensity", "tflops", "us", "us_p10", "us_p90", "n", "gbps", "share")
        .rename(columns={"intensity": "flop/byte", "tflops": "Tflop/s"}), command("ops", (), rows, f.model), 3.6, draw)


def against(run, f, op, y):
    """One op's time ("us") or share of the ceiling ("share") against context where it has one, else against batch."""
    rows = chosen(run.op, f)
    rows = with_share(rows[rows["op"] == op])
    if y == "share":
        rows = rows[~rows["suspect"] & rows["share"].notna()]
    if not len(rows):
        return None
    by_context = rows["context"].nunique() > 1
    x = "context" if by_context else "batch"
    if rows[x].nunique() == 1:
        return None if y == "share" else _once(run, f, op, labelled(rows))
    panel = rows["role"].where(rows["role"] != "", op)
    if by_context:
        panel = "batch " + rows["batch"].map(amount)
    elif rows["context"].notna().any():
        panel = "context " + rows["context"].map(amount)
    rows = labelled(rows.assign(panel=panel))
    panels = list(dict.fromkeys(rows.sort_values("batch", kind="stable")["panel"] if by_context else rows["panel"]))[:8]
    rows = rows[rows["panel"].isin(panels)]
    share = y == "share"
    divisor, unit_name = unit(rows["us"])
    scaled = times(rows, divisor)

    def draw(canvas, theme):
        axes = grid_of(canvas, len(panels), "context (tokens)" if by_context else "batch (sequences)", sharey=share)
        for ax, name in zip(axes, panels):
            here = scaled[scaled["panel"] == name]
            for backend in style.backend_order(here["backend"]):
                look = style.backend(backend)
                ends = ("share_low", "share_high") if share else ("us_p10", "us_p90")
                line(ax, here[here["backend"] == backend], x, y, *ends, look, look.label)
            log_ticks(ax.xaxis, rows[x])
            ax.set_title(short(name), loc="left")
            if share:
                ax.set_ylim(0, 108)
                ax.axhline(100, color=theme.ink, linewidth=1, linestyle=":")
            else:
                from_zero_or_log(ax.yaxis, here["us"], here["us_p90"])
        canvas.supylabel("share of the ceiling (%)" if share else f"time of a call ({unit_name})", fontsize=8.5)
        legend(canvas, axes)

    what = "share of the bandwidth ceiling" if share else "time of a call"
    return Figure(
        f"{op}-{'share' if share else 'time'}", f"{op}: {what} against {x}" + (f", {f.model}" if f.model else ""),
        conditions(run, rows, f.timer),
        ("Higher is better; the dotted line is the measured ceiling." if share else
         "Lower is better. A flat stretch is launch cost or weights, a rising one is the bytes that each sequence adds."),
        f"Lines of {names(rows['backend'])}: {what} of {op} against {x}, {len(panels)} panels.",
        table(rows.sort_values(["panel", "backend", x])), command("ops", [op], rows, f.model), 0.9 + 1.55 * -(-len(panels) // 2), draw)


def _once(run, f, op, rows):
    """The time of an op that was measured at one size of each use only."""
    divisor, unit_name = unit(rows["us"])
    order, scaled = list(dict.fromkeys(rows["case"])), times(rows, divisor)

    def draw(canvas, theme):
        ax = canvas.subplots()
        dots(ax, scaled, "case", order, "us", "us_p10", "us_p90", theme)
        from_zero_or_log(ax.xaxis, scaled["us"], scaled["us_p90"])
        ax.set_xlabel(f"time of a call ({unit_name})")
        legend(canvas, [ax])

    return Figure(
        f"{op}-time", f"{op}: time of a call, batch {amount(rows['batch'].iloc[0])}" + (f", {f.model}" if f.model else ""),
        conditions(run, rows, f.timer), "Further left is faster.", f"Dot plot: time of one call of {op} for {names(rows['backend'])}.",
        table(rows), command("ops", [op], rows, f.model), 0.9 + 0.34 * len(order), draw)


def caches(run, f, op):
    """One op at the smallest batch and largest context: cold, warm, in the model, and with the host's time."""
    rows = run.op[run.op["op"] == op]
    rows = rows[rows["dtype"] == (f.dtype if (rows["dtype"] == f.dtype).any() else rows["dtype"].iloc[0])]
    if f.model:
        rows = rows[rows["models"].map(lambda m: not m or f.model in map(str, m))]
    rows = rows[(rows["batch"] == rows["batch"].min()) & ~rows["suspect"]]
    if rows["context"].notna().any():
        rows = rows[rows["context"] == rows["context"].max()]
    state = rows["timer"].where(rows["timer"] != "graph", rows["cache"])
    rows = labelled(rows.assign(state=state.replace({"in_model": "in model", "event": "eager, host included"})))
    if rows["state"].nunique() < 2:
        return None
    biggest = rows.loc[rows["bytes"].fillna(0).idxmax(), "case"]
    rows = rows[rows["case"] == biggest]
    states = [s for s in ("cold", "warm", "in model", "eager, host included", "wall") if (rows["state"] == s).any()]
    divisor, unit_name = unit(rows["us"])
    scaled = times(rows, divisor)

    def draw(canvas, theme):
        ax = canvas.subplots()
        dots(ax, scaled, "state", states, "us", "us_p10", "us_p90", theme)
        ax.set_xlim(0, scaled["us_p90"].fillna(scaled["us"]).max() * 1.08)
        ax.set_xlabel(f"time of a call ({unit_name})")
        legend(canvas, [ax])

    return Figure(
        f"{op}-caches", f"{op}: what caches and the host change ({biggest}, batch {amount(rows['batch'].iloc[0])})",
        conditions(run, rows),
        "Cold: every call reads memory that no cache holds. Warm: the same buffers again. In model: weights cold, activations "
        "warm. Eager: launched one by one, the host's time included; the others are device time inside one graph.",
        f"Dot plot: time of one call of {biggest} by cache state for {names(rows['backend'])}.",
        table(rows, "state", "backend", "us", "us_p10", "us_p90", "n", "gbps"), command("ops", [op], rows, f.model), 0.9 + 0.38 * len(states),
        draw)


def crossover(run, f, a="cuda", b="triton"):
    """Heat map of b's time over a's: ops and shapes down, batch across; contexts are rows of their own."""
    if run.emulated:
        return None         # the host build against an interpreter: a race that says nothing
    rows = labelled(chosen(run.op, f))
    found = [dict(case=key[0], batch=key[1], ratio=other.us / one.us, verdict=verdict(one, other), n=one.n,
                  us_p10=one.us_p10, us_p90=one.us_p90, dtype=f.dtype, cache=f.cache, a_us=one.us, b_us=other.us)
             for key, one, other in pairs(rows, a, b, ["case", "batch"])]
    if not found:
        return None
    cells = pd.DataFrame(found)
    order = list(dict.fromkeys(sorted(cells["case"], key=_op_order)))
    batches = sorted(cells["batch"].unique())
    look_a, look_b = style.backend(a), style.backend(b)

    def draw(canvas, theme):
        ax = canvas.subplots()
        colors = LinearSegmentedColormap.from_list("who", [look_b.color, theme.grid, look_a.color])
        for cell in cells.itertuples():
            x, y = batches.index(cell.batch), order.index(cell.case)
            decided = cell.verdict in AHEAD
            level = 0.5 + 0.5 * np.clip(np.log2(cell.ratio) / 1.0, -1, 1) if decided else 0.5
            ax.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colors(level), edgecolor=theme.muted,
                                   linewidth=0, hatch="" if decided else "////"))
            ahead = "" if not decided else (look_a if cell.ratio > 1 else look_b).label + " "
            best = max(cell.ratio, 1 / cell.ratio)
            words = f"{ahead}{best:.2f}×" if decided else {"same": "same"}.get(cell.verdict, "too close")
            ax.text(x, y, words, ha="center", va="center", fontsize=6.5, color=theme.ink,
                    bbox=None if decided else {"facecolor": theme.page, "edgecolor": "none", "pad": 1})
        ax.set_xlim(-0.5, len(batches) - 0.5)
        ax.set_ylim(len(order) - 0.5, -0.5)
        ax.set_xticks(range(len(batches)), [amount(v) for v in batches])
        ax.set_yticks(range(len(order)), [short(c) for c in order])
        ax.grid(visible=False)
        ax.tick_params(length=0)
        ax.set_xlabel("batch (sequences)")

    counts = {v: int((cells["verdict"] == v).sum()) for v in ("faster", "slower", "same", "ambiguous")}
    return Figure(
        "crossover", f"Who wins where: {look_a.label} against {look_b.label}" + (f", {f.model}" if f.model else ""),
        conditions(run, cells, f.timer).replace("bars p10 to p90", "verdicts from p10 to p90"),
        score_words(counts, a, b) + " Each cell names the faster side and by how much; the colour is full at twice the speed. "
        "Hatched cells are no win for either: the spreads overlap or the difference is below the resolution.",
        f"Heat map of ops by batch. {score_words(counts, a, b)}",
        cells[["case", "batch", "a_us", "b_us", "ratio", "verdict"]].rename(columns={
            "case": "op", "a_us": f"{look_a.label} (us)", "b_us": f"{look_b.label} (us)", "ratio": f"{look_b.label} / {look_a.label}",
            "verdict": f"{look_a.label} is"}), command("ops", (), cells, f.model), 0.5 + 0.27 * len(order), draw)


def winners(run, f, op):
    """Heat map of the fastest backend of one op over batch and context (or use), the vendor's kernels included."""
    rows = chosen(run.op, f)
    rows = labelled(rows[(rows["op"] == op) & ~rows["suspect"]])
    if run.emulated or rows["backend"].nunique() < 2:
        return None
    cells = []
    for (case, batch), group in rows.groupby(["case", "batch"], sort=False):
        group = group.sort_values("us")
        if len(group) > 1:
            first, second = list(group.itertuples())[:2]
            cells.append(dict(case=case, batch=batch, winner=first.backend, us=first.us, second=second.backend,
                              second_us=second.us, verdict=verdict(first, second), n=first.n, us_p10=first.us_p10,
                              us_p90=first.us_p90, dtype=f.dtype, cache=f.cache))
    if not cells:
        return None
    cells = pd.DataFrame(cells)
    order, batches = list(dict.fromkeys(cells["case"])), sorted(cells["batch"].unique())

    def draw(canvas, theme):
        ax = canvas.subplots()
        for cell in cells.itertuples():
            x, y, look = batches.index(cell.batch), order.index(cell.case), style.backend(cell.winner)
            decided = cell.verdict == "faster"
            ax.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=look.color if decided else theme.grid,
                                   alpha=0.45 if decided else 1, edgecolor=theme.muted, linewidth=0,
                                   hatch="" if decided else "////"))
            words = (f"{look.label}\n{cell.second_us / cell.us:.2f}×" if decided else
                     f"{look.label} or\n{style.backend(cell.second).label}")
            ax.text(x, y, words, ha="center", va="center", fontsize=6.5, color=theme.ink, linespacing=1.1,
                    bbox=None if decided else {"facecolor": theme.page, "edgecolor": "none", "pad": 1})
        ax.set_xlim(-0.5, len(batches) - 0.5)
        ax.set_ylim(len(order) - 0.5, -0.5)
        ax.set_xticks(range(len(batches)), [amount(v) for v in batches])
        ax.set_yticks(range(len(order)), [short(c) for c in order])
        ax.grid(visible=False)
        ax.tick_params(length=0)
        ax.set_xlabel("batch (sequences)")

    decided = cells[cells["verdict"] == "faster"]["winner"].value_counts()
    words = ", ".join(f"{style.backend(b).label} in {c}" for b, c in decided.items())
    words = f"Of {len(cells)} cases: {words or 'none decided'}; {len(cells) - int(decided.sum())} undecided."
    return Figure(
        f"{op}-winner", f"{op}: the fastest of all backends" + (f", {f.model}" if f.model else ""),
        conditions(run, cells, f.timer).replace("bars p10 to p90", "verdicts from p10 to p90"),
        words + " The factor is the time of the second best over the best; hatched cells are undecided between the two named.",
        f"Heat map of the fastest backend of {op} by batch. {words}",
        cells[["case", "batch", "winner", "us", "second", "second_us", "verdict"]].rename(
            columns={"case": "op", "us": "median (us)", "second_us": "second (us)"}),
        command("ops", [op], cells, f.model), 0.5 + 0.36 * len(order), draw)


def of_op(run, f, op):
    """The pictures of one op's section."""
    made = [against(run, f, op, "us"), None if run.emulated else against(run, f, op, "share"),
            winners(run, f, op), caches(run, f, op)]
    return [m for m in made if m]
