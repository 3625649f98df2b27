"""kv_append: k_cache[block_table[b, p // page_size], h, p % page_size, :] = k[b,h,:], p = positions[b];
v likewise

  k, v [batch, kv_heads, head_dim], views of packed qkv rows with any stride(0)
  k_cache, v_cache [pages, kv_heads, page_size, head_dim]
  block_table [batch, max_pages] int32   positions [batch] int32
  k_scales, v_scales   of a quantised cache: core/kv_codes.py
  mapping   a program owns ROWS heads, counted through the heads of every batch entry
  traffic   k and v read once and written once
  contract  lab/ops/kv_append.py          twin  cuda_src/kv_append.cu
"""

import triton
import triton.language as tl

from triton_kernels.common import config, launch
from triton_kernels.core.kv_codes import append_codes, format_of

CONFIGS = {
    "sm_90": dict(rows=4, num_warps=1),
    "sm_80": dict(rows=4, num_warps=1),
    "interpreter": dict(rows=2048, num_warps=1),
}


@triton.jit
def kv_append_kernel(
    k,
    v,
    k_cache,
    v_cache,
    block_table,
    positions,
    rows,
    kv_heads,
    max_pages,
    k_stride,
    v_stride,
    k_scales,
    v_scales,
    FORMAT: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    # 1. Locate: row r is head r % kv_heads of batch entry r // kv_heads.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = (row // kv_heads).to(tl.int64)
    head = row % kv_heads
    d = tl.arange(0, BLOCK)[None, :]
    source = (head * HEAD_DIM)[:, None] + d

    # 2. Find the slot: row p % page_size of page p / page_size. An idle row has a negative
    # position and is skipped.
    position = tl.load(positions + b, mask=row < rows, other=-1)
    live = position >= 0
    page = tl.load(block_table + b * max_pages + position // PAGE, mask=live, other=0).to(tl.int64)
    slot = (page * kv_heads + head) * PAGE + position % PAGE
    target = (slot * HEAD_DIM)[:, None] + d
    live_row = live
    live = live[:, None] & (d < HEAD_DIM)

    # 3. Copy: k, then v, unchanged, so that the cache holds exactly what the projection and rope left. A
    # quantised cache gets codes.
    new_k = tl.load(k + b[:, None] * k_stride + source, mask=live, other=0.0)
    new_v = tl.load(v + b[:, None] * v_stride + source, mask=live, other=0.0)
    if FORMAT == 0:
        tl.store(k_cache + target, new_k, mask=live)
        tl.store(v_cache + target, new_v, mask=live)
    else:
        append_codes(k_cache, k_scales, new_k, slot, target, live, live_row, FORMAT)
        append_codes(v_cache, v_scales, new_v, slot, target, live, live_row, FORMAT)


def kv_append(k, v, k_cache, v_cache, block_table, positions, k_scales=None, v_scales=None):
    """Write one token's k and v into the paged cache."""
    cfg = config(CONFIGS, k)
    batch, kv_heads, head_dim = k.shape
    rows = batch * kv_heads
    tile = min(cfg["rows"], triton.next_power_of_2(rows))
    launch(
        kv_append_kernel,
        (triton.cdiv(rows, tile),),
        k,
        v,
        k_cache,
        v_cache,
        block_table,
        positions,
        rows,
        kv_heads,
        block_table.shape[1],
        k.stride(0),
        v.stride(0),
        k_scales,
        v_scales,
        FORMAT=format_of(k_cache),
        PAGE=k_cache.shape[2],
        HEAD_DIM=head_dim,
        BLOCK=triton.next_power_of_2(head_dim),
        ROWS=tile,
        num_warps=cfg["num_warps"],
    )
