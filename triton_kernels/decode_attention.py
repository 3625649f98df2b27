"""decode_attention: out[b,h,:] = softmax_t(scale * q[b,h,:] . k[t,:]) * v[t,:], summed over
tokens t < context_lens[b]

  q [batch, q_heads, head_dim], a view of packed qkv rows with any stride(0)   out [batch, q_heads, head_dim]
  k_cache, v_cache [pages, kv_heads, page_size, head_dim]
  k_scales, v_scales   of a quantised cache: core/kv_codes.py
  block_table [batch, max_pages] int32   context_lens [batch] int32
  partial [batch, kv_heads, splits, group, head_dim + 2] float32 (sums, maximum, mass)
  tickets [batch, kv_heads], zero on entry and on exit
  mapping   a program owns one split of one KV head's tokens, for all the query heads that share it
  traffic   every cached key and value once; q, partial and out are small
  contract  lab/ops/decode_attention.py          twin  cuda_src/decode_attention.cu

Softmax is computed online (Milakov and Gimelshein, arXiv 1805.02867), and the splits are merged as in
Flash-Decoding, here by the program of a KV head that finishes last. Scores are kept in base 2, because the
hardware has exp2: exp(x) = exp2(x * log2(e)).
"""

import math

import triton
import triton.language as tl

from triton_kernels.common import config, launch
from triton_kernels.core.kv_codes import as_float16, format_of
from triton_kernels.core.split_attention import (
    attend,
    layer_scales,
    load_tile,
    merge,
    merge_step,
    publish,
    split_bounds,
)
from triton_kernels.settings import measured

# Settings by architecture and bytes of an element. tile: tokens per step. min_rows: a group's query heads are
# padded to the 16 rows of a tensor-core tile. Two of the num_stages hide the latency of the page lookup, on
# which the loads of K and V depend. The dots of float32 run on CUDA cores.
HALF = dict(tile=64, min_rows=16, num_warps=2, num_stages=5)
FLOAT = dict(tile=32, min_rows=16, num_warps=8, num_stages=4)
ANY = dict(tile=128, min_rows=1, num_warps=1)
# With a quantised cache, by bytes of an element of q: as many bytes in flight, so twice or four times the
# tokens.
HALF_CODES = dict(tile=128, min_rows=16, num_warps=4, num_stages=5)
FLOAT_CODES = dict(tile=64, min_rows=16, num_warps=8, num_stages=4)
CONFIGS = {"sm_90": {2: HALF, 4: FLOAT}, "sm_80": {2: HALF, 4: FLOAT}, "interpreter": {2: ANY, 4: ANY}}
CODES = {
    "sm_90": {2: HALF_CODES, 4: FLOAT_CODES},
    "sm_80": {2: HALF_CODES, 4: FLOAT_CODES},
    "interpreter": {2: ANY, 4: ANY},
}


@triton.jit
def decode_attention_kernel(
    q,
    k_cache,
    v_cache,
    block_table,
    context_lens,
    out,
    partial,
    tickets,
    kv_heads,
    max_pages,
    splits,
    q_stride,
    scale_log2,
    k_scales,
    v_scales,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    MERGE: tl.constexpr,
):
    # 1. Locate: the length is read on the device, so that one captured graph serves a growing context. Split
    # s owns the tokens from s * chunk on; with a short context the last splits are empty, and their programs
    # end here.
    split = tl.program_id(0)
    kv = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    begin, end, used = split_bounds(tl.maximum(tl.load(context_lens + b), 0), split, splits, TILE)
    if split >= used:
        return

    # 2. Load the query: the heads of the group become the rows of one tile; rows past the group are zero.
    g = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    head = kv * GROUP + g
    in_head = (d < HEAD_DIM)[None, :]
    live_out = (g < GROUP)[:, None] & in_head
    scale_log2, values_scale = layer_scales(k_scales, v_scales, scale_log2, FORMAT)
    qv = tl.load(q + b * q_stride + head[:, None] * HEAD_DIM + d[None, :], mask=live_out, other=0.0)
    if FORMAT != 0:
        qv, scale_log2 = as_float16(qv, scale_log2, FORMAT)

    # 3. Load the tiles: a token finds its page in the block table. The twin has a hand-written cp.async ring;
    # here the compiler makes it from num_stages. No other program reads these tokens: evict_first.
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for t0 in tl.range(begin, end, TILE):
        token = t0 + tl.arange(0, TILE)
        live = token < end
        kt, vt, ks, vs = load_tile(
            k_cache,
            v_cache,
            block_table,
            token=token,
            live=live,
            b=b,
            kv=kv,
            kv_heads=kv_heads,
            max_pages=max_pages,
            d=d,
            in_head=in_head,
            PAGE=PAGE,
            HEAD_DIM=HEAD_DIM,
            k_scales=k_scales,
            v_scales=v_scales,
            FORMAT=FORMAT,
        )

        # 4. Online softmax: with a new maximum the sums so far are scaled down. Both matrix products run on
        # tensor cores in both languages, so the weights are rounded to T for the second one; their sum is
        # not.
        top, mass, acc = attend(
            qv, kt, vt, live, top=top, mass=mass, acc=acc, scale_log2=scale_log2, ks=ks, vs=vs, FORMAT=FORMAT
        )

    # 5. Publish the split: if it is the only one, it is the result. With a length of zero the mass is zero,
    # and so is the result.
    if FORMAT != 0:
        acc *= values_scale
    out_head = out + (b * kv_heads + kv) * (GROUP * HEAD_DIM)
    if not SPLIT:
        result = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
        tl.store(
            out_head + g[:, None] * HEAD_DIM + d[None, :], result.to(out.dtype.element_ty), mask=live_out
        )
    else:
        ticket = publish(
            partial,
            tickets,
            b,
            kv=kv,
            kv_heads=kv_heads,
            split=split,
            splits=splits,
            top=top,
            mass=mass,
            acc=acc,
            GROUP=GROUP,
            ROWS=ROWS,
            HEAD_DIM=HEAD_DIM,
            BLOCK_D=BLOCK_D,
        )

        # 6. Merge in the last block: in the order of the splits, so that the result does not depend on which
        # program finished last. The twin merges up to 8 splits through the shared memory of a cluster of
        # blocks, to which Triton gives no access.
        if ticket == used - 1:
            merge(
                partial,
                tickets,
                out_head,
                b=b,
                kv=kv,
                kv_heads=kv_heads,
                splits=splits,
                used=used,
                GROUP=GROUP,
                HEADS=HEADS,
                HEAD_DIM=HEAD_DIM,
                BLOCK_D=BLOCK_D,
                MERGE=MERGE,
            )


def decode_attention(
    q,
    k_cache,
    v_cache,
    block_table,
    context_lens,
    scale,
    splits,
    partial,
    tickets,
    out,
    k_scales=None,
    v_scales=None,
):
    """Launch splits x kv_heads x batch programs; partial and tickets are used only if splits > 1."""
    batch, q_heads, head_dim = q.shape
    kv_heads, page_size = k_cache.shape[1:3]
    group = q_heads // kv_heads
    cfg = (
        config(CODES, q)[q.itemsize]
        if k_scales is not None
        else (
            measured(
                "decode_attention",
                q,
                batch,
                q_heads=q_heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                page_size=page_size,
            )
            or config(CONFIGS, q)[q.itemsize]
        )
    )
    options = {key: value for key, value in cfg.items() if key.startswith("num_")}
    heads, block_d = triton.next_power_of_2(group), triton.next_power_of_2(head_dim)
    launch(
        decode_attention_kernel,
        (splits, kv_heads, batch),
        q,
        k_cache,
        v_cache,
        block_table,
        context_lens,
        out,
        partial,
        tickets,
        kv_heads,
        block_table.shape[1],
        splits,
        q.stride(0),
        scale * math.log2(math.e),
        k_scales,
        v_scales,
        FORMAT=format_of(k_cache),
        GROUP=group,
        ROWS=max(heads, cfg["min_rows"]),
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        PAGE=page_size,
        TILE=cfg["tile"],
        SPLIT=splits > 1,
        HEADS=heads,
        MERGE=merge_step(splits, heads, block_d),
        **options,
    )
