"""norm_linear_argmax: ids[b] = argmax over n of logits[b,n], logits[b,n] = sum_k xn[b,k] * w[n,k],
xn = rmsnorm(x, norm_w)

  x [rows, k], rows 1..64   norm_w [k]   w [n, k]   logits [rows, n] float32   ids [rows] int32
  all row-major and contiguous
  scratch [rows, 2 * 4096 + 4] int32: the programs' best values (float32 bits), then their indices, then a
  ticket
  mapping   as norm_linear; a program keeps its best of every row, and the last to finish compares all
            programs' best
  traffic   w once whatever the batch (nearly all of it); x and norm_w, or the normed x, once per program;
            logits once
  contract  lab/ops/norm_linear_argmax.py          twin  cuda_src/norm_linear_argmax.cu

The lowest index wins a tie. A row with NaN gives -1.
"""

import triton
import triton.language as tl

from lab.formats import PackedMatrix
from triton_kernels import settings
from triton_kernels.common import launch
from triton_kernels.core.fused_product import dot_rows, load_rows, normed_rows, wait_for_inputs
from triton_kernels.core.packed_rows import SM_80 as PACKED_ROWS
from triton_kernels.core.packed_rows import operands, packed_product, prefetch_rows
from triton_kernels.rmsnorm import normalised
from triton_kernels.settings import ANY

MAX_PROGRAMS = tl.constexpr(4096)  # MAX_BLOCKS of the contract
NO_INDEX = tl.constexpr(2147483647)

# See settings.by_hand.
SM_80 = {
    "sum_rows": 2,
    "sum_rows_f32": 4,
    "sum": [(1, ANY, dict(BLOCK_N=2, lane=16, warps=32)), (4, ANY, dict(BLOCK_N=2, lane=32, warps=32))],
    "dot": [(64, ANY, dict(BLOCK_N=64, BLOCK_K=64, num_warps=4, STAGES=6, per_multiprocessor=2))],
    "dot_f32": [(64, ANY, dict(BLOCK_N=32, BLOCK_K=32, num_warps=4, STAGES=3, per_multiprocessor=4))],
}
CONFIGS = {"sm_90": SM_80, "sm_80": SM_80, "interpreter": {"sum_rows": 4}}

# Packed weights: see settings.packed. The other products' tile for many rows would need more registers than
# there are, because the argmax needs some.
PACKED_SM_80 = {
    "half": [
        *(entry for entry in PACKED_ROWS["half"] if entry[0] < 64),
        (64, ANY, dict(BLOCK_N=64, SEGMENTS=1, STAGES=4, num_warps=8)),
    ],
    "float": PACKED_ROWS["float"],
}
PACKED = {"sm_90": PACKED_SM_80, "sm_80": PACKED_SM_80}


@triton.jit
def keep_best(best, index, value, candidate):
    """The larger of (best, index) and (value, candidate), element by element.

    Successive calls must have rising candidates, so that of equal values the first is kept. A NaN is kept as
    (inf, -1): no later value is larger, and no index lower.
    """
    nan = value != value
    value = tl.where(nan, float("inf"), value)
    candidate = tl.where(nan, -1, candidate)
    better = (value > best) | ((value == best) & (candidate < index))
    return tl.where(better, value, best), tl.where(better, candidate, index)


@triton.jit
def first_best(best, index, axis: tl.constexpr):
    """The largest value along an axis and its lowest index."""
    top = tl.max(best, axis=axis, keep_dims=True)
    lowest = tl.min(tl.where(best == top, index, NO_INDEX), axis=axis, keep_dims=True)
    return top, lowest


@triton.jit
def publish_best(scratch, ids, rows, b, best, index, BLOCK_B: tl.constexpr, SLOTS: tl.constexpr):
    """Stores the program's best candidate of each row. The program that draws the last ticket compares those
    of all programs."""
    STRIDE: tl.constexpr = 2 * MAX_PROGRAMS + 4
    mine = scratch + b * STRIDE + tl.program_id(0)
    tl.store(mine, best.to(tl.int32, bitcast=True), mask=b < rows)
    tl.store(mine + MAX_PROGRAMS, index, mask=b < rows)
    # The barrier puts every thread's stores before the ticket; the ticket (acq_rel at GPU scope) makes them
    # visible to the program that draws the last one.
    tl.debug_barrier()
    ticket = tl.atomic_add(scratch + 2 * MAX_PROGRAMS, 1, sem="acq_rel", scope="gpu")
    programs = tl.num_programs(0)
    if ticket == programs - 1:
        row = tl.arange(0, BLOCK_B)[:, None]
        best_all = tl.full([BLOCK_B, SLOTS], float("-inf"), tl.float32)
        index_all = tl.full([BLOCK_B, SLOTS], NO_INDEX, tl.int32)
        for s0 in range(0, programs, SLOTS):
            slot = s0 + tl.arange(0, SLOTS)[None, :]
            live = (row < rows) & (slot < programs)
            # .cg reads past L1: other multiprocessors wrote these, and their stores are in L2.
            at = scratch + row * STRIDE + slot
            bits = tl.load(at, mask=live, other=0, cache_modifier=".cg")
            found = tl.load(at + MAX_PROGRAMS, mask=live, other=NO_INDEX, cache_modifier=".cg")
            value = tl.where(live, bits.to(tl.float32, bitcast=True), float("-inf"))
            best_all, index_all = keep_best(best_all, index_all, value, found)
        top, lowest = first_best(best_all, index_all, axis=1)
        tl.store(ids + row, lowest, mask=row < rows)
        tl.store(scratch + 2 * MAX_PROGRAMS, 0)  # zero for the next launch


@triton.jit
def norm_linear_argmax_kernel(
    x,
    norm_w,
    w,
    logits,
    scratch,
    ids,
    rows,
    n,
    k,
    eps,
    PDL: tl.constexpr,
    LOOP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLOTS: tl.constexpr,
):
    # 1. Locate: tiles p, p + programs, ... of BLOCK_N rows. Addresses are [batch, n, k], so that all loads
    # and the sum have the same layout and no data move between threads inside the loop. What a lane group
    # does in the twin, a whole program does here.
    b = tl.arange(0, BLOCK_B)[:, None, None]
    i = tl.arange(0, BLOCK_N)[None, :, None]
    col = tl.arange(0, BLOCK_K)[None, None, :]
    programs = tl.num_programs(0)

    # 2. Norm: while the loads of the first weights, into registers, are in flight. The twin keeps the
    # normalised rows in shared memory; here they stay in the registers of the threads that multiply them.
    out = tl.program_id(0) * BLOCK_N + i
    tile = load_rows(w, out, out < n, col, k, EVEN_K)
    weight = tl.load(norm_w + col, mask=col < k, other=0.0, eviction_policy="evict_last")
    wait_for_inputs(PDL)
    xn = normed_rows(x, weight, rows, k, eps, b, col)

    # 3. Multiply: if a program has more than one tile (LOOP), the next one is loaded before this one is used.
    best = tl.full([BLOCK_B, BLOCK_N, 1], float("-inf"), tl.float32)
    index = tl.full([BLOCK_B, BLOCK_N, 1], NO_INDEX, tl.int32)
    for _ in range(tl.program_id(0), tl.cdiv(n, BLOCK_N), programs):
        ahead = out + programs * BLOCK_N
        if LOOP:
            following = load_rows(w, ahead, ahead < n, col, k, EVEN_K)

        # 4. Reduce: over the lanes and warps that share k.
        total = tl.sum(tile.to(tl.float32) * xn.to(tl.float32), axis=2, keep_dims=True)

        # 5. Store: the logits; the best so far stays in registers.
        tl.store(logits + b.to(tl.int64) * n + out, total, mask=(b < rows) & (out < n))
        best, index = keep_best(best, index, tl.where(out < n, total, float("-inf")), out)
        if LOOP:
            tile = following
        out = ahead

    # 6. Argmax in the last block: first over each program, then over all; a maximum is the same in
    # every order.
    top, lowest = first_best(
        tl.reshape(best, [BLOCK_B, BLOCK_N]), tl.reshape(index, [BLOCK_B, BLOCK_N]), axis=1
    )
    publish_best(scratch, ids, rows, tl.arange(0, BLOCK_B)[:, None], top, lowest, BLOCK_B, SLOTS)


@triton.jit
def norm_linear_argmax_dot_kernel(
    xn,
    w,
    logits,
    scratch,
    ids,
    rows,
    n,
    k,
    PDL: tl.constexpr,
    LOOP: tl.constexpr,
    FULL: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    # 1. Locate: tiles as above; w is the left operand [n, k], and x will be the right one [k, batch].
    b = tl.arange(0, BLOCK_B)[:, None]
    i = tl.arange(0, BLOCK_N)[:, None]
    col = tl.arange(0, BLOCK_K)[None, :]
    programs = tl.num_programs(0)

    # 2. Norm: already done by rmsnorm's kernel. The load of the first tile of w is issued before the
    # wait for that kernel.
    out = tl.program_id(0) * BLOCK_N + i
    tile = load_rows(w, out, out < n, col, k, EVEN_K)
    wait_for_inputs(PDL)

    best = tl.full([BLOCK_B, BLOCK_N], float("-inf"), tl.float32)
    index = tl.full([BLOCK_B, BLOCK_N], NO_INDEX, tl.int32)
    for _ in range(tl.program_id(0), tl.cdiv(n, BLOCK_N), programs):
        # 3. Multiply: the twin has a hand-written cp.async ring; here the compiler makes it from STAGES.
        acc = dot_rows(
            tile,
            w,
            out,
            live=out < n,
            x=xn,
            rows=rows,
            k=k,
            b=b,
            col=col,
            FULL=FULL,
            EVEN_K=EVEN_K,
            BLOCK_K=BLOCK_K,
            STAGES=STAGES,
        )

        # 4. Reduce: the dot has already done it; its result is transposed.
        total = tl.trans(acc)
        column = tl.trans(out)

        # 5. Store: the logits; the best so far stays in registers.
        tl.store(logits + b.to(tl.int64) * n + column, total, mask=(b < rows) & (column < n))
        best, index = keep_best(best, index, tl.where(column < n, total, float("-inf")), column)
        out += programs * BLOCK_N
        if LOOP:
            tile = load_rows(w, out, out < n, col, k, EVEN_K)

    # 6. Argmax in the last block: first over each program, then over all. The twin raises each row's best by
    # atomicMax.
    top, lowest = first_best(best, index, axis=1)
    publish_best(scratch, ids, rows, b, top, lowest, BLOCK_B, SLOTS)


@triton.jit
def packed_norm_linear_argmax_kernel(
    xn,
    words,
    scales,
    logits,
    scratch,
    ids,
    rows,
    n,
    k,
    PDL: tl.constexpr,
    SLOTS: tl.constexpr,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SECOND: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # 1. Locate: tiles p, p + programs, ... of BLOCK_N rows.
    b = tl.arange(0, BLOCK_B)[:, None]
    programs = tl.num_programs(0)

    # 2. Norm: already done by rmsnorm's kernel. Before the wait for it the first weights are asked for.
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    prefetch_rows(words, out, out < n, k, BITS, SEGMENTS, PDL)
    wait_for_inputs(PDL)

    best = tl.full([BLOCK_B, 1], float("-inf"), tl.float32)
    index = tl.full([BLOCK_B, 1], NO_INDEX, tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(n, BLOCK_N), programs):
        # 3. Multiply: packed weights are unpacked in registers and multiplied on tensor cores, for any number
        # of rows.
        # 4. Reduce: the warps of a program divide k, and their sums are added at the end.
        out = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        total = packed_product(
            xn,
            words,
            scales,
            out,
            live=out < n,
            rows=rows,
            k=k,
            FORMAT=FORMAT,
            BITS=BITS,
            GROUP=GROUP,
            SECOND=SECOND,
            EVEN_K=EVEN_K,
            BLOCK_B=BLOCK_B,
            BLOCK_N=BLOCK_N,
            SEGMENTS=SEGMENTS,
            STAGES=STAGES,
        )

        # 5. Store: the logits; the best of each row so far stays in registers. Most programs have one tile,
        # so the best of a tile can be found at once, which frees the registers.
        column = out[None, :]
        tl.store(logits + b.to(tl.int64) * n + column, total, mask=(b < rows) & (column < n))
        top, lowest = keep_best(
            tl.full([BLOCK_B, BLOCK_N], float("-inf"), tl.float32),
            tl.full([BLOCK_B, BLOCK_N], NO_INDEX, tl.int32),
            tl.where(column < n, total, float("-inf")),
            column,
        )
        top, lowest = first_best(top, lowest, axis=1)
        better = (top > best) | ((top == best) & (lowest < index))
        best, index = tl.where(better, top, best), tl.where(better, lowest, index)

    # 6. Argmax in the last block: over all programs.
    publish_best(scratch, ids, rows, b, best, index, BLOCK_B, SLOTS)


def norm_linear_argmax(x, norm_w, eps, w, logits, scratch, out):
    """Launch logits = rmsnorm(x, norm_w) @ w.T, out = argmax; w may be a PackedMatrix; scratch is zero on
    entry and on exit."""
    (rows, k), n = x.shape, w.shape[0]
    if type(w) is PackedMatrix:
        programs, meta = settings.packed("norm_linear_argmax", PACKED, x, w, n)
        meta.update(SLOTS=1024 // meta["BLOCK_B"], **settings.dependent_launch(x))
        grid = (min(programs, MAX_PROGRAMS.value),)
        xn = normalised(x, norm_w, eps)
        launch(
            packed_norm_linear_argmax_kernel, grid, xn, *operands(w), logits, scratch, out, rows, n, k, **meta
        )
        return
    path, programs, meta = settings.product(
        "norm_linear_argmax", CONFIGS, x, n, k, whole_rows=True, most_programs=MAX_PROGRAMS.value
    )
    meta["SLOTS"] = 1024 // meta["BLOCK_B"]
    if path == "sum":
        launch(
            norm_linear_argmax_kernel,
            (programs,),
            x,
            norm_w,
            w,
            logits,
            scratch,
            out,
            rows,
            n,
            k,
            eps,
            **meta,
        )
    else:
        xn = normalised(x, norm_w, eps)
        launch(norm_linear_argmax_dot_kernel, (programs,), xn, w, logits, scratch, out, rows, n, k, **meta)
