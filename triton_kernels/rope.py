"""rope: (a, b) -> (a * cos - b * sin, b * cos + a * sin) for each pair (i, i + head_dim / 2) of
every head, in place

  q [batch, q_heads, head_dim]   k [batch, kv_heads, head_dim], views of packed qkv rows with any stride(0)
  positions [batch] int32   cos_sin [max_positions, head_dim] float32: first half cos, second half sin
  mapping   a program owns ROWS heads, counted through q's and k's heads of every batch entry
  traffic   q and k read once and written once; a table row per head, from L2
  contract  lab/ops/rope.py          twin  cuda_src/rope.cu
"""

import triton
import triton.language as tl

from triton_kernels.common import config, launch

CONFIGS = {
    "sm_90": dict(rows=8, num_warps=1),
    "sm_80": dict(rows=8, num_warps=1),
    "interpreter": dict(rows=2048, num_warps=1),
}


@triton.jit
def rope_kernel(
    q,
    k,
    positions,
    cos_sin,
    batch,
    q_heads,
    kv_heads,
    q_stride,
    k_stride,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    # 1. Locate: row r is head r % heads of batch entry r // heads; k's heads come after q's. A row whose
    # position is negative is idle and stays as it is.
    heads = q_heads + kv_heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = row // heads
    head = row % heads
    i = tl.arange(0, BLOCK)[None, :]
    position = tl.load(positions + b, mask=b < batch, other=-1)
    live = (position >= 0)[:, None] & (i < HALF)
    # One pointer per row, into q or into k; the twin's threads branch instead.
    first = (
        tl.where(
            head < q_heads,
            q + b.to(tl.int64) * q_stride + head * (2 * HALF),
            k + b.to(tl.int64) * k_stride + (head - q_heads) * (2 * HALF),
        )[:, None]
        + i
    )

    # 2. Load: both halves of the head, and the angle's cosines and sines.
    table = cos_sin + position.to(tl.int64)[:, None] * (2 * HALF) + i
    cos = tl.load(table, mask=live, other=0.0)
    sin = tl.load(table + HALF, mask=live, other=0.0)
    a = tl.load(first, mask=live, other=0.0).to(tl.float32)
    c = tl.load(first + HALF, mask=live, other=0.0).to(tl.float32)

    # 3. Rotate and store: float32 until the one rounding.
    tl.store(first, (a * cos - c * sin).to(q.dtype.element_ty), mask=live)
    tl.store(first + HALF, (c * cos + a * sin).to(q.dtype.element_ty), mask=live)


def rope(q, k, positions, cos_sin):
    """Rotate q and k in place."""
    cfg = config(CONFIGS, q)
    batch, q_heads, head_dim = q.shape
    rows = batch * (q_heads + k.shape[1])
    tile = min(cfg["rows"], triton.next_power_of_2(rows))
    launch(
        rope_kernel,
        (triton.cdiv(rows, tile),),
        q,
        k,
        positions,
        cos_sin,
        batch,
        q_heads,
        k.shape[1],
        q.stride(0),
        k.stride(0),
        HALF=head_dim // 2,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        ROWS=tile,
        num_warps=cfg["num_warps"],
    )
