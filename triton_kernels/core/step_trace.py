"""What decode_step records about itself for `lab ledger --inside`, in the layout of lab/ops/step_layout.py.
Without a trace, which is None, nothing of it is compiled.

Times are of the multiprocessor's clock; the twin, cuda_src/core/step_trace.cuh, says why.
"""

import triton
import triton.language as tl

from lab.ops import step_layout

COLUMNS = tl.constexpr(4)
# Numbers of a program's part of the trace: for each layer, and for the rest of the step.
TRACE_LAYER, TRACE_STEP = (
    tl.constexpr(4 * rows) for rows in (len(step_layout.PHASES), step_layout.trace_rows(0))
)


@triton.jit
def clock():
    """Cycles of this multiprocessor's clock."""
    return tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], tl.int64, is_pure=False, pack=1)


@triton.jit
def global_time():
    """Nanoseconds, the same on all multiprocessors."""
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], tl.int64, is_pure=False, pack=1)


@triton.jit
def store_pair(pair):
    """The clock and the global time, taken when the latter ticks."""
    before = global_time()
    tick = before
    while tick == before:
        tick = global_time()
    tl.store(pair, clock())
    tl.store(pair + 1, tick)


@triton.jit
def begin_trace(trace):
    """Row 0, and the start, which ends here. trace: this program's part."""
    store_pair(trace)
    tl.store(trace + COLUMNS, clock())


@triton.jit
def record(trace, target, COLUMN: tl.constexpr):
    """Stores the clock in this column of the phase that waits for `target` arrivals: num_programs more in
    each phase than in the one before."""
    if trace is not None:
        tl.store(trace + (2 + target // tl.num_programs(0)) * COLUMNS + COLUMN, clock())


@triton.jit
def end_trace(trace, target):
    """The last row, which follows lm_head's, and the program's end."""
    if trace is not None:
        tl.store(trace + (3 + target // tl.num_programs(0)) * COLUMNS, clock())
        store_pair(trace + 2)
