"""The fairness cards: what was spent on each side of a race, and what came of it."""

import itertools
import math

import pandas as pd

from lab.harness import untuned
from lab.inspect.kernel import MIX
from lab.report import ops, style
from lab.report.tables import cell

COLUMNS = (
    "op backend dtype arch kernel configurations tried registers spill_bytes shared_bytes threads occupancy "
    "instructions code_lines shared_lines file_s kernel_s"
)
CARD = {
    "configurations": "configurations to choose from",
    "tried": "settings the tuner raced",
    "registers": "registers of a thread",
    "spill_bytes": "spilled bytes of a thread",
    "shared_bytes": "shared memory of a block (bytes)",
    "threads": "threads of a block",
    "occupancy": "theoretical occupancy",
    "instructions": "machine instructions",
    "code_lines": "lines of code",
    "shared_lines": "lines shared with other ops",
    "file_s": "nvcc, the whole file: every instantiation and architecture (s)",
    "kernel_s": "Triton, this kernel alone, in a process that has compiled before (s)",
}
COMPILED = {name: CARD[name] for name in ("file_s", "kernel_s")}
# Classes of instructions that say little of how a kernel treats memory: one row of the mix.
UPKEEP = ("integer and address", "constant and register move", "control flow and fence", "other")


def one_call(rows, dtype):
    """One op's fairness records of a dtype (its first, where it has none of that) and of one architecture."""
    rows = rows[rows["dtype"] == (dtype if (rows["dtype"] == dtype).any() else rows["dtype"].iloc[0])]
    return rows[rows["arch"] == rows["arch"].iloc[0]]


def compile_times(rows):
    """Fairness records with `compile_s` apart by what it is the time of, since the two cannot be set side by
    side."""
    cuda = rows["backend"] == "cuda"
    return rows.assign(file_s=rows["compile_s"].where(cuda), kernel_s=rows["compile_s"].where(~cuda))


def card(rows):
    """(caption, frame) of what was spent on each side; a column for each kernel. rows: of one_call()."""
    sides, rows = {"": list(CARD.values())}, compile_times(rows)
    for row in rows.itertuples():
        shown = {field: cell(getattr(row, field)) for field in CARD}
        if row.occupancy == row.occupancy:
            shown["occupancy"] = f"{row.occupancy:.0%}"
        if untuned.by_cards([row]):
            shown["tried"] += f" ({untuned.WORD})"
        sides[_kernel(row)] = list(shown.values())
    return f"Fairness card: {_call(rows)}", pd.DataFrame(sides)


def mix(rows):
    """(caption, frame) of the instructions by what they do, as `card`; None for records that do not hold
    them."""
    counts = {
        _kernel(row): {str(name): n for name, n in row.mix.items() if isinstance(n, int) and n > 0}
        for row in rows.itertuples()
    }
    found = [
        name for name in (*MIX, *itertools.chain(*counts.values())) if any(name in c for c in counts.values())
    ]
    if not found:
        return None
    named = [name for name in dict.fromkeys(found) if name not in UPKEEP]
    sides = {"": [*named, "addresses, moves, control flow"]}
    for kernel, count in counts.items():
        upkeep = sum(count.get(name, 0) for name in UPKEEP)
        sides[kernel] = (
            [*(count.get(name, 0) for name in named), upkeep] if count else [math.nan] * (len(named) + 1)
        )
    return f"Instructions of machine code, each counted once: {_call(rows)}", pd.DataFrame(sides)


def _kernel(row):
    return f"{style.backend(row.backend).label}: {row.kernel}"


def _call(rows):
    first = rows.iloc[0]
    return f"{first['dtype']}, {first['arch']}, {ops.shape_text(first['shape'])}"
