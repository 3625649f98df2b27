"""Who wins where: CUDA against Triton over all ops and batches, and the fastest of all backends for one op.

Emulated runs have neither: the host build against an interpreter is a race that says nothing.
"""

import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from lab.report import style
from lab.report.figures import Figure, amount, command, conditions, short, table
from lab.report.ops import (
    VERDICTS,
    by_case,
    chosen,
    first_of,
    in_order,
    labelled,
    pairs,
    score_words,
    verdict,
)

BATCHES = 12  # across one picture


def crossover(run, f, a="cuda", b="triton"):
    """Heat map of b's time over a's: ops, uses and contexts down, batch across."""
    if run.emulated:
        return None
    found = [
        _cell(
            f,
            case,
            batch,
            verdict(one, other),
            one,
            a_us=one.us,
            b_us=other.us,
            ratio=other.us / one.us,
            tuning=_untuned(one, other),
        )
        for case, batch, one, other in pairs(labelled(chosen(run.op, f)), a, b)
    ]
    if not found:
        return None
    cells = pd.DataFrame(found)
    look_a, look_b = style.backend(a), style.backend(b)

    def face(cell):
        ramp = LinearSegmentedColormap.from_list("who", [look_b.color, style.GRID, look_a.color])
        return ramp(0.5 + 0.5 * np.clip(np.log2(cell.ratio), -1, 1))

    def words(cell):
        if cell.verdict in ("same", "ambiguous"):
            said = "same" if cell.verdict == "same" else "too close"
        else:
            winner = look_a if cell.verdict == "faster" else look_b
            said = f"{winner.label} {max(cell.ratio, 1 / cell.ratio):.2f}×"
        return said + ("\n" + cell.tuning if cell.tuning else "")

    counts = {v: int((cells["verdict"] == v).sum()) for v in VERDICTS} | {
        "untuned": int((cells["tuning"] != "").sum())
    }
    order, left = first_of(in_order(cells["case"]))
    return Figure(
        name="crossover",
        title=f"Who wins where: {look_a.label} against {look_b.label}{f.of_model}",
        conditions=_conditions(run, cells, f),
        reading=score_words(counts, a, b)
        + " Each cell names the faster side and by how much; the colour is full at twice the speed. "
        "Hatched cells are no win for either: the spreads overlap or the difference is below the "
        "resolution." + left + _batches_left(cells),
        alt=f"Heat map of ops by batch. {score_words(counts, a, b)}",
        table=table(
            cells,
            "case batch a_us b_us ratio verdict tuning",
            a_us=f"{look_a.label} (us)",
            b_us=f"{look_b.label} (us)",
            ratio=f"{look_b.label} / {look_a.label}",
            verdict=f"{look_a.label} is",
        ),
        command=command("ops", (), cells, f.model),
        height=0.5 + 0.27 * len(order),
        draw=lambda canvas: _map(canvas, cells, order, face, words),
    )


def winners(run, f, op):
    """Heat map of the fastest backend of one op, the vendor's included: uses and contexts down, batch
    across."""
    rows = chosen(run.op, f)
    rows = labelled(rows[(rows["op"] == op) & ~rows["suspect"]])
    if run.emulated or rows["backend"].nunique() < 2:
        return None
    found = []
    for (case, batch), group in by_case(rows):
        first, *others = sorted(group, key=lambda row: row.us)
        if others:
            found.append(
                _cell(
                    f,
                    case,
                    batch,
                    verdict(first, others[0]),
                    first,
                    winner=first.backend,
                    us=first.us,
                    second=others[0].backend,
                    second_us=others[0].us,
                    tuning=_untuned(first, others[0]),
                )
            )
    if not found:
        return None
    cells = pd.DataFrame(found)

    def face(cell):
        return (*[int(style.backend(cell.winner).color[i : i + 2], 16) / 255 for i in (1, 3, 5)], 0.45)

    def words(cell):
        first, second = style.backend(cell.winner).label, style.backend(cell.second).label
        said = (
            f"{first}\n{cell.second_us / cell.us:.2f}×"
            if cell.verdict == "faster"
            else f"{first} or\n{second}"
        )
        return said + ("\n" + cell.tuning if cell.tuning else "")

    won = cells[cells["verdict"] == "faster"]["winner"].value_counts()
    counts = ", ".join(f"{style.backend(b).label} in {c}" for b, c in won.items()) or "none decided"
    counts = f"Of {len(cells)} cases: {counts}; {len(cells) - int(won.sum())} undecided."
    order, left = first_of(list(dict.fromkeys(cells["case"])))
    return Figure(
        name=f"{op}-winner",
        title=f"{op}: the fastest of all backends{f.of_model}",
        conditions=_conditions(run, cells, f),
        reading=counts
        + " The factor is the time of the second best over that of the best; hatched cells are "
        "undecided between the two that they name." + left + _batches_left(cells),
        alt=f"Heat map of the fastest backend of {op} by batch. {counts}",
        table=table(cells, "case batch winner us second second_us verdict tuning", second_us="second (us)"),
        command=command("ops", [op], cells, f.model),
        height=0.5 + 0.36 * len(order),
        draw=lambda canvas: _map(canvas, cells, order, face, words),
    )


def _untuned(*rows):
    """ "Triton untuned" where one of the rows beside each other is, so that the verdict is no limit of a
    language."""
    names = [style.backend(r.backend).label for r in rows if r.tuning]
    return f"{', '.join(names)} untuned" if names else ""


def _cell(f, case, batch, said, row, **values):
    """What a cell holds; n and the spread are there for the picture's conditions."""
    return dict(
        case=case,
        batch=batch,
        verdict=said,
        dtype=f.dtype,
        cache=f.cache,
        n=row.n,
        us_p10=row.us_p10,
        us_p90=row.us_p90,
        **values,
    )


def _conditions(run, cells, f):
    said = conditions(run, cells.drop(columns="tuning"), f.timer).replace(
        "bars p10 to p90", "verdicts from p10 to p90"
    )
    return said + (
        " · a cell names the side whose settings are untuned" if (cells["tuning"] != "").any() else ""
    )


def _batches_left(cells):
    count = cells["batch"].nunique()
    return f" Only the smallest {BATCHES} of {count:,} batches are drawn." if count > BATCHES else ""


def _map(canvas, cells, order, face, words):
    """Cases down in `order`, batches across; decided cells in face(cell), the others hatched."""
    ax = canvas.subplots()
    batches = sorted(cells["batch"].unique())[:BATCHES]
    place = {case: i for i, case in enumerate(order)}
    cells = cells[cells["case"].isin(order) & cells["batch"].isin(batches)]
    for cell in cells.itertuples():
        x, y = batches.index(cell.batch), place[cell.case]
        decided = cell.verdict in ("faster", "slower")
        ax.add_patch(
            Rectangle(
                (x - 0.48, y - 0.46),
                0.96,
                0.92,
                facecolor=face(cell) if decided else style.GRID,
                edgecolor=style.MUTED,
                linewidth=0,
                hatch="" if decided else "////",
            )
        )
        ax.text(
            x,
            y,
            words(cell),
            ha="center",
            va="center",
            fontsize=6.5,
            color=style.INK,
            linespacing=1.1,
            bbox=None if decided else {"facecolor": style.PAGE, "edgecolor": "none", "pad": 1},
        )
    ax.set_xlim(-0.5, len(batches) - 0.5)
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.set_xticks(range(len(batches)), [amount(v) for v in batches])
    ax.set_yticks(range(len(order)), [short(c) for c in order])
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.set_xlabel("batch (sequences)")
