"""Who wins where: CUDA against Triton over all ops and batches, and the fastest of all backends for one op.

Emulated runs have neither: the host build against an interpreter is a race that says nothing.
"""

import numpy as np
import pandas as pd

from lab import declared
from lab.report import style
from lab.report.figures import Cell, Grid, command, conditions, table
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

BATCHES = 12  # across one grid
GROUPS = {
    "BasicOps": "Textbook ops (plan basic)",
    "FusedOps": "Fused ops (plan fused)",
    "PersistentOps": "Whole steps (plan persistent)",
}
NOT_MEASURED = " –: no usable time of both at this batch."


def crossover(run, f, a="cuda", b="triton"):
    """Grid of who is faster and by how much: ops, uses and contexts down, grouped by plan; batch across."""
    if run.emulated:
        return None
    found = [
        _row(
            f,
            case,
            batch,
            verdict(one, other),
            one,
            other,
            a_us=one.us,
            b_us=other.us,
            ratio=other.us / one.us,
        )
        for case, batch, one, other in pairs(labelled(chosen(run.op, f)), a, b)
    ]
    if not found:
        return None
    rows = pd.DataFrame(found)
    looks = {"faster": (a, style.backend(a)), "slower": (b, style.backend(b))}

    def cell(row):
        if row.verdict not in looks:
            return Cell("same" if row.verdict == "same" else "too close", note=row.tuning)
        winner, look = looks[row.verdict]
        gain = max(row.ratio, 1 / row.ratio)
        return Cell(f"{look.label} {gain:.2f}×", winner, float(np.clip(np.log2(gain), 0.15, 1)), row.tuning)

    counts = {v: int((rows["verdict"] == v).sum()) for v in VERDICTS} | {
        "untuned": int((rows["tuning"] != "").sum())
    }
    order, left = first_of(in_order(rows["case"]))
    label_a, label_b = style.backend(a).label, style.backend(b).label
    return _grid(
        rows,
        order,
        cell,
        name="crossover",
        title=f"Who wins where: {label_a} against {label_b}{f.of_model}",
        conditions=_conditions(run, rows, f),
        reading=score_words(counts, a, b)
        + " A cell names the faster side and by how much; its colour is full at twice the speed. Grey: no "
        "win for either, because the spreads overlap or the difference is below the resolution." + left,
        alt=f"Table of ops by batch. {score_words(counts, a, b)}",
        table=table(
            rows,
            "case batch a_us b_us ratio verdict tuning",
            a_us=f"{label_a} (us)",
            b_us=f"{label_b} (us)",
            ratio=f"{label_b} / {label_a}",
            verdict=f"{label_a} is",
        ),
        command=command("ops", (), rows, f.model),
    )


def winners(run, f, op):
    """Grid of the fastest backend of one op, the vendor's included: uses and contexts down, batch across."""
    rows = chosen(run.op, f)
    rows = labelled(rows[(rows["op"] == op) & ~rows["suspect"]])
    if run.emulated or rows["backend"].nunique() < 2:
        return None
    found = []
    for (case, batch), group in by_case(rows):
        first, *others = sorted(group, key=lambda row: row.us)
        if others:
            second = others[0]
            values = dict(winner=first.backend, us=first.us, second=second.backend, second_us=second.us)
            found.append(_row(f, case, batch, verdict(first, second), first, second, **values))
    if not found:
        return None
    rows = pd.DataFrame(found)

    def cell(row):
        first, second = style.backend(row.winner).label, style.backend(row.second).label
        if row.verdict != "faster":
            return Cell(f"{first} or {second}", note=row.tuning)
        gain = row.second_us / row.us
        return Cell(f"{first} {gain:.2f}×", row.winner, float(np.clip(np.log2(gain), 0.15, 1)), row.tuning)

    won = rows[rows["verdict"] == "faster"]["winner"].value_counts()
    counts = ", ".join(f"{style.backend(b).label} in {c}" for b, c in won.items()) or "none decided"
    counts = f"Of {len(rows)} cases: {counts}; {len(rows) - int(won.sum())} undecided."
    order, left = first_of(list(dict.fromkeys(rows["case"])))
    return _grid(
        rows,
        order,
        cell,
        name=f"{op}-winner",
        title=f"{op}: the fastest of all backends{f.of_model}",
        conditions=_conditions(run, rows, f),
        reading=counts
        + " The factor is the time of the second best over that of the best. Grey: undecided between the two "
        "that are named." + left,
        alt=f"Table of the fastest backend of {op} by batch. {counts}",
        table=table(rows, "case batch winner us second second_us verdict tuning", second_us="second (us)"),
        command=command("ops", [op], rows, f.model),
    )


def _untuned(*rows):
    """ "Triton untuned" where one of the rows beside each other is, so that the verdict is no limit of a
    language."""
    names = [style.backend(r.backend).label for r in rows if r.tuning]
    return f"{', '.join(names)} untuned" if names else ""


def _row(f, case, batch, said, row, other, **values):
    """What is known of a cell; n and the spread are there for the grid's conditions."""
    return dict(
        case=case,
        batch=batch,
        verdict=said,
        dtype=f.dtype,
        cache=f.cache,
        n=row.n,
        us_p10=row.us_p10,
        us_p90=row.us_p90,
        op=row.op,
        tuning=_untuned(row, other),
        **values,
    )


def _conditions(run, rows, f):
    said = conditions(run, rows.drop(columns="tuning"), f.timer).replace(
        "bars p10 to p90", "verdicts from p10 to p90"
    )
    return said + (
        " · a cell names the side whose settings are untuned" if (rows["tuning"] != "").any() else ""
    )


def _grid(rows, order, cell, reading, **fields):
    batches = sorted(rows["batch"].unique())
    cells = {(row.case, row.batch): cell(row) for row in rows.itertuples()}
    op_of = dict(zip(rows["case"], rows["op"]))
    group_of = {op: GROUPS.get(group, "Other ops") for group, ops in declared.groups().items() for op in ops}
    if len(batches) > BATCHES:
        reading += f" Only the smallest {BATCHES} of {len(batches):,} batches are shown."
        batches = batches[:BATCHES]
    lines = [
        (group_of.get(op_of[case], "Other ops"), case, [cells.get((case, batch)) for batch in batches])
        for case in order
    ]
    if any(None in line for _, _, line in lines):
        reading += NOT_MEASURED
    return Grid(**fields, reading=reading, batches=batches, rows=lines)
