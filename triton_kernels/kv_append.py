"""kv_append: k_cache[block_table[b, p // page_size], h, p % page_size, :] = k[b,h,:], p = positions[b];
v likewise

  k, v [batch, kv_heads, head_dim], views of packed qkv rows with any stride(0)
  k_cache, v_cache [pages, kv_heads, page_size, head_dim]
  block_table [batch, max_pages] int32   positions [batch] int32
  mapping   a program owns ROWS heads, counted through the heads of every batch entry
  traffic   k and v read once and written once
  contract  lab/ops/kv_append.py          twin  cuda_src/kv_append.cu
"""

import triton
import triton.language as tl

from triton_kernels.common import config, launch

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
    slot = ((page * kv_heads + head) * PAGE + position % PAGE) * HEAD_DIM
    target = slot[:, None] + d
    live = live[:, None] & (d < HEAD_DIM)

    # 3. Copy: k, then v, unchanged, so that the cache holds exactly what the projection and rope left.
    tl.store(k_cache + target, tl.load(k + b[:, None] * k_stride + source, mask=live, other=0.0), mask=live)
    tl.store(v_cache + target, tl.load(v + b[:, None] * v_stride + source, mask=live, other=0.0), mask=live)


def kv_append(k, v, k_cache, v_cache, block_table, positions):
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
        PAGE=k_cache.shape[2],
        HEAD_DIM=head_dim,
        BLOCK=triton.next_power_of_2(head_dim),
        ROWS=tile,
        num_warps=cfg["num_warps"],
    )
