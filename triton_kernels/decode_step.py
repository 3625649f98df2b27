"""decode_step: a whole decode step of one sequence in one launch: embedding, every layer, lm_head and argmax

  ids, positions, out [1] int32; out may be ids   logits [1, vocab] float32
  table [layers, 10] int64: addresses
  k_cache, v_cache [layers, pages, kv_heads, page_size, head_dim]   block_table [1, max_pages] int32
  h, qkv, attention, act: rows that one phase writes and the next reads   counters: zero on entry and on exit
  mapping   one program per multiprocessor, all resident. A program has an equal share of every matrix's rows,
            which it takes one after the other, and a split of one KV head. Between two phases every program
            waits for all others
  traffic   every weight and the context's KV once; the rows, from L2, once per program
  contract  lab/ops/decode_step.py          twin  cuda_src/decode_step.cu

The weights of a phase depend on no other program, so the loads of its first two tiles are issued before the
wait: DRAM is busy while programs wait, and while they normalise. BLOCK_K covers k: a program multiplies whole
rows of w with a whole row of x, and both stay in registers.
"""

import math

import triton
import triton.language as tl

from lab.ops import step_layout
from triton_kernels.common import config, launch
from triton_kernels.core.fused_product import load_rows, normed_rows
from triton_kernels.core.split_attention import load_tile, merge_step, split_bounds
from triton_kernels.norm_linear_argmax import first_best, keep_best
from triton_kernels.norm_linear_silu_mul import activate
from triton_kernels.rope_append_attention import angles, append_and_attend
from triton_kernels.settings import measured, multiprocessors

BARRIER, BEST, TICKET, TICKETS = map(
    tl.constexpr, (step_layout.BARRIER, step_layout.BEST, step_layout.TICKET, step_layout.TICKETS)
)
# Columns of `table`: LAYER of the contract.
(ATTN_NORM, WQKV, BQKV, Q_NORM, K_NORM, WO, BO, MLP_NORM, W_GATE_UP, W_DOWN) = map(tl.constexpr, range(10))
LAYER = tl.constexpr(len(step_layout.LAYER))
LOW_31_BITS = tl.constexpr(2147483647)

# elements: the size of a tile of weights, 32 KiB, which takes 32 registers of each thread; two tiles are in
# flight. An H100 needs about 32 KiB in flight in each multiprocessor, an A100 20; the rest covers the waits.
# A program of 8 warps has all registers of a multiprocessor. With 16 warps, the values that every thread
# keeps would take twice as many registers, and spill. tile, min_rows: as in rope_append_attention. splits: of
# a KV head; by default as many as there are programs for.
HALF = dict(elements=1 << 14, tile=64, min_rows=16, num_warps=8, num_stages=5)
CPU = dict(elements=1 << 18, tile=32, min_rows=1, num_warps=1, programs=2, splits=4)
CONFIGS = {"sm_90": HALF, "sm_80": dict(HALF, elements=1 << 13), "interpreter": CPU}


@triton.jit
def arrive(counters, target):
    """Counts this program as arrived: it has stored its results. Returns the number of arrivals that the next
    wait must see."""
    tl.debug_barrier()  # every thread's stores come before the arrival
    # The result is not used, so this compiles to a reduction, and no thread waits for an answer.
    tl.atomic_add(counters + BARRIER, 1, sem="release", scope="gpu")
    return target + tl.num_programs(0)


@triton.jit
def wait(counters, target):
    """Waits until all programs have arrived: one thread polls for all. The acquire also invalidates the L1,
    so that later ordinary loads read what other multiprocessors have written."""
    while tl.atomic_add(counters + BARRIER, 0, sem="acquire", scope="gpu") < target:
        pass


@triton.jit
def tensor_at(table, part: tl.constexpr, like):
    """The address of a layer's tensor, as a pointer of the type of `like`."""
    return tl.multiple_of(tl.load(table + part).to(like.dtype), 16)


@triton.jit
def load_added(bias, residual, column, end):
    """The values to which a tile's sums are added. No other program writes them, so they may be read before a
    wait."""
    b = tl.zeros(column.shape, tl.float32)
    r = tl.zeros(column.shape, tl.float32)
    if bias is not None:
        b = tl.load(bias + column, mask=column < end, other=0.0).to(tl.float32)
    if residual is not None:
        r = tl.load(residual + column, mask=column < end, other=0.0).to(tl.float32)
    return b, r


@triton.jit
def product(
    counters,
    target,
    x,
    norm_w,
    eps,
    w,
    bias,
    residual,
    y,
    n,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAIRS: tl.constexpr = False,
    ARGMAX: tl.constexpr = False,
):
    """y[j] = xn . w[j] (+ bias[j]) (+ residual[j]) for this program's share of n outputs; xn: x or its norm.

    With PAIRS y[j] = silu(xn . w[j]) * (xn . w[n + j]). With ARGMAX it returns its best outputs and their
    indices, [1, BLOCK_N]. Optional arguments may be None.
    """
    PARTS: tl.constexpr = 2 if PAIRS else 1
    EVEN_K: tl.constexpr = K == BLOCK_K
    first = (tl.program_id(0) * n) // tl.num_programs(0)
    end = ((tl.program_id(0) + 1) * n) // tl.num_programs(0)
    column = first + tl.arange(0, BLOCK_N)[None, :]
    i = tl.arange(0, PARTS * BLOCK_N)[None, :, None]
    row = i // PARTS + (i % PARTS) * n  # gate and up alternate, as in norm_linear_silu_mul
    left = end - first
    col = tl.arange(0, BLOCK_K)[None, None, :]

    # The rows of a tile are at constant distances from w, so that one register holds all their addresses.
    w += first.to(tl.int64) * K
    tile = load_rows(w, row, i < PARTS * left, col, K, EVEN_K)
    ahead = load_rows(w + BLOCK_N * K, row, i < PARTS * (left - BLOCK_N), col, K, EVEN_K)
    b, r = load_added(bias, residual, column, end)
    if norm_w is not None:
        weight = tl.load(norm_w + col, mask=col < K, other=0.0, eviction_policy="evict_last")
    wait(counters, target)
    if norm_w is not None:
        xn = normed_rows(x, weight, rows=1, k=K, eps=eps, b=tl.zeros([1, 1, 1], tl.int32), col=col)
    else:
        xn = tl.load(x + col, mask=col < K, other=0.0, eviction_policy="evict_last")

    best = tl.full([1, BLOCK_N], float("-inf"), tl.float32)
    index = tl.full([1, BLOCK_N], LOW_31_BITS, tl.int32)
    for _ in range(first, end, BLOCK_N):
        total = tl.sum(tile.to(tl.float32) * xn.to(tl.float32), axis=2)
        tile = ahead
        w += BLOCK_N * K
        left -= BLOCK_N
        ahead = load_rows(w + BLOCK_N * K, row, i < PARTS * (left - BLOCK_N), col, K, EVEN_K)
        if PAIRS:
            total = activate(total, BLOCK_B=1, BLOCK_N=BLOCK_N)
        else:
            total = r + (total + b)
        tl.store(y + column, total.to(y.dtype.element_ty), mask=column < end)
        if ARGMAX:
            best, index = keep_best(best, index, tl.where(column < end, total, float("-inf")), column)
        column += BLOCK_N
        b, r = load_added(bias, residual, column, end)
    return best, index


@triton.jit
def first_tile(
    k_cache,
    v_cache,
    block_table,
    position,
    item,
    splits,
    kv_heads,
    max_pages,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Bounds of split item % splits, and its first tile of KV head item / splits; zeros past the last."""
    begin, end, used = split_bounds(position + 1, item % splits, splits, TILE)
    d = tl.arange(0, BLOCK_D)
    token = begin + tl.arange(0, TILE)
    live = (token < tl.minimum(end, position)) & (item < kv_heads * splits)
    kt, vt, _, _ = load_tile(
        k_cache,
        v_cache,
        block_table,
        token=token,
        live=live,
        b=0,
        kv=item // splits,
        kv_heads=kv_heads,
        max_pages=max_pages,
        d=d,
        in_head=(d < HEAD_DIM)[None, :],
        PAGE=PAGE,
        HEAD_DIM=HEAD_DIM,
    )
    return begin, end, used, kt, vt


@triton.jit
def decode_step_kernel(
    embed,
    ids,
    positions,
    table,
    final_norm,
    lm_head,
    cos_sin,
    k_cache,
    v_cache,
    block_table,
    logits,
    out,
    h,
    qkv,
    attention,
    act,
    partial,
    counters,
    layers,
    vocab,
    cache_stride,
    max_pages,
    splits,
    eps,
    scale_log2,
    HIDDEN: tl.constexpr,
    MIDDLE: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_BQKV: tl.constexpr,
    HAS_BO: tl.constexpr,
    HAS_QK_NORM: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_MIDDLE: tl.constexpr,
    N_QKV: tl.constexpr,
    N_O: tl.constexpr,
    N_GATE: tl.constexpr,
    N_DOWN: tl.constexpr,
    N_HEAD: tl.constexpr,
):
    # 1. Locate: the residual starts as a row of embed. A token id outside the vocabulary turns everything to
    # NaN, from the first norm on.
    position = tl.load(positions)
    if position < 0:
        return
    token = tl.load(ids)
    known = (token >= 0) & (token < vocab)
    eps = tl.where(known, eps, float("nan"))
    residual = embed + tl.where(known, token, 0).to(tl.int64) * HIDDEN
    Q: tl.constexpr = GROUP * KV_HEADS * HEAD_DIM
    KV: tl.constexpr = KV_HEADS * HEAD_DIM
    cosine, sine = angles(cos_sin, position, tl.arange(0, BLOCK_D), HEAD_DIM)

    # 2. Load ahead: the twin has a thread that copies the weights of all phases ahead. Here each phase issues
    # the loads of two tiles into registers and then waits for `target` arrivals (see product()); the first
    # phase waits for none.
    target = 0

    # 3. Layers: norm and qkv, attention, o, norm and gate and up, down; each phase ends when all programs
    # have arrived. Then the logits, of which a program keeps its best.
    for _ in range(layers):
        product(
            counters,
            target,
            x=residual,
            norm_w=tensor_at(table, ATTN_NORM, embed),
            eps=eps,
            w=tensor_at(table, WQKV, embed),
            bias=tensor_at(table, BQKV, embed) if HAS_BQKV else None,
            residual=None,
            y=qkv,
            n=Q + 2 * KV,
            K=HIDDEN,
            BLOCK_N=N_QKV,
            BLOCK_K=BLOCK_HIDDEN,
        )
        target = arrive(counters, target)

        # A program has one split of a KV head, or none; where there are more KV heads than programs, several.
        q_norm = tensor_at(table, Q_NORM, embed)
        k_norm = tensor_at(table, K_NORM, embed)
        item = tl.program_id(0)
        begin, end, used, kt, vt = first_tile(
            k_cache,
            v_cache,
            block_table,
            position=position,
            item=item,
            splits=splits,
            kv_heads=KV_HEADS,
            max_pages=max_pages,
            HEAD_DIM=HEAD_DIM,
            BLOCK_D=BLOCK_D,
            PAGE=PAGE,
            TILE=TILE,
        )
        wait(counters, target)
        while item < KV_HEADS * splits:
            if item % splits < used:
                append_and_attend(
                    qkv,
                    qkv + Q,
                    qkv + Q + KV,
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
                    out=attention,
                    partial=partial,
                    tickets=counters + TICKETS,
                    b=0,
                    kv=item // splits,
                    split=item % splits,
                    begin=begin,
                    end=end,
                    used=used,
                    kv_heads=KV_HEADS,
                    max_pages=max_pages,
                    splits=splits,
                    q_stride=0,
                    k_stride=0,
                    v_stride=0,
                    scale_log2=scale_log2,
                    HAS_NORM=HAS_QK_NORM,
                    GROUP=GROUP,
                    ROWS=ROWS,
                    HEAD_DIM=HEAD_DIM,
                    BLOCK_D=BLOCK_D,
                    PAGE=PAGE,
                    TILE=TILE,
                    SPLIT=SPLIT,
                    HEADS=HEADS,
                    MERGE=MERGE,
                )
            item += tl.num_programs(0)
            begin, end, used, kt, vt = first_tile(
                k_cache,
                v_cache,
                block_table,
                position=position,
                item=item,
                splits=splits,
                kv_heads=KV_HEADS,
                max_pages=max_pages,
                HEAD_DIM=HEAD_DIM,
                BLOCK_D=BLOCK_D,
                PAGE=PAGE,
                TILE=TILE,
            )
        target = arrive(counters, target)

        # In the first layer the residual is the row of embed, in the others h.
        product(
            counters,
            target,
            x=attention,
            norm_w=None,
            eps=eps,
            w=tensor_at(table, WO, embed),
            bias=tensor_at(table, BO, embed) if HAS_BO else None,
            residual=residual,
            y=h,
            n=HIDDEN,
            K=Q,
            BLOCK_N=N_O,
            BLOCK_K=BLOCK_HEADS,
        )
        target = arrive(counters, target)

        product(
            counters,
            target,
            x=h,
            norm_w=tensor_at(table, MLP_NORM, embed),
            eps=eps,
            w=tensor_at(table, W_GATE_UP, embed),
            bias=None,
            residual=None,
            y=act,
            n=MIDDLE,
            K=HIDDEN,
            BLOCK_N=N_GATE,
            BLOCK_K=BLOCK_HIDDEN,
            PAIRS=True,
        )
        target = arrive(counters, target)

        product(
            counters,
            target,
            x=act,
            norm_w=None,
            eps=eps,
            w=tensor_at(table, W_DOWN, embed),
            bias=None,
            residual=h,
            y=h,
            n=HIDDEN,
            K=MIDDLE,
            BLOCK_N=N_DOWN,
            BLOCK_K=BLOCK_MIDDLE,
        )
        target = arrive(counters, target)
        residual = h
        table += LAYER
        k_cache += cache_stride
        v_cache += cache_stride

    best, index = product(
        counters,
        target,
        x=residual,
        norm_w=final_norm,
        eps=eps,
        w=lm_head,
        bias=None,
        residual=None,
        y=logits,
        n=vocab,
        K=HIDDEN,
        BLOCK_N=N_HEAD,
        BLOCK_K=BLOCK_HIDDEN,
        ARGMAX=True,
    )
    best, index = first_best(best, index, axis=1)  # [1, 1], and a scalar for the atomic
    best = tl.max(tl.reshape(best, [1]), axis=0)
    index = tl.max(tl.reshape(index, [1]), axis=0)

    # 4. Argmax in the last block: a logit and its index become one integer, which is larger for a larger
    # logit, and for equal ones for a lower index (keep_best turns NaN into infinity with index -1). The
    # counters are reset to zero, which is safe because all programs have passed their last wait.
    bits = best.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, ~bits, bits | (-2147483647 - 1)).to(tl.uint32, bitcast=True).to(tl.int64)
    top = (counters + BEST).to(tl.pointer_type(tl.int64))
    tl.atomic_max(
        top,
        (ordered << 31) | (~index + LOW_31_BITS).to(tl.int64),
        mask=index < vocab,
        sem="relaxed",
        scope="gpu",
    )
    if tl.atomic_add(counters + TICKET, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        lowest = (tl.atomic_max(top, 0, sem="relaxed", scope="gpu") & LOW_31_BITS).to(tl.int32)
        tl.store(out, ~lowest + LOW_31_BITS)
        tl.store(top, 0)
        tl.store(counters + TICKET, 0)
        tl.store(counters + BARRIER, 0)


def decode_step(ids, positions, model, k_cache, v_cache, block_table, logits, workspace, out):
    """Launch one program per multiprocessor; the settings `per_multiprocessor` or `programs` change that."""
    m, w, embed = model, workspace, model.embed
    (vocab, hidden), middle, kv_heads, head_dim, page_size = (
        m.lm_head.shape,
        m.intermediate,
        m.kv_heads,
        m.head_dim,
        k_cache.shape[3],
    )
    cfg = measured(
        "decode_step",
        embed,
        1,
        hidden=hidden,
        intermediate=middle,
        q_heads=m.q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    ) or config(CONFIGS, embed)
    programs = cfg.get("programs") or cfg.get("per_multiprocessor", 1) * multiprocessors(embed)
    splits = cfg.get("splits") or max(min(step_layout.MAX_SPLITS, programs // kv_heads), 1)
    options = {key: value for key, value in cfg.items() if key.startswith("num_")}
    heads, block_d, q = (
        triton.next_power_of_2(m.group),
        triton.next_power_of_2(head_dim),
        m.q_heads * head_dim,
    )
    layer = m.layers[0]

    def rows(n, k, parts=1):
        """BLOCK_N: as many rows as fit into a tile, but at most a program's share."""
        return min(
            max(cfg["elements"] // (parts * triton.next_power_of_2(k)), 1),
            triton.next_power_of_2(triton.cdiv(n, programs)),
        )

    held = (
        tensor for one in m.layers for part in step_layout.LAYER if (tensor := getattr(one, part)) is not None
    )
    launch(
        decode_step_kernel,
        (programs,),
        embed,
        ids,
        positions,
        m.table,
        m.final_norm,
        m.lm_head,
        m.cos_sin,
        k_cache,
        v_cache,
        block_table,
        logits,
        out,
        w.h,
        w.qkv,
        w.attention,
        w.act,
        w.partial,
        w.counters,
        len(m.layers),
        vocab,
        k_cache.stride(0),
        block_table.shape[1],
        splits,
        m.eps,
        m.scale * math.log2(math.e),
        reads=held,
        HIDDEN=hidden,
        MIDDLE=middle,
        GROUP=m.group,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HAS_BQKV=layer.bqkv is not None,
        HAS_BO=layer.bo is not None,
        HAS_QK_NORM=layer.q_norm is not None,
        PAGE=page_size,
        ROWS=max(heads, cfg["min_rows"]),
        HEADS=heads,
        BLOCK_D=block_d,
        TILE=cfg["tile"],
        SPLIT=splits > 1,
        MERGE=merge_step(splits, heads, block_d),
        BLOCK_HIDDEN=triton.next_power_of_2(hidden),
        BLOCK_HEADS=triton.next_power_of_2(q),
        BLOCK_MIDDLE=triton.next_power_of_2(middle),
        N_QKV=rows(q + 2 * kv_heads * head_dim, hidden),
        N_O=rows(hidden, q),
        N_GATE=rows(middle, hidden, 2),
        N_DOWN=rows(hidden, middle),
        N_HEAD=rows(vocab, hidden),
        launch_cooperative_grid=True,
        **options,
    )
