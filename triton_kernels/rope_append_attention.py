"""rope_append_attention: q = rope(norm(q)), k = rope(norm(k)); k and v appended to the cache at positions;
out[b,h,:] = sum over tokens t <= positions[b] of softmax_t(scale * q[b,h,:] . k[t,:]) * v[t,:]

  q [batch, q_heads, head_dim], k, v [batch, kv_heads, head_dim], views of packed qkv rows with any stride(0)
  q_norm, k_norm [head_dim] or None   positions [batch] int32   cos_sin [max_positions, head_dim] float32
  caches, block_table, partial, tickets and out as in decode_attention
  mapping   as decode_attention; the program whose split holds the new token writes it and attends to it
  traffic   every cached key and value once for all query heads of its group; the rest is small
  contract  lab/ops/rope_append_attention.py          twin  cuda_src/rope_append_attention.cu
"""

import math

import triton
import triton.language as tl

from triton_kernels.common import config, launch
from triton_kernels.core.fused_product import normed, wait_for_inputs
from triton_kernels.core.kv_codes import INT8, PLAIN, append_codes, as_float16, format_of
from triton_kernels.core.split_attention import (
    attend,
    cache_rows,
    layer_scales,
    load_tile,
    merge,
    merge_step,
    publish,
    split_bounds,
)
from triton_kernels.settings import dependent_launch, measured

# As in decode_attention, except that the first tile needs registers.
HALF = dict(tile=64, min_rows=16, num_warps=4, num_stages=4)
FLOAT = dict(tile=32, min_rows=16, num_warps=8, num_stages=4)
CPU = dict(tile=128, min_rows=1, num_warps=1)
HALF_CODES = dict(tile=64, min_rows=16, num_warps=4, num_stages=6)
FLOAT_CODES = dict(tile=64, min_rows=16, num_warps=8, num_stages=4)
CONFIGS = {"sm_90": {2: HALF, 4: FLOAT}, "sm_80": {2: HALF, 4: FLOAT}, "interpreter": {2: CPU, 4: CPU}}
CODES = {
    "sm_90": {2: HALF_CODES, 4: FLOAT_CODES},
    "sm_80": {2: HALF_CODES, 4: FLOAT_CODES},
    "interpreter": {2: CPU, 4: CPU},
}


@triton.jit
def turned(head, norm, cosine, sine, eps, d, live, HALF_DIM: tl.constexpr, HAS_NORM: tl.constexpr):
    """The heads at the pointers `head` [rows, 1] as [rows, BLOCK_D]: normalised and rotated, rounded to T
    after each.

    Element d rotates with the element half a head away. That one is loaded again, from L1, which is cheaper
    than moving it between threads.
    """
    partner = tl.where(d < HALF_DIM, d + HALF_DIM, d - HALF_DIM)
    x = tl.load(head + d, mask=live, other=0.0)
    y = tl.load(head + partner, mask=live, other=0.0)
    if HAS_NORM:
        wide = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / (2 * HALF_DIM) + eps)
        in_head = d < 2 * HALF_DIM
        x = normed(x, scale, tl.load(norm + d, mask=in_head, other=0.0))
        y = normed(y, scale, tl.load(norm + partner, mask=in_head, other=0.0))
    return (x.to(tl.float32) * cosine + y.to(tl.float32) * sine).to(x.dtype)


@triton.jit
def angles(cos_sin, position, d, HEAD_DIM: tl.constexpr):
    """cos and signed sin of a position, [1, BLOCK_D]: in a head's first half sin has the other sign."""
    row = cos_sin + tl.maximum(position, 0).to(tl.int64) * HEAD_DIM + (d % (HEAD_DIM // 2))[None, :]
    in_head = (d < HEAD_DIM)[None, :]
    cosine = tl.load(row, mask=in_head, other=0.0)
    sine = tl.load(row + HEAD_DIM // 2, mask=in_head, other=0.0)
    return cosine, tl.where((d < HEAD_DIM // 2)[None, :], -sine, sine)


@triton.jit
def rope_append_attention_kernel(
    q,
    k,
    v,
    q_norm,
    k_norm,
    eps,
    positions,
    cos_sin,
    k_cache,
    v_cache,
    block_table,
    out,
    partial,
    tickets,
    kv_heads,
    max_pages,
    splits,
    q_stride,
    k_stride,
    v_stride,
    scale_log2,
    k_scales,
    v_scales,
    FORMAT: tl.constexpr,
    PDL: tl.constexpr,
    HAS_NORM: tl.constexpr,
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
    # 1. Locate: as decode_attention; an idle row has a negative position, which leaves its one split empty.
    # What was written before the preceding kernel began may be read before the wait for it: the position, the
    # table and the cache. The twin starts its cp.async ring here; the compiler's ring cannot start before its
    # loop, so the first tile is loaded into registers.
    split = tl.program_id(0)
    kv = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    position = tl.load(positions + b)
    begin, end, used = split_bounds(tl.maximum(position + 1, 0), split, splits, TILE)
    if split >= used:
        return
    d = tl.arange(0, BLOCK_D)
    cosine, sine = angles(cos_sin, position, d, HEAD_DIM)
    token = begin + tl.arange(0, TILE)
    kt, vt, ks, vs = load_tile(
        k_cache,
        v_cache,
        block_table,
        token=token,
        live=token < tl.minimum(end, position),
        b=b,
        kv=kv,
        kv_heads=kv_heads,
        max_pages=max_pages,
        d=d,
        in_head=(d < HEAD_DIM)[None, :],
        PAGE=PAGE,
        HEAD_DIM=HEAD_DIM,
        k_scales=k_scales,
        v_scales=v_scales,
        FORMAT=FORMAT,
    )
    wait_for_inputs(PDL)
    append_and_attend(
        q,
        k,
        v,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
        position=position,
        cosine=cosine,
        sine=sine,
        kt=kt,
        vt=vt,
        k_cache=k_cache,
        v_cache=v_cache,
        block_table=block_table,
        out=out,
        partial=partial,
        tickets=tickets,
        b=b,
        kv=kv,
        split=split,
        begin=begin,
        end=end,
        used=used,
        kv_heads=kv_heads,
        max_pages=max_pages,
        splits=splits,
        q_stride=q_stride,
        k_stride=k_stride,
        v_stride=v_stride,
        scale_log2=scale_log2,
        HAS_NORM=HAS_NORM,
        GROUP=GROUP,
        ROWS=ROWS,
        HEAD_DIM=HEAD_DIM,
        BLOCK_D=BLOCK_D,
        PAGE=PAGE,
        TILE=TILE,
        SPLIT=SPLIT,
        HEADS=HEADS,
        MERGE=MERGE,
        ks=ks,
        vs=vs,
        k_scales=k_scales,
        v_scales=v_scales,
        FORMAT=FORMAT,
    )


@triton.jit
def append_and_attend(
    q,
    k,
    v,
    q_norm,
    k_norm,
    eps,
    position,
    cosine,
    sine,
    kt,
    vt,
    k_cache,
    v_cache,
    block_table,
    out,
    partial,
    tickets,
    b,
    kv,
    split,
    begin,
    end,
    used,
    kv_heads,
    max_pages,
    splits,
    q_stride,
    k_stride,
    v_stride,
    scale_log2,
    HAS_NORM: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    MERGE: tl.constexpr,
    ks=None,
    vs=None,
    k_scales=None,
    v_scales=None,
    FORMAT: tl.constexpr = PLAIN,
):
    """One split of one KV head; kt, vt, ks and vs are its first tile, as load_tile() returns it. decode_step
    calls it, too."""
    scale_log2, values_scale = layer_scales(k_scales, v_scales, scale_log2, FORMAT)
    g = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    in_head = (d < HEAD_DIM)[None, :]
    token = begin + tl.arange(0, TILE)
    stored = tl.minimum(end, position)  # the tokens before the new one

    # 2. Norm and rotate the query: the heads of the group become the rows of one tile; rows past the group
    # are zero.
    live_out = (g < GROUP)[:, None] & in_head
    qv = turned(
        q + b * q_stride + ((kv * GROUP + g) * HEAD_DIM)[:, None],
        q_norm,
        cosine,
        sine=sine,
        eps=eps,
        d=d[None, :],
        live=live_out,
        HALF_DIM=HEAD_DIM // 2,
        HAS_NORM=HAS_NORM,
    )

    # 3. Append the new token: the program that owns it writes it to the cache, and starts its softmax with
    # it. The twin puts it into its tile in shared memory instead.
    owner = (position >= begin) & (position < end)
    live_new = in_head & owner
    key = turned(
        k + b * k_stride + kv * HEAD_DIM + tl.zeros([1, 1], tl.int32),
        k_norm,
        cosine,
        sine=sine,
        eps=eps,
        d=d[None, :],
        live=live_new,
        HALF_DIM=HEAD_DIM // 2,
        HAS_NORM=HAS_NORM,
    )
    value = tl.load(v + b * v_stride + kv * HEAD_DIM + d[None, :], mask=live_new, other=0.0)
    row = cache_rows(
        block_table, position, owner, b=b, kv=kv, kv_heads=kv_heads, max_pages=max_pages, PAGE=PAGE
    )
    slot = row * HEAD_DIM + d[None, :]
    if FORMAT == PLAIN:
        tl.store(k_cache + slot, key, mask=live_new)
        tl.store(v_cache + slot, value, mask=live_new)
    else:
        # It is attended to as it is stored: as codes, in fp8 without the layer's scales, as the other tokens.
        key, key_scale = append_codes(
            k_cache, k_scales, key, row + tl.arange(0, 1), slot, live_new, owner, FORMAT
        )
        value, value_scale = append_codes(
            v_cache, v_scales, value, row + tl.arange(0, 1), slot, live_new, owner, FORMAT
        )
        if FORMAT == INT8:
            key *= key_scale[:, None]
            value *= value_scale[:, None]
    top = tl.sum(qv.to(tl.float32) * key.to(tl.float32), axis=1) * scale_log2
    top = tl.where(owner, top, float("-inf"))
    mass = tl.where(owner, 1.0, tl.zeros([ROWS], tl.float32))
    acc = value.to(tl.float32) + tl.zeros([ROWS, BLOCK_D], tl.float32)

    if FORMAT != PLAIN:
        qv, scale_log2 = as_float16(qv, scale_log2, FORMAT)

    # 4. Load the tiles: the first is already in registers, the others as in decode_attention.
    top, mass, acc = attend(
        qv,
        kt,
        vt,
        token < stored,
        top=top,
        mass=mass,
        acc=acc,
        scale_log2=scale_log2,
        ks=ks,
        vs=vs,
        FORMAT=FORMAT,
    )
    for t0 in tl.range(begin + TILE, stored, TILE):
        token = t0 + tl.arange(0, TILE)
        live = token < stored
        # Names of their own: decode_step gives no scales for the first tile, and a variable of a loop keeps
        # its type.
        kt, vt, tile_ks, tile_vs = load_tile(
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

        # 5. Online softmax: as in decode_attention.
        top, mass, acc = attend(
            qv,
            kt,
            vt,
            live,
            top=top,
            mass=mass,
            acc=acc,
            scale_log2=scale_log2,
            ks=tile_ks,
            vs=tile_vs,
            FORMAT=FORMAT,
        )

    # 6. Publish the split: if it is the only one, it is the result. An idle row has no mass, and its result
    # is zero.
    if FORMAT != PLAIN:
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

        # 7. Merge in the last block: in the order of the splits, so that the result does not depend on which
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


def rope_append_attention(
    q,
    k,
    v,
    q_norm,
    k_norm,
    eps,
    positions,
    cos_sin,
    k_cache,
    v_cache,
    block_table,
    scale,
    splits,
    partial,
    tickets,
    out,
    k_scales=None,
    v_scales=None,
):
    """Launch splits x kv_heads x batch programs; partial and tickets may be None where splits is 1."""
    batch, q_heads, head_dim = q.shape
    kv_heads, page_size = k_cache.shape[1:3]
    group = q_heads // kv_heads
    cfg = (
        config(CODES, q)[q.itemsize]
        if k_scales is not None
        else (
            measured(
                "rope_append_attention",
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
        rope_append_attention_kernel,
        (splits, kv_heads, batch),
        q,
        k,
        v,
        q_norm,
        k_norm,
        eps,
        positions,
        cos_sin,
        k_cache,
        v_cache,
        block_table,
        out,
        partial,
        tickets,
        kv_heads,
        block_table.shape[1],
        splits,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        scale * math.log2(math.e),
        k_scales,
        v_scales,
        FORMAT=format_of(k_cache),
        HAS_NORM=q_norm is not None,
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
        **dependent_launch(q),
    )
