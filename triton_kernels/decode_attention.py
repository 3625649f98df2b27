"""decode_attention: out[b,h,:] = sum over tokens t < context_lens[b] of softmax_t(scale * q[b,h,:] . k[t,:]) * v[t,:]

  q [batch, q_heads, head_dim], a view of packed qkv rows: stride(0) free   out [batch, q_heads, head_dim], contiguous
  k_cache, v_cache [pages, kv_heads, page_size, head_dim]
  block_table [batch, max_pages] int32   context_lens [batch] int32
  partial [batch, kv_heads, splits, group, head_dim + 2] float32 (sum, maximum, mass)   tickets [batch, kv_heads], zero
  mapping   a program owns one split of one KV head's tokens, for all the query heads that share it
  traffic   every cached key and value once; q, partial and out are small
  contract  lab/ops/decode_attention.py          twin  cuda_src/decode_attention.cu

Softmax is computed online (Milakov and Gimelshein, arXiv 1805.02867), and the splits are merged as in Flash-Decoding,
here by whichever program of a KV head finishes last. Scores are kept in base 2: exp(x) = exp2(x * log2(e)), and exp2 is
what the hardware has.
"""
import math

import triton
import triton.language as tl

from triton_kernels.common import config, launch

# tile: tokens per step. min_rows: a group's query heads are padded to the 16 rows of a tensor-core tile. Two of the
# num_stages cover the page lookup, which the loads of K and V depend on. float32's dots run on CUDA cores.
HALF = dict(tile=64, min_rows=16, num_warps=2, num_stages=5)
FLOAT = dict(tile=32, min_rows=16, num_warps=8, num_stages=4)
ANY = dict(tile=128, min_rows=1, num_warps=1)
CONFIGS = {"sm_90": {2: HALF, 4: FLOAT}, "sm_80": {2: HALF, 4: FLOAT}, "interpreter": {2: ANY, 4: ANY}}   # by item size


@triton.jit
def decode_attention_kernel(q, k_cache, v_cache, block_table, context_lens, out, partial, tickets,
                            kv_heads, max_pages, splits, q_stride, scale_log2,
                            GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                            PAGE: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr,
                            MERGE: tl.constexpr, PRECISION: tl.constexpr):
    # 1. Locate: the length is read on the device, so one captured graph serves a growing context. Split s owns the
    # tokens from s * chunk on; a short context leaves the last splits empty, and they contribute nothing.
    split = tl.program_id(0)
    kv = tl.program_id(1)
    b = tl.program_id(2)
    length = tl.maximum(tl.load(context_lens + b), 0)
    chunk = tl.cdiv(tl.cdiv(length, splits), TILE) * TILE
    begin = split * chunk
    end = tl.minimum(begin + chunk, length)

    # 2. Load the query: the heads of the group become the rows of one tile; rows past the group are zero.
    g = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    head = kv * GROUP + g
    live_out = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    qv = tl.load(q + b.to(tl.int64) * q_stride + head[:, None] * HEAD_DIM + d[None, :], mask=live_out, other=0.0)

    # 3. Stream the tiles: a token finds its page in the block table. The twin writes the cp.async ring by hand; here
    # the compiler makes it from num_stages. No other program reads these tokens: evict_first.
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for t0 in tl.range(begin, end, TILE):
        token = t0 + tl.arange(0, TILE)
        live = token < end
        page = tl.load(block_table + b.to(tl.int64) * max_pages + token // PAGE, mask=live, other=0).to(tl.int64)
        where = (((page * kv_heads + kv) * PAGE + token % PAGE) * HEAD_DIM)[:, None] + d[None, :]
        live_kv = live[:, None] & (d < HEAD_DIM)[None, :]
        kt = tl.load(k_cache + where, mask=live_kv, other=0.0, eviction_policy="evict_first")
        vt = tl.load(v_cache + where, mask=live_kv, other=0.0, eviction_policy="evict_first")
        score = tl.dot(qv, tl.trans(kt), input_precision=PRECISION) * scale_log2
        score = tl.where(live[None, :], score, float("-inf"))

        # 4. Online softmax: a new maximum shrinks what has been summed so far. Both products run on tensor cores, so
        # the weights are rounded to T for the second one (their sum is not); the twin multiplies in float32.
        new_top = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        mass = mass * shrink + tl.sum(weight, axis=1)
        acc = tl.dot(weight.to(vt.dtype), vt, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top

    # 5. Publish the split: alone, it is the result. A length of zero has no mass, and its result is zero.
    out_head = out + (b.to(tl.int64) * kv_heads + kv) * (GROUP * HEAD_DIM)
    if not SPLIT:
        result = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
        tl.store(out_head + g[:, None] * HEAD_DIM + d[None, :], result.to(out.dtype.element_ty), mask=live_out)
    else:
        STRIDE: tl.constexpr = HEAD_DIM + 2
        first = partial + (b.to(tl.int64) * kv_heads + kv) * splits * (GROUP * STRIDE)
        mine = first + (split * GROUP + g) * STRIDE
        tl.store(mine[:, None] + d[None, :], acc, mask=live_out)
        tl.store(mine + HEAD_DIM, top, mask=g < GROUP)
        tl.store(mine + HEAD_DIM + 1, mass, mask=g < GROUP)
        # Every thread's stores come before the ticket (the barrier), and the ticket orders them for whoever draws the
        # last one (acq_rel at GPU scope).
        tl.debug_barrier()
        ticket = tl.atomic_add(tickets + b * kv_heads + kv, 1, sem="acq_rel", scope="gpu")

        # 6. Merge in the last block: split by split in a fixed order, so the result does not depend on who came last.
        if ticket == splits - 1:
            every = tl.arange(0, SPLITS)
            for h in range(GROUP):
                row = first + (every * GROUP + h) * STRIDE
                # .cg: other SMs wrote these; read them from L2, where they meet.
                tops = tl.load(row + HEAD_DIM, mask=every < splits, other=float("-inf"), cache_modifier=".cg")
                peak = tl.max(tops, axis=0)
                peak = tl.where(peak == float("-inf"), 0.0, peak)       # no token at all: no infinity minus infinity
                total = tl.zeros([MERGE], tl.float32)
                merged = tl.zeros([MERGE, BLOCK_D], tl.float32)
                for s0 in range(0, splits, MERGE):
                    s = s0 + tl.arange(0, MERGE)
                    live = s < splits
                    part = first + (s * GROUP + h) * STRIDE
                    heights = tl.load(part + HEAD_DIM, mask=live, other=float("-inf"), cache_modifier=".cg")
                    factor = tl.exp2(heights - peak)
                    total += factor * tl.load(part + HEAD_DIM + 1, mask=live, other=0.0, cache_modifier=".cg")
                    sums = tl.load(part[:, None] + d[None, :], mask=live[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
                                   cache_modifier=".cg")
                    merged += factor[:, None] * sums
                total = tl.sum(total, axis=0)
                result = tl.sum(merged, axis=0) / tl.where(total == 0.0, 1.0, total)
                tl.store(out_head + h * HEAD_DIM + d, result.to(out.dtype.element_ty), mask=d < HEAD_DIM)
            tl.store(tickets + b * kv_heads + kv, 0)            # ready for the next launch


def decode_attention(q, k_cache, v_cache, block_table, context_lens, scale, splits, partial, tickets, out):
    """Launch splits x kv_heads x batch programs; partial and tickets are used only if splits > 1."""
    cfg = config(CONFIGS, q)[q.itemsize]
    batch, q_heads, head_dim = q.shape
    kv_heads, page_size = k_cache.shape[1:3]
    group = q_heads // kv_heads
    options = {key: value for key, value in cfg.items() if key.startswith("num_")}
    most_splits = triton.next_power_of_2(splits)
    launch(decode_attention_kernel, (splits, kv_heads, batch), q, k_cache, v_cache, block_table, context_lens, out,
           partial, tickets, kv_heads, block_table.shape[1], splits, q.stride(0), scale * math.log2(math.e),
           GROUP=group, ROWS=max(triton.next_power_of_2(group), cfg["min_rows"]), HEAD_DIM=head_dim,
           BLOCK_D=triton.next_power_of_2(head_dim), PAGE=page_size, TILE=cfg["tile"], SPLIT=splits > 1,
           SPLITS=most_splits, MERGE=min(most_splits, 16), PRECISION="ieee", **options)
