"""silu_mul: y[r,c] = T(g / (1 + exp(-g)) * u), g = gate_up[r,c], u = gate_up[r, cols + c]

gate_up [rows, 2 * cols]   y [rows, cols]     row-major, contiguous
mapping   a program owns ROWS rows (one on a GPU) times BLOCK columns
traffic   gate_up once, y once
contract  lab/ops/silu_mul.py          twin  cuda_src/silu_mul.cu
"""

import triton
import triton.language as tl

from triton_kernels.common import config, launch

CONFIGS = {
    "sm_90": dict(elements=1024, block=1024, num_warps=4),
    "sm_80": dict(elements=1024, block=1024, num_warps=4),
    "interpreter": dict(elements=1 << 19, block=1 << 14, num_warps=1),
}


@triton.jit
def silu_mul_kernel(gate_up, y, rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # 1. Locate: gate and up are the two halves of one row.
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    live = (row < rows) & (col < cols)
    gate = gate_up + row.to(tl.int64) * (2 * cols) + col

    # 2. Load: both halves, widened.
    g = tl.load(gate, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32)
    u = tl.load(gate + cols, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32)

    # 3. Activate and store: float32 until the one rounding.
    out = g / (1.0 + tl.exp(-g)) * u
    tl.store(y + row.to(tl.int64) * cols + col, out.to(y.dtype.element_ty), mask=live)


def silu_mul(gate_up, y):
    """Launch y = silu(gate) * up."""
    cfg = config(CONFIGS, y)
    rows, cols = y.shape
    block = min(cfg["block"], triton.next_power_of_2(cols))
    tile = min(max(cfg["elements"] // block, 1), triton.next_power_of_2(rows))
    launch(
        silu_mul_kernel,
        (triton.cdiv(rows, tile), triton.cdiv(cols, block)),
        gate_up,
        y,
        rows,
        cols,
        ROWS=tile,
        BLOCK=block,
        num_warps=cfg["num_warps"],
    )
