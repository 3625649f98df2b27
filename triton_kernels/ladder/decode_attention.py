"""The ladder of decode_attention: out[b,h,:] = softmax(scale * q[b,h,:] . K^T) V, from token by
token to a pipeline.

  Each rung changes one thing of the rung before it. What it should gain, and why: lab/rungs/.
  head_dim 64 or 128. Numbers and names are the twin's; rungs that Triton's compiler decides about are absent.
  twin  cuda_src/ladder/decode_attention.cu          the op's own kernel  triton_kernels/decode_attention.py
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def attention_naive_kernel(
    q,
    k_cache,
    v_cache,
    block_table,
    context_lens,
    out,
    kv_heads,
    max_pages,
    q_stride,
    scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
):
    # 1. Naive: a program of one warp per query head goes through its context token by token.
    h, b = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, D)
    query = tl.load(q + b.to(tl.int64) * q_stride + h * D + d).to(tl.float32) * scale
    acc = tl.zeros([D], tl.float32)
    top, mass = float("-inf"), 0.0
    length = tl.load(context_lens + b)
    for t in range(0, length):
        page = tl.load(block_table + b.to(tl.int64) * max_pages + t // PAGE).to(tl.int64)
        at = ((page * kv_heads + h // GROUP) * PAGE + t % PAGE) * D + d
        score = tl.sum(query * tl.load(k_cache + at).to(tl.float32), axis=0)
        new_top = tl.maximum(top, score)
        shrink, weight = tl.exp(top - new_top), tl.exp(score - new_top)
        mass = mass * shrink + weight
        acc = acc * shrink + weight * tl.load(v_cache + at).to(tl.float32)
        top = new_top
    result = acc / tl.where(mass == 0.0, 1.0, mass)  # without any token: zeros
    tl.store(out + (b.to(tl.int64) * kv_heads * GROUP + h) * D + d, result.to(out.dtype.element_ty))


@triton.jit
def publish(
    out, partial, row, split, splits, acc, top, mass, live, group, D: tl.constexpr, SPLIT: tl.constexpr
):
    """Stores the result of the rows `row` of [batch * q_heads], or their part of it for the merge kernel.

    partial [batch, kv_heads, splits, group, D + 2]: sums, maximum, mass."""
    d = tl.arange(0, D)
    if not SPLIT:
        result = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
        tl.store(out + row[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=live[:, None])
    else:
        mine = partial + ((row // group * splits + split) * group + row % group) * (D + 2)
        tl.store(mine[:, None] + d[None, :], acc, mask=live[:, None])
        tl.store(mine + D, top, mask=live)
        tl.store(mine + D + 1, mass, mask=live)


@triton.jit
def attention_head_kernel(
    q,
    k_cache,
    v_cache,
    block_table,
    context_lens,
    out,
    partial,
    kv_heads,
    max_pages,
    splits,
    q_stride,
    scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # 3. Vectorised: a tile of tokens in each step, so that a warp loads 16 bytes a lane of several tokens at
    # once.
    #
    # 4. Split-KV: the same kernel with `splits` programs for each query head, and a second kernel that merges
    # them. Only now is there work for the whole card.
    split, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, D)
    query = tl.load(q + b.to(tl.int64) * q_stride + h * D + d).to(tl.float32) * scale
    length = tl.maximum(tl.load(context_lens + b), 0)
    chunk = tl.cdiv(length, splits)
    end = tl.minimum(split * chunk + chunk, length)
    acc = tl.zeros([D], tl.float32)
    top, mass = float("-inf"), 0.0
    for t0 in range(split * chunk, end, TILE):
        t = t0 + tl.arange(0, TILE)
        live = t < end
        page = tl.load(block_table + b.to(tl.int64) * max_pages + t // PAGE, mask=live, other=0).to(tl.int64)
        at = (((page * kv_heads + h // GROUP) * PAGE + t % PAGE) * D)[:, None] + d[None, :]
        key = tl.load(k_cache + at, mask=live[:, None], other=0.0).to(tl.float32)
        value = tl.load(v_cache + at, mask=live[:, None], other=0.0).to(tl.float32)
        score = tl.where(live, tl.sum(query[None, :] * key, axis=1), float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=0))
        shrink, weight = tl.exp(top - new_top), tl.exp(score - new_top)
        mass = mass * shrink + tl.sum(weight, axis=0)
        acc = acc * shrink + tl.sum(weight[:, None] * value, axis=0)
        top = new_top
    one = tl.zeros([1], tl.int64)
    row = one + b * (kv_heads * GROUP) + h
    publish(
        out,
        partial,
        row,
        split=split,
        splits=splits,
        acc=acc[None, :],
        top=top + one.to(tl.float32),
        mass=mass + one.to(tl.float32),
        live=one == 0,
        group=GROUP,
        D=D,
        SPLIT=SPLIT,
    )


@triton.jit
def attention_group_kernel(
    q,
    k_cache,
    v_cache,
    block_table,
    context_lens,
    out,
    partial,
    kv_heads,
    max_pages,
    splits,
    q_stride,
    scale,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    # 5. Group: a program serves all query heads of a KV head, so that each key and value is loaded once for
    # all of them. The heads are the rows of a tensor-core tile, padded to 16. Where the twin multiplies head
    # by head, here both matrix products are dots, and the weights are rounded to T for the second one.
    #
    # 6. Pipeline: the same kernel with STAGES tiles in flight; the compiler writes the cp.async ring.
    split, kv, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d, g = tl.arange(0, D), tl.arange(0, ROWS)
    query = tl.load(
        q + b.to(tl.int64) * q_stride + (kv * GROUP + g)[:, None] * D + d[None, :],
        mask=(g < GROUP)[:, None],
        other=0.0,
    )
    length = tl.maximum(tl.load(context_lens + b), 0)
    chunk = tl.cdiv(length, splits)
    end = tl.minimum(split * chunk + chunk, length)
    acc = tl.zeros([ROWS, D], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    for t0 in tl.range(split * chunk, end, TILE, num_stages=STAGES):
        t = t0 + tl.arange(0, TILE)
        live = t < end
        page = tl.load(block_table + b.to(tl.int64) * max_pages + t // PAGE, mask=live, other=0).to(tl.int64)
        at = (((page * kv_heads + kv) * PAGE + t % PAGE) * D)[:, None] + d[None, :]
        key = tl.load(k_cache + at, mask=live[:, None], other=0.0)
        value = tl.load(v_cache + at, mask=live[:, None], other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(live[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        shrink, weight = tl.exp(top - new_top), tl.exp(score - new_top[:, None])
        mass = mass * shrink + tl.sum(weight, axis=1)
        acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    row = b.to(tl.int64) * (kv_heads * GROUP) + kv * GROUP + g
    publish(
        out,
        partial,
        row,
        split=split,
        splits=splits,
        acc=acc,
        top=top,
        mass=mass,
        live=g < GROUP,
        group=GROUP,
        D=D,
        SPLIT=SPLIT,
    )


@triton.jit
def attention_merge_kernel(partial, out, splits, GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr):
    """The second kernel of rungs 4 to 6: a program per query head, all its splits at once."""
    row = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, SPLITS), tl.arange(0, D)
    live = s < splits
    part = partial + ((row // GROUP * splits + s) * GROUP + row % GROUP) * (D + 2)
    top = tl.load(part + D, mask=live, other=float("-inf"))
    peak = tl.max(top, axis=0)
    # Without any token: avoid infinity minus infinity.
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    factor = tl.exp(top - peak)
    mass = tl.sum(factor * tl.load(part + D + 1, mask=live, other=0.0), axis=0)
    sums = tl.load(part[:, None] + d[None, :], mask=live[:, None], other=0.0)
    result = tl.sum(factor[:, None] * sums, axis=0) / tl.where(mass == 0.0, 1.0, mass)
    tl.store(out + row * D + d, result.to(out.dtype.element_ty))


def decode_attention(
    rung, q, k_cache, v_cache, block_table, context_lens, scale, splits, partial, tickets, out
):
    """Launch rung 1, 3, 4, 5 or 6: from 4 on, with splits > 1, two kernels. Only the op's own kernel uses
    tickets."""
    batch, q_heads, dim = q.shape
    kv_heads, page = k_cache.shape[1:3]
    group = q_heads // kv_heads
    args = (q, k_cache, v_cache, block_table, context_lens, out)
    sizes = (q.stride(0), scale)
    meta = dict(GROUP=group, D=dim, PAGE=page)
    if rung == 1:
        return launch(
            attention_naive_kernel,
            (q_heads, batch),
            *args,
            kv_heads,
            block_table.shape[1],
            *sizes,
            **meta,
            num_warps=1,
        )
    splits = 1 if rung == 3 else splits
    args = (*args, partial, kv_heads, block_table.shape[1], splits, *sizes)
    meta["SPLIT"] = splits > 1
    if rung in (3, 4):
        launch(
            attention_head_kernel,
            (splits, q_heads, batch),
            *args,
            **meta,
            TILE=16,
            num_warps={3: 1, 4: 4}[rung],
        )
    else:
        rows = max(16, triton.next_power_of_2(group))
        launch(
            attention_group_kernel,
            (splits, kv_heads, batch),
            *args,
            **meta,
            ROWS=rows,
            TILE=128 // q.itemsize,
            STAGES={5: 1, 6: 4}[rung],
            num_warps=4,
        )
    if splits > 1:
        launch(
            attention_merge_kernel,
            (batch * q_heads,),
            partial,
            out,
            splits,
            GROUP=group,
            D=dim,
            SPLITS=triton.next_power_of_2(splits),
        )
