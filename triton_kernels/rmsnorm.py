"""rmsnorm: y[b,g,:] = T(x[b,g,:] * rsqrt(mean(x[b,g,:]^2) + eps)) * w

x [batch, (groups,) cols], any stride(0)   w [cols]   y like x
residual [batch, cols] or None: residual += x, rounded to T, then y = norm(residual)
mapping   a program owns ROWS whole rows (one, unless they are short): a row is read once and stays in
          registers
traffic   x once, y once (residual twice), w once per row (from L2 after the first row)
contract  lab/ops/rmsnorm.py          twin  cuda_src/rmsnorm.cu
"""

import torch
import triton
import triton.language as tl

from triton_kernels.common import config, launch
from triton_kernels.core.fused_product import wait_for_inputs
from triton_kernels.settings import dependent_launch

# elements: the fewest elements that a program takes, in whole rows, so that a warp reads 16 bytes a lane even
# if rows are short (the heads of q and k). The interpreter takes as many rows as fit, because its cost is per
# program.
CONFIGS = {
    "sm_90": dict(elements=512, per_warp=512, max_warps=16),
    "sm_80": dict(elements=512, per_warp=512, max_warps=16),
    "interpreter": dict(elements=1 << 19, per_warp=512, max_warps=4),
}


@triton.jit
def rmsnorm_kernel(
    x,
    w,
    residual,
    y,
    rows,
    groups,
    cols,
    x_stride,
    y_stride,
    eps,
    PDL: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 1. Locate: row r is group r % groups of batch entry r // groups; lanes past the end are masked.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    live = (row < rows) & (col < cols)
    batch = (row // groups).to(tl.int64)
    inner = (row % groups) * cols + col

    # 2. Load: the row is in registers from here on, so x is never read again. The weight depends on no
    # earlier kernel, so its load is issued before the wait.
    g = tl.load(w + col, mask=col < cols, other=0.0, eviction_policy="evict_last").to(tl.float32)
    wait_for_inputs(PDL)
    v = tl.load(x + batch * x_stride + inner, mask=live, other=0.0)
    if HAS_RESIDUAL:
        # The sum is rounded to T before it is used: it is what the next layer will read.
        into = residual + row.to(tl.int64) * cols + col
        v = (v.to(tl.float32) + tl.load(into, mask=live, other=0.0).to(tl.float32)).to(v.dtype)
        tl.store(into, v, mask=live)

    # 3. Reduce: the sum of squares in float32; masked lanes add zero. The twin has shuffles and shared memory
    # written out.
    v32 = v.to(tl.float32)
    scale = tl.rsqrt(tl.sum(v32 * v32, axis=1) / cols + eps)

    # 4. Scale and store: rounded to T before the weight, as in Hugging Face Llama.
    out = (v32 * scale[:, None]).to(v.dtype).to(tl.float32) * g
    tl.store(y + batch * y_stride + inner, out.to(v.dtype), mask=live)


def rmsnorm(x, w, eps, residual, y):
    """Launch on x, y [batch, cols] or [batch, groups, cols], any stride(0); residual like x, or None."""
    cfg = config(CONFIGS, x)
    cols = x.shape[-1]
    groups = x.shape[1] if x.ndim == 3 else 1
    rows = x.shape[0] * groups
    block = triton.next_power_of_2(cols)
    tile = min(triton.next_power_of_2(rows), max(cfg["elements"] // block, 1))
    launch(
        rmsnorm_kernel,
        (triton.cdiv(rows, tile),),
        x,
        w,
        residual,
        y,
        rows,
        groups,
        cols,
        x.stride(0),
        y.stride(0),
        eps,
        HAS_RESIDUAL=residual is not None,
        ROWS=tile,
        BLOCK=block,
        num_warps=min(max(tile * block // cfg["per_warp"], 1), cfg["max_warps"]),
        **dependent_launch(x),
    )


def normalised(x, w, eps):
    """rmsnorm of x [rows, k], in new memory, for tensor-core kernels, whose programs each read all of x."""
    y = torch.empty_like(x)
    rmsnorm(x, w, eps, None, y)
    return y
