"""decode_step: a whole decode step of one sequence in one launch: embedding, every layer, lm_head and argmax

  ids, positions, out [1] int32; out may be ids   logits [1, vocab] float32
  table [layers, 10] int64: addresses; more columns where any matrix is packed (lab/ops/step_layout.py)
  k_cache, v_cache [layers, pages, kv_heads, page_size, head_dim], k_scales, v_scales (lab/formats/kv.py)
  block_table [1, max_pages] int32
  h, qkv, attention, act: rows that one phase writes and the next reads   counters: zero on entry and on exit
  mapping   one program per multiprocessor, all resident. A program has an equal share of every matrix's rows,
            which it takes one after the other, and a split of one KV head. Between two phases every program
            waits for all others
  traffic   every weight and the context's KV once; the rows, from L2, once per program
  contract  lab/ops/decode_step.py          twin  cuda_src/decode_step.cu

The weights of a phase depend on no other program, so the loads of its first two tiles are issued before the
wait: DRAM is busy while programs wait, and while they normalise. BLOCK_K covers k: a program multiplies whole
rows of w with a whole row of x, and both stay in registers. Packed weights go through shared memory, and L2
is asked for the first ones before the wait: see core/step_product.py.
"""

import math

import triton
import triton.language as tl

from lab.errors import LabError
from lab.formats import PackedMatrix
from lab.ops import step_layout
from lab.ops.decode_step import apart_of
from triton_kernels.common import architecture, config, launch
from triton_kernels.core.kv_codes import PLAIN, format_of
from triton_kernels.core.packed_rows import operands
from triton_kernels.core.split_attention import load_tile, merge_step, split_bounds
from triton_kernels.core.step_product import (
    any_product,
    arrive,
    layer_product,
    qkv_product,
    tensor_at,
    unpack_token,
    wait,
)
from triton_kernels.core.step_trace import TRACE_LAYER, TRACE_STEP, begin_trace, end_trace, record
from triton_kernels.norm_linear_argmax import first_best
from triton_kernels.rope_append_attention import angles, append_and_attend
from triton_kernels.settings import measured, multiprocessors, packed_interpreted

BARRIER, BEST, TICKET, TICKETS = map(
    tl.constexpr, (step_layout.BARRIER, step_layout.BEST, step_layout.TICKET, step_layout.TICKETS)
)
# Columns of `table`: LAYER of the contract.
(ATTN_NORM, WQKV, BQKV, Q_NORM, K_NORM, WO, BO, MLP_NORM, W_GATE_UP, W_DOWN) = map(tl.constexpr, range(10))
LOW_31_BITS = tl.constexpr(2147483647)

# elements: the size of a tile of weights, 32 KiB, which takes 32 registers of each thread; two tiles are in
# flight. An H100 needs about 32 KiB in flight in each multiprocessor, an A100 20; the rest covers the waits.
# A program of 8 warps has all registers of a multiprocessor. With 16 warps, the values that every thread
# keeps would take twice as many registers, and spill. tile, min_rows: as in rope_append_attention, but fewer
# stages: shared memory is taken from L1, through which the weights come. On an H100 Llama 3.1 8B takes
# 7.98 ms with 5 stages (68 KiB) and 6.26 with 3 (35 KiB); 1 or 2 stages change nothing more. splits: of a KV
# head; by default as many as there are programs for. packed: as in core/packed_rows.py; every warp has
# segments of its own, and L2 is asked for as many bytes ahead as a tile has in four steps, 64 KiB.
OF_PACKED = dict(BLOCK_N=32, SEGMENTS=8, STAGES=4)
HALF = dict(elements=1 << 14, packed=OF_PACKED, tile=64, min_rows=16, num_warps=8, num_stages=3)
CPU = dict(elements=1 << 18, packed=None, tile=32, min_rows=1, num_warps=1, programs=2, splits=4)
CONFIGS = {"sm_90": HALF, "sm_80": dict(HALF, elements=1 << 13), "interpreter": CPU}


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
    k_scales,
    v_scales,
    FORMAT: tl.constexpr,
):
    """Bounds of split item % splits, and its first tile of KV head item / splits; zeros past the last."""
    begin, end, used = split_bounds(position + 1, item % splits, splits, TILE)
    d = tl.arange(0, BLOCK_D)
    token = begin + tl.arange(0, TILE)
    live = (token < tl.minimum(end, position)) & (item < kv_heads * splits)
    kt, vt, ks, vs = load_tile(
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
        k_scales=k_scales,
        v_scales=v_scales,
        FORMAT=FORMAT,
    )
    return begin, end, used, kt, vt, ks, vs


@triton.jit
def decode_step_kernel(
    embed,
    embed_scales,
    ids,
    positions,
    table,
    final_norm,
    lm_head,
    head_scales,
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
    normed,
    partial,
    counters,
    layers,
    vocab,
    head_rows,
    cache_stride,
    max_pages,
    splits,
    eps,
    scale_log2,
    trace,
    inboxes,
    launches,
    capacity,
    k_scales,
    v_scales,
    scales_stride,
    FORMAT: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
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
    COLUMNS: tl.constexpr,
    EMBED_WAY: tl.constexpr,
    QKV_WAYS: tl.constexpr,
    QKV_APART: tl.constexpr,
    O_WAYS: tl.constexpr,
    GATE_UP_WAYS: tl.constexpr,
    DOWN_WAYS: tl.constexpr,
    HEAD_WAY: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    # 1. Locate: the residual starts as a row of embed. A token id outside the vocabulary turns everything to
    # NaN, from the first norm on.
    position = tl.load(positions)
    if position < 0:
        return
    token = tl.load(ids)
    known = (token >= 0) & (token < vocab)
    eps = tl.where(known, eps, float("nan"))
    token = tl.where(known, token, 0)
    if EMBED_WAY[0] == 0:
        residual = embed + token.to(tl.int64) * HIDDEN
    else:
        unpack_token(embed, embed_scales, token, h, HIDDEN, EMBED_WAY)
        residual = h
    T: tl.constexpr = final_norm.dtype
    Q: tl.constexpr = GROUP * KV_HEADS * HEAD_DIM
    KV: tl.constexpr = KV_HEADS * HEAD_DIM
    cosine, sine = angles(cos_sin, position, tl.arange(0, BLOCK_D), HEAD_DIM)

    # 2. Load ahead: the twin has a thread that copies the weights of all phases ahead. Here each phase issues
    # the loads of two tiles into registers and then waits for `target` arrivals (see product(); of packed
    # weights, it asks L2 for a tile); the first phase waits for none.
    target = 0
    # Of the words that go to other ranks: it counts exchanges, two in each layer.
    tag = target
    if RANKS > 1:
        tag = tl.load(launches) * 2 * layers
    if trace is not None:
        trace += tl.program_id(0).to(tl.int64) * (TRACE_LAYER * layers + TRACE_STEP)
        begin_trace(trace)

    # 3. Layers: norm and qkv, attention, o, norm and gate and up, down; each phase ends when all programs
    # have arrived. Then the logits, of which a program keeps its best.
    for _ in range(layers):
        qkv_product(
            counters,
            target,
            table,
            x=residual,
            norm_w=tensor_at(table, ATTN_NORM, T),
            normed=normed,
            eps=eps,
            bias=tensor_at(table, BQKV, T) if HAS_BQKV else None,
            y=qkv,
            Q=Q,
            KV=KV,
            K=HIDDEN,
            COLUMN=WQKV,
            WAYS=QKV_WAYS,
            APART=QKV_APART,
            PREFETCH=PREFETCH,
            trace=trace,
        )
        target = arrive(counters, target, trace)

        # A program has one split of a KV head, or none; where there are more KV heads than programs, several.
        q_norm = tensor_at(table, Q_NORM, T)
        k_norm = tensor_at(table, K_NORM, T)
        item = tl.program_id(0)
        begin, end, used, kt, vt, ks, vs = first_tile(
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
            k_scales=k_scales,
            v_scales=v_scales,
            FORMAT=FORMAT,
        )
        wait(counters, target, trace)
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
                    ks=ks,
                    vs=vs,
                    k_scales=k_scales,
                    v_scales=v_scales,
                    FORMAT=FORMAT,
                )
            item += tl.num_programs(0)
            begin, end, used, kt, vt, ks, vs = first_tile(
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
                k_scales=k_scales,
                v_scales=v_scales,
                FORMAT=FORMAT,
            )
        target = arrive(counters, target, trace)

        # In the first layer the residual is the row of embed, in the others h.
        tag += 1
        layer_product(
            counters,
            target,
            table,
            x=attention,
            norm_w=None,
            normed=normed,
            eps=eps,
            bias=tensor_at(table, BO, T) if HAS_BO else None,
            residual=residual,
            y=h,
            n=HIDDEN,
            K=Q,
            column=WO,
            matrix=1,
            WAYS=O_WAYS,
            PREFETCH=PREFETCH,
            trace=trace,
            peers=(inboxes, capacity, tag) if RANKS > 1 else None,
            RANK=RANK,
            RANKS=RANKS,
        )
        target = arrive(counters, target, trace)

        layer_product(
            counters,
            target,
            table,
            x=h,
            norm_w=tensor_at(table, MLP_NORM, T),
            normed=normed,
            eps=eps,
            bias=None,
            residual=None,
            y=act,
            n=MIDDLE,
            K=HIDDEN,
            column=W_GATE_UP,
            matrix=2,
            WAYS=GATE_UP_WAYS,
            PREFETCH=PREFETCH,
            trace=trace,
            PAIRS=True,
        )
        target = arrive(counters, target, trace)

        tag += 1
        layer_product(
            counters,
            target,
            table,
            x=act,
            norm_w=None,
            normed=normed,
            eps=eps,
            bias=None,
            residual=h,
            y=h,
            n=HIDDEN,
            K=MIDDLE,
            column=W_DOWN,
            matrix=3,
            WAYS=DOWN_WAYS,
            PREFETCH=PREFETCH,
            trace=trace,
            peers=(inboxes, capacity, tag) if RANKS > 1 else None,
            RANK=RANK,
            RANKS=RANKS,
        )
        target = arrive(counters, target, trace)
        residual = h
        table += COLUMNS
        k_cache += cache_stride
        v_cache += cache_stride
        if FORMAT != PLAIN:
            k_scales += scales_stride
            v_scales += scales_stride

    best, index = any_product(
        counters,
        target,
        x=residual,
        norm_w=final_norm,
        normed=normed,
        eps=eps,
        w=lm_head,
        scales=head_scales,
        bias=None,
        residual=None,
        y=logits,
        n=head_rows,
        K=HIDDEN,
        WAY=HEAD_WAY,
        PREFETCH=PREFETCH,
        ARGMAX=True,
        trace=trace,
    )
    record(trace, target, COLUMN=0)
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
        mask=index < head_rows,
        sem="relaxed",
        scope="gpu",
    )
    if tl.atomic_add(counters + TICKET, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        lowest = (tl.atomic_max(top, 0, sem="relaxed", scope="gpu") & LOW_31_BITS).to(tl.int32)
        tl.store(out, ~lowest + LOW_31_BITS)
        tl.store(top, 0)
        tl.store(counters + TICKET, 0)
        tl.store(counters + BARRIER, 0)
        if RANKS > 1:
            tl.store(launches, tl.load(launches) + 1)
    end_trace(trace, target)


def tensors(w):
    """Those in which a tensor or a PackedMatrix is stored."""
    return w.tensors() if type(w) is PackedMatrix else (w,)


def numbers_and_scales(w):
    """A matrix as the kernel takes it: with scales, or None for a plain one."""
    return operands(w) if type(w) is PackedMatrix else (w, None)


def way(w, parts, cfg, programs):
    """The WAY of core/step_product.py to multiply w [parts * n, k]."""
    n, k = w.shape[0] // parts, w.shape[1]
    block_k = triton.next_power_of_2(k)
    if type(w) is not PackedMatrix:
        # As many rows as fit into a tile, but at most a program's share.
        rows = max(cfg["elements"] // (parts * block_k), 1)
        return 0, min(rows, triton.next_power_of_2(triton.cdiv(n, programs))), block_k
    f, tile = w.format, cfg["packed"] or packed_interpreted(w.format, n * parts, k)
    segments, scale = tile["SEGMENTS"], operands(w)[1].dtype
    return (  # in the order of core/step_product.py
        f.number,
        tile["BLOCK_N"],
        block_k,
        f.bits,
        f.group or 0,
        tl.constexpr(f.second or ""),
        k % (segments * f.columns) == 0,
        8 if cfg["packed"] else 1,  # as in settings.packed
        segments,
        tile["STAGES"],
        getattr(tl, str(scale).removeprefix("torch.")),
    )


def decode_step(
    ids,
    positions,
    model,
    k_cache,
    v_cache,
    block_table,
    logits,
    workspace,
    k_scales=None,
    v_scales=None,
    *,
    out,
):
    """Launch one program per multiprocessor; the settings `per_multiprocessor` or `programs` change that."""
    m, w = model, workspace
    (vocab, hidden), middle, kv_heads, head_dim, page_size = (
        m.embed.shape,
        m.intermediate,
        m.kv_heads,
        m.head_dim,
        k_cache.shape[3],
    )
    cfg = measured(
        "decode_step",
        w.h,
        1,
        hidden=hidden,
        intermediate=middle,
        q_heads=m.q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    ) or config(CONFIGS, w.h)
    programs = cfg.get("programs") or cfg.get("per_multiprocessor", 1) * multiprocessors(w.h)
    if w.trace is not None and programs > step_layout.TRACE_BLOCKS:
        raise LabError(f"decode_step: {programs} programs, and records of {step_layout.TRACE_BLOCKS} at most")
    splits = cfg.get("splits") or max(min(step_layout.MAX_SPLITS, programs // kv_heads), 1)
    options = {key: value for key, value in cfg.items() if key.startswith("num_")}
    heads, block_d = triton.next_power_of_2(m.group), triton.next_power_of_2(head_dim)
    layer = m.layers[0]

    def ways(*matrices, parts=1):
        return tuple(tl.constexpr(way(one, parts, cfg, programs)) for one in matrices)

    parts = [getattr(one, part) for one in m.layers for part in step_layout.LAYER]
    held = [tensor for part in parts if part is not None for one in apart_of(part) for tensor in tensors(one)]
    launch(
        decode_step_kernel,
        (programs,),
        *numbers_and_scales(m.embed),
        ids,
        positions,
        m.table,
        m.final_norm,
        *numbers_and_scales(m.lm_head),
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
        w.normed if m.packed else None,
        w.partial,
        w.counters,
        len(m.layers),
        vocab,
        m.lm_head.shape[0],
        k_cache.stride(0),
        block_table.shape[1],
        splits,
        m.eps,
        m.scale * math.log2(math.e),
        w.trace,
        *(
            (None, None, 0)
            if w.exchange is None
            else (w.exchange.table, w.exchange.launches, w.exchange.capacity)
        ),
        k_scales,
        v_scales,
        0 if k_scales is None else k_scales.stride(0),
        FORMAT=format_of(k_cache),
        reads=[*held, *(() if w.exchange is None else w.exchange.inboxes)],
        RANK=0 if w.exchange is None else w.exchange.rank,
        RANKS=w.ranks,
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
        COLUMNS=m.table.shape[1],
        EMBED_WAY=way(m.embed, 1, cfg, programs),
        QKV_WAYS=ways(*m.by_format["wqkv"]),
        QKV_APART=m.apart,
        O_WAYS=ways(*m.by_format["wo"]),
        GATE_UP_WAYS=ways(*m.by_format["w_gate_up"], parts=2),
        DOWN_WAYS=ways(*m.by_format["w_down"]),
        HEAD_WAY=way(m.lm_head, 1, cfg, programs),
        PREFETCH=architecture(w.h) != "interpreter",
        launch_cooperative_grid=True,
        **options,
    )
