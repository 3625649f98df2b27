"""The account of one token: stacked bars of where its time goes, and the waterfall of swapping op by op."""

from dataclasses import dataclass

import pandas as pd

from lab import declared
from lab.report import style
from lab.report.figures import (
    AHEAD,
    Figure,
    amount,
    command,
    conditions,
    digits,
    legend,
    short,
    spread,
    table,
    times,
    token_unit,
)

CHAINS = ", chains"  # what the bar of a plan whose kernels overlap is called by
IDLE = ("gap", "unexplained")  # rows that are no kernel
PARTS = 5  # of a token that have a colour; the others are one part
REST = "all else, gaps included"
NAMES = {"gap": "launch gaps", "unexplained": "unexplained"}
WHY_SWAPS_LOSE = (
    " A swap alone can lose although the op itself is faster: the kernels of one language overlap, for each "
    "starts while the one before still runs. A foreign kernel between them breaks that, above all where it "
    "asks for another division of the memory that a multiprocessor shares between L1 and shared memory: the "
    "card then waits until it is idle before it divides anew."
)


def accounts(run, model):
    """The ledger rows of one model at its first batch and context; `bar` names the account that each belongs
    to, `part` what it is the time of."""
    rows = run.ledger[run.ledger["model"] == model]
    if not len(rows):
        return rows.assign(bar=[], part=[])
    for column in ("batch", "context", "dtype", "ranks"):
        rows = rows[rows[column] == rows[column].iloc[0]]
    kernel = rows["op"].where(rows["op"] != "", rows["kernel"])
    part = kernel.where(~rows["row"].isin([*IDLE, "total"]), rows["row"].replace(NAMES))
    chained = set(rows.loc[rows["row"] == "chain", ["backend", "plan"]].itertuples(index=False, name=None))
    bars = [
        style.backend(r.backend).label
        + (f" {r.plan}" if r.plan else "")
        + (f" on {r.ranks} GPUs" if r.ranks not in ("", "1") else "")
        + (CHAINS if (r.backend, r.plan) in chained else "")
        for r in rows.itertuples()
    ]
    return rows.assign(bar=bars, part=part)


def account_table(run, model):
    """All rows of a model's ledger, for the page's table."""
    rows = accounts(run, model)
    rows = rows[rows["row"] != "swap"]
    return table(
        rows.assign(of_token=100 * rows["of_token"]),
        "bar row part tuning role kernel calls us us_p10 us_p90 n bytes gbps share of_token flag",
    )


def plans(run, model):
    """The plans whose tokens can be divided, that of the fastest token of both languages first. A whole step
    in one kernel cannot: its bar would say nothing."""
    rows = accounts(run, model)
    rows = rows[rows["row"] != "swap"]
    whole = set(rows.loc[rows["op"].isin(declared.groups()["PersistentOps"]), "plan"])
    kernels = rows[~rows["row"].isin([*IDLE, "total"])]
    totals = rows[(rows["row"] == "total") & rows["backend"].isin(["cuda", "triton"])]
    slower = totals.groupby("plan")["us"].agg(["size", "max"])
    found = [plan for plan in dict.fromkeys(kernels["plan"]) if plan not in whole]
    at = {p: (-slower.loc[p, "size"], slower.loc[p, "max"]) if p in slower.index else (0, 0) for p in found}
    return sorted(found, key=at.get)


def ledgers(run, model):
    return [token(run, model, plan) for plan in plans(run, model)]


def token(run, model, plan):
    """Where the time of one token goes under one plan: a stacked bar for each language, by op."""
    rows = accounts(run, model)
    rows = rows[(rows["row"] != "swap") & (rows["plan"] == plan)]
    kernels = rows["backend"].str.partition("+")[0]  # of cuda+nccl, the library's sums in our plan: cuda
    ours = rows[kernels.isin(["cuda", "triton"])]
    rows = ours if len(ours) else rows
    divisor, unit_name = token_unit(rows["us"])
    scaled = times(rows, divisor)
    bars = list(dict.fromkeys(scaled["bar"]))
    kernels = scaled[~scaled["row"].isin([*IDLE, "total"])]
    by_size = kernels.groupby("part")["us"].sum().sort_values(ascending=False).index
    exchanges = declared.groups()["ParallelOps"]  # between GPUs: with a colour even if they are small
    largest = sorted(by_size, key=lambda part: part not in exchanges)[:PARTS]
    order = [*sorted(largest, key=style.part_order), REST]
    pieces = scaled[scaled["part"] != "total"]
    pieces = pieces.assign(part=pieces["part"].where(pieces["part"].isin(largest), REST))
    pieces = pieces.groupby(["bar", "part"])["us"].sum().unstack(fill_value=0.0)
    pieces = pieces.reindex(index=bars, columns=order, fill_value=0.0)
    totals = scaled[scaled["part"] == "total"].drop_duplicates("bar").set_index("bar")
    colors = style.part_colors(largest) | {REST: style.REST}

    def draw(canvas):
        ax = canvas.subplots()
        widest = max([*pieces.clip(lower=0).sum(axis=1), *totals["us"]])
        left = pd.Series(0.0, index=bars)
        for part in pieces:
            width = pieces[part].clip(lower=0)
            look = dict(color=colors[part], edgecolor=style.PAGE, linewidth=0.5)
            ax.barh(range(len(bars)), width, left=left, height=0.6, label=short(part), **look)
            for y, bar in enumerate(bars):
                if width[bar] > 0.06 * widest:
                    said = digits(width[bar])
                    at = dict(ha="center", va="center", fontsize=7.5, color=style.text_on(colors[part]))
                    ax.text(left[bar] + width[bar] / 2, y, said, **at)
            left += width
        for y, bar in enumerate(bars):
            if bar in totals.index:
                mark = dict(color=style.INK, linewidth=2)
                ax.vlines(totals.loc[bar, "us"], y - 0.36, y + 0.36, **mark)
        ax.set_yticks(range(len(bars)), [bar.replace(CHAINS, "").replace(f" {plan}", "") for bar in bars])
        ax.set_ylim(len(bars) - 0.5, -0.5)
        ax.set_xlim(0, widest * 1.03)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(f"{unit_name} of one decode step" + (", emulated" if run.emulated else ""))
        legend(canvas, [ax])

    sums = pieces.sum(axis=1)
    most = [
        f"{bar.replace(CHAINS, '')}: {pieces.loc[bar].idxmax()} takes {pieces.loc[bar].max() / sums[bar]:.0%}"
        for bar in bars
        if sums[bar] > 0
    ]
    adds = [
        f"{bar.replace(CHAINS, '')}: the rows add up to {sums[bar] / totals.loc[bar, 'us']:.1%} "
        "of the replayed token"
        for bar in bars
        if bar in totals.index and sums[bar] > 0
    ]
    first = rows.iloc[0]
    return Figure(
        name=f"{model}-ledger" + (f"-{plan}" if plan else ""),
        title=f"{model}: where one token goes"
        + (f", plan {plan}" if plan else "")
        + f", batch {amount(first['batch'])}, context {amount(first['context'])}",
        conditions=conditions(run, rows, ", ".join(filter(None, dict.fromkeys(rows["timer"])))),
        reading="".join(f"{'; '.join(words)}. " for words in (most, adds) if words)
        + ("The upright mark is the whole token as replayed. " if len(totals) else "")
        + (
            "Where kernels overlap (chains), a part is what the token grows by when its calls join those "
            "before it: times of single kernels would not add up."
            if any(bar.endswith(CHAINS) for bar in bars)
            else ""
        ),
        alt=f"Stacked bars, one per backend, of {unit_name} by op. {'; '.join(most)}",
        table=table(
            rows.assign(of_token=100 * rows["of_token"]),
            "bar row part tuning calls us us_p10 us_p90 n bytes gbps share of_token",
        ),
        command=again(model, rows.iloc[:1]),
        height=1.15 + 0.36 * len(bars),
        draw=draw,
    )


def again(model, rows):
    """The command that measures a token's account again."""
    ranks = rows["ranks"].iloc[0]
    if ranks in ("", "1"):
        return command("ledger", [model], rows)
    several = command("ledger", [model], rows, None, f"--tensor-parallel {ranks}")
    return several.replace("lab bench ledger", "lab ledger", 1)


@dataclass
class Step:
    """One bar of the waterfall, from `begin` to `end`; `row` holds the token measured there, None for a
    difference."""

    name: str
    kind: str  # whole | alone | together
    begin: float
    end: float
    row: pd.DataFrame | None = None

    @property
    def change(self):
        return self.end - self.begin

    @property
    def reach(self):
        """Where the bar and its upper error bar end."""
        over = 0.0 if self.row is None else float((self.row["us_p90"] - self.row["us"]).fillna(0).iloc[0])
        return max(self.begin, self.end, self.end + over)


def steps(rows, start, end):
    """The waterfall's steps of one plan's rows, largest gain first; [] where the all-`start` token or swaps
    are missing."""
    swaps = rows[rows["row"] == "swap"]

    def whole(backend):
        mine = rows[rows["backend"] == backend]
        found = pd.concat([mine[(mine["row"] == "swap") & (mine["op"] == "")], mine[mine["row"] == "total"]])
        return found.iloc[:1] if len(found) else None

    first, last = whole(start), whole(end)
    alone = swaps[(swaps["backend"] == start) & (swaps["op"] != "")].sort_values("us")
    if first is None or not len(alone):
        return []
    level = base = float(first["us"].iloc[0])
    made = [Step(f"all {style.backend(start).label}", "whole", 0.0, base, first)]
    for i in range(len(alone)):
        row = alone.iloc[i : i + 1]
        made.append(Step(row["op"].iloc[0], "alone", level, level + float(row["us"].iloc[0]) - base, row))
        level = made[-1].end
    if last is not None:
        token = float(last["us"].iloc[0])
        made.append(Step("together, not alone", "together", level, token))
        made.append(Step(f"all {style.backend(end).label}", "whole", 0.0, token, last))
    return made


def swaps(run, model):
    """A waterfall for each plan whose ops were swapped."""
    rows = accounts(run, model)
    plans = dict.fromkeys(rows.loc[rows["row"] == "swap", "plan"]) if len(rows) else ()
    return [swap(run, model, plan) for plan in plans]


def swap(run, model, plan, start="triton", end="cuda"):
    """From the all-Triton token to the all-CUDA one: what swapping each op alone gains, and what is left
    over."""
    rows = accounts(run, model)
    rows = rows[rows["plan"] == plan]
    divisor, unit_name = token_unit(rows["us"])
    found = steps(times(rows, divisor), start, end)
    if not found:
        return None
    digits = 1 if unit_name == "us" else 3
    old, new = style.backend(start), style.backend(end)

    def draw(canvas):
        ax = canvas.subplots()
        for y, step in enumerate(found):
            color = {
                "whole": old.color if y == 0 else new.color,
                "together": style.MUTED,
                "alone": (new if step.change < 0 else old).color,
            }[step.kind]
            ax.barh(
                y, step.change, left=step.begin, height=0.62, color=color, edgecolor=style.PAGE, linewidth=0.5
            )
            if step.row is not None:
                ax.errorbar([step.end], [y], xerr=spread(step.row, "us", "us_p10", "us_p90"), color=style.INK)
            if step.kind != "whole":
                ax.plot([step.begin] * 2, [y - 0.7, y + 0.31], color=style.MUTED, linewidth=0.7)
            words = f"{step.end:,.{digits}f}" if step.kind == "whole" else f"{step.change:+,.{digits}f}"
            ax.text(step.reach, y, f"{AHEAD}{words}", va="center", fontsize=7.5)
        low, high = min(s.end for s in found), max(s.reach for s in found)
        left = max(0.0, low - 1.2 * (high - low)) if high - low < 0.5 * high else 0.0
        ax.set_xlim(left, high + 0.16 * (high - left))
        ax.set_yticks(range(len(found)), [short(s.name) for s in found])
        ax.set_ylim(len(found) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(
            f"{unit_name} of one decode step"
            + (", emulated" if run.emulated else "")
            + ("; the axis does not begin at 0" if left else "")
        )

    alone = [s for s in found if s.kind == "alone"]
    most = max(alone, key=lambda s: abs(s.change))
    words = (
        f"Swapping {most.name} alone changes the token by {most.change:+,.{digits}f} {unit_name} of "
        f"{found[0].end:,.{digits}f}."
    )
    measured = pd.concat([s.row for s in alone])
    values = [
        {
            "step": s.name,
            "change": None if s.kind == "whole" else s.change,
            **({} if s.row is None else s.row[["us", "us_p10", "us_p90", "n"]].iloc[0].to_dict()),
        }
        for s in found
    ]
    return Figure(
        name=f"{model}-swap" + (f"-{plan}" if plan not in ("", "basic") else ""),
        title=f"{model}: from all {old.label} to all {new.label}, op by op"
        + (f", plan {plan}" if plan else ""),
        conditions=conditions(run, measured, measured["timer"].iloc[0]),
        reading=f"{words} Each step is one op swapped alone, measured as a whole token; in {new.label}'s "
        "colour where "
        f"the swap gains, in {old.label}'s where it loses. “Together” is what swaps change only in company."
        + (WHY_SWAPS_LOSE if any(s.change > 0 for s in alone) and not run.emulated else ""),
        alt=f"Waterfall from all {old.label} to all {new.label}. {words}",
        table=table(
            pd.DataFrame(values),
            "step change us us_p10 us_p90 n",
            change=f"change ({unit_name})",
            us=f"token ({unit_name})",
            us_p10=f"p10 ({unit_name})",
            us_p90=f"p90 ({unit_name})",
        ),
        command=command("ledger", [model], measured.iloc[:1], None, "--swap"),
        height=0.6 + 0.24 * len(found),
        draw=draw,
    )
