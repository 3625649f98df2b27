"""Device code of both attention ops: a tile's place in the paged cache, the online softmax, the merge.

Softmax is computed online (Milakov and Gimelshein, arXiv 1805.02867), and splits are merged as in
Flash-Decoding. A running softmax over ROWS query heads is top [ROWS] (the largest score so far, in base 2,
because the hardware has exp2), mass [ROWS] (the sum of weights) and acc [ROWS, BLOCK_D] (the weighted sum of
values).
"""

import triton
import triton.language as tl

from triton_kernels.core.kv_codes import INT8, PLAIN, numbers


@triton.jit
def split_bounds(length, split, splits, TILE: tl.constexpr):
    """The first and the last + 1 of a split's tokens, in whole tiles, and the number of splits that this
    length uses."""
    chunk = tl.maximum(tl.cdiv(tl.cdiv(length, splits), TILE), 1) * TILE
    begin = split * chunk
    return begin, tl.minimum(begin + chunk, length), tl.maximum(tl.cdiv(length, chunk), 1)


@triton.jit
def cache_rows(block_table, token, live, b, kv, kv_heads, max_pages, PAGE: tl.constexpr):
    """Each token's row of KV head `kv` in a cache."""
    page = tl.load(block_table + b * max_pages + token // PAGE, mask=live, other=0).to(tl.int64)
    return (page * kv_heads + kv) * PAGE + token % PAGE


@triton.jit
def layer_scales(k_scales, v_scales, scale_log2, FORMAT: tl.constexpr):
    """(scale of scores, scale of sums of values), which in fp8 include those of the layer's K and V."""
    if FORMAT == PLAIN or FORMAT == INT8:
        scores, values = scale_log2, 1.0
    else:
        scores, values = scale_log2 * tl.load(k_scales), tl.load(v_scales)
    return scores, values


@triton.jit
def load_tile(
    k_cache,
    v_cache,
    block_table,
    token,
    live,
    b,
    kv,
    kv_heads,
    max_pages,
    d,
    in_head,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    k_scales=None,
    v_scales=None,
    FORMAT: tl.constexpr = PLAIN,
):
    """Keys and values of the tokens as they are stored, [TILE, BLOCK_D], zeros where not live, and in int8
    their scales [TILE], otherwise `live` twice. Read only once."""
    row = cache_rows(block_table, token, live, b=b, kv=kv, kv_heads=kv_heads, max_pages=max_pages, PAGE=PAGE)
    where = (row * HEAD_DIM)[:, None] + d[None, :]
    if FORMAT == PLAIN:
        kt = tl.load(k_cache + where, mask=live[:, None] & in_head, other=0.0, eviction_policy="evict_first")
        vt = tl.load(v_cache + where, mask=live[:, None] & in_head, other=0.0, eviction_policy="evict_first")
    else:
        kt = tl.load(k_cache + where, mask=live[:, None] & in_head, other=0, eviction_policy="evict_first")
        vt = tl.load(v_cache + where, mask=live[:, None] & in_head, other=0, eviction_policy="evict_first")
    if FORMAT == INT8:
        ks = tl.load(k_scales + row, mask=live, other=0.0, eviction_policy="evict_first")
        vs = tl.load(v_scales + row, mask=live, other=0.0, eviction_policy="evict_first")
    else:
        ks, vs = live, live
    return kt, vt, ks, vs


@triton.jit
def attend(qv, kt, vt, live, top, mass, acc, scale_log2, ks=None, vs=None, FORMAT: tl.constexpr = PLAIN):
    """The running softmax with a tile of keys and values [TILE, BLOCK_D] added; only live tokens count.

    kt, vt, ks, vs: as load_tile() returns them. In int8 the weights are multiplied by the scales of the
    values,
    and with halves both are then bfloat16, since such a product may be too small for float16.
    """
    if FORMAT != PLAIN:
        kt = numbers(kt, qv.dtype, FORMAT)
        if FORMAT == INT8 and qv.dtype == tl.float16:
            vt = numbers(vt, tl.bfloat16, FORMAT)
        else:
            vt = numbers(vt, qv.dtype, FORMAT)
    score = tl.dot(qv, tl.trans(kt), input_precision="ieee") * scale_log2
    if FORMAT == INT8:
        score = score * ks.to(tl.float32)[None, :]
    score = tl.where(live[None, :], score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, axis=1))
    # All -inf: avoid infinity minus infinity.
    peak = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(score - peak[:, None])
    shrink = tl.exp2(top - peak)
    mass = mass * shrink + tl.sum(weight, axis=1)
    if FORMAT == INT8:
        weight = weight * vs.to(tl.float32)[None, :]
    acc = tl.dot(weight.to(vt.dtype), vt, acc * shrink[:, None], input_precision="ieee")
    return new_top, mass, acc


@triton.jit
def publish(
    partial,
    tickets,
    b,
    kv,
    kv_heads,
    split,
    splits,
    top,
    mass,
    acc,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Stores a split's running softmax in `partial` and returns the ticket that it drew, from 0 on."""
    STRIDE: tl.constexpr = HEAD_DIM + 2
    g = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    mine = partial + (((b * kv_heads + kv) * splits + split) * GROUP + g) * STRIDE
    tl.store(mine[:, None] + d[None, :], acc, mask=(g < GROUP)[:, None] & (d < HEAD_DIM)[None, :])
    tl.store(mine + HEAD_DIM, top, mask=g < GROUP)
    tl.store(mine + HEAD_DIM + 1, mass, mask=g < GROUP)
    # The barrier puts every thread's stores before the ticket; the ticket (acq_rel at GPU scope) makes them
    # visible to the program that draws the last one.
    tl.debug_barrier()
    return tl.atomic_add(tickets + b * kv_heads + kv, 1, sem="acq_rel", scope="gpu")


@triton.jit
def merge(
    partial,
    tickets,
    out_head,
    b,
    kv,
    kv_heads,
    splits,
    used,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Merges the used splits of one KV head into out_head [GROUP, HEAD_DIM], and resets the ticket to zero.

    It takes MERGE splits of all heads at a time, so that their loads are in flight together. HEADS is GROUP
    rounded up to a power of two.
    """
    STRIDE: tl.constexpr = HEAD_DIM + 2
    first = partial + (b * kv_heads + kv) * splits * (GROUP * STRIDE)
    g = tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK_D)
    live_head = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    top = tl.full([HEADS], float("-inf"), tl.float32)
    mass = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, BLOCK_D], tl.float32)
    for s0 in tl.range(0, used, MERGE, loop_unroll_factor=2):
        s = s0 + tl.arange(0, MERGE)
        live = (s < used)[:, None] & (g < GROUP)[None, :]
        part = first + (s[:, None] * GROUP + g[None, :]) * STRIDE
        # .cg reads past L1: other multiprocessors wrote these, and their stores are in L2.
        tops = tl.load(part + HEAD_DIM, mask=live, other=float("-inf"), cache_modifier=".cg")
        masses = tl.load(part + HEAD_DIM + 1, mask=live, other=0.0, cache_modifier=".cg")
        sums = tl.load(
            part[:, :, None] + d[None, None, :],
            mask=live[:, :, None] & (d < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        # All -inf: avoid infinity minus infinity.
        peak = tl.where(new_top == float("-inf"), 0.0, new_top)
        factor = tl.exp2(tops - peak[None, :])
        shrink = tl.exp2(top - peak)
        mass = mass * shrink + tl.sum(factor * masses, axis=0)
        acc = acc * shrink[:, None] + tl.sum(factor[:, :, None] * sums, axis=0)
        top = new_top
    result = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
    tl.store(
        out_head + g[:, None] * HEAD_DIM + d[None, :], result.to(out_head.dtype.element_ty), mask=live_head
    )
    tl.store(tickets + b * kv_heads + kv, 0)  # ready for the next launch


def merge_step(splits, heads, block_d):
    """MERGE, the number of splits merged at a time: up to 4096 numbers over all heads, which take 64
    registers of each thread of two warps."""
    return max(min(triton.next_power_of_2(splits), 16, 4096 // (heads * block_d)), 1)
