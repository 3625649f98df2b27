"""norm_linear_silu_mul: y[b,j] = g / (1 + exp(-g)) * u, g = xn[b] . w[j], u = xn[b] . w[n + j],
xn = rmsnorm(x, norm_w)

  x [rows, k], rows 1..64   norm_w [k]   w [2 * n, k], the gate's rows first   y [rows, n]
  all row-major and contiguous
  mapping   as norm_linear; the program that takes row j of the gate also takes row j of up
  traffic   w once whatever the batch (nearly all of it); x and norm_w, or the normed x, once per program;
            y once
  contract  lab/ops/norm_linear_silu_mul.py          twin  cuda_src/norm_linear_silu_mul.cu
"""

import triton
import triton.language as tl

from lab.formats import PackedMatrix
from triton_kernels import settings
from triton_kernels.common import launch
from triton_kernels.core.fused_product import dot_rows, load_rows, normed_rows, wait_for_inputs
from triton_kernels.core.packed_rows import PACKED, operands, packed_product, prefetch_rows
from triton_kernels.rmsnorm import normalised
from triton_kernels.settings import ANY

# See settings.by_hand. BLOCK_N counts outputs, which have two rows of w each.
SM_80 = {
    "sum_rows": 2,
    "sum_rows_f32": 4,
    "sum": [(1, ANY, dict(BLOCK_N=1, lane=16, warps=32)), (4, ANY, dict(BLOCK_N=1, lane=32, warps=32))],
    "dot": [(64, ANY, dict(BLOCK_N=32, BLOCK_K=64, num_warps=4, STAGES=6))],
    "dot_f32": [(64, ANY, dict(BLOCK_N=16, BLOCK_K=32, num_warps=4, STAGES=3))],
}
CONFIGS = {"sm_90": SM_80, "sm_80": SM_80, "interpreter": {"sum_rows": 4}}


@triton.jit
def activate(pairs, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """silu(gate) * up, [BLOCK_B, BLOCK_N]; pairs [BLOCK_B, 2 * BLOCK_N]: sums, gate and up alternating."""
    gate, up = tl.split(tl.reshape(pairs, [BLOCK_B, BLOCK_N, 2]))
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def paired_rows(first, n, BLOCK_N: tl.constexpr):
    """(outputs, rows of w), int32 [BLOCK_N] each, from output `first` on: 8 rows of the gate and 8 of up in
    turn. 8 packed rows are contiguous, and a thread of a tensor-core tile has the sums of rows that are 8
    apart. (The interpreter's tile may have fewer rows.)"""
    RUN: tl.constexpr = 8 if BLOCK_N >= 16 else BLOCK_N // 2
    i = tl.arange(0, BLOCK_N)
    out = first + i // (2 * RUN) * RUN + i % RUN
    return out, out + i // RUN % 2 * n


@triton.jit
def activated_runs(total, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """silu(gate) * up, [BLOCK_B, BLOCK_N / 2]; total [BLOCK_B, BLOCK_N]: sums of the rows that paired_rows()
    gives."""
    RUN: tl.constexpr = 8 if BLOCK_N >= 16 else BLOCK_N // 2
    runs = tl.reshape(total, [BLOCK_B, BLOCK_N // 2 // RUN, 2, RUN])
    pairs = tl.reshape(tl.permute(runs, 0, 1, 3, 2), [BLOCK_B, BLOCK_N])
    return activate(pairs, BLOCK_B, BLOCK_N // 2)


@triton.jit
def norm_linear_silu_mul_kernel(
    x,
    norm_w,
    w,
    y,
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
):
    # 1. Locate: tiles p, p + programs, ... of BLOCK_N outputs. Row i of a tile of w belongs to output i / 2:
    # even rows are the gate's and odd ones up's, so that the two sums of an output end up side by side. (The
    # twin gives both rows to one lane group.)
    b = tl.arange(0, BLOCK_B)[:, None, None]
    i = tl.arange(0, 2 * BLOCK_N)[None, :, None]
    col = tl.arange(0, BLOCK_K)[None, None, :]
    programs = tl.num_programs(0)
    first = tl.program_id(0) * BLOCK_N
    part = (i % 2) * n

    # 2. Norm: while the loads of the first weights, into registers, are in flight. The twin keeps the
    # normalised rows in shared memory; here they stay in the registers of the threads that multiply them.
    out = first + i // 2
    tile = load_rows(w, out + part, out < n, col, k, EVEN_K)
    weight = tl.load(norm_w + col, mask=col < k, other=0.0, eviction_policy="evict_last")
    wait_for_inputs(PDL)
    xn = normed_rows(x, weight, rows, k, eps, b, col)

    # 3. Multiply: if a program has more than one tile (LOOP), the next one is loaded before this one is used.
    for _ in range(tl.program_id(0), tl.cdiv(n, BLOCK_N), programs):
        ahead = out + programs * BLOCK_N
        if LOOP:
            following = load_rows(w, ahead + part, ahead < n, col, k, EVEN_K)

        # 4. Reduce: over the lanes and warps that share k.
        total = tl.sum(tile.to(tl.float32) * xn.to(tl.float32), axis=2)

        # 5. Activate and store: from the float32 sums, rounded once.
        result = activate(total, BLOCK_B, BLOCK_N)
        column = first + tl.arange(0, BLOCK_N)[None, :]
        row = tl.arange(0, BLOCK_B)[:, None]
        tl.store(
            y + row.to(tl.int64) * n + column, result.to(y.dtype.element_ty), mask=(row < rows) & (column < n)
        )
        if LOOP:
            tile = following
        out = ahead
        first += programs * BLOCK_N


@triton.jit
def norm_linear_silu_mul_dot_kernel(
    xn,
    w,
    y,
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
):
    # 1. Locate: tiles as above; w is the left operand [n, k], and x will be the right one [k, batch].
    b = tl.arange(0, BLOCK_B)[:, None]
    i = tl.arange(0, 2 * BLOCK_N)[:, None]
    col = tl.arange(0, BLOCK_K)[None, :]
    programs = tl.num_programs(0)
    first = tl.program_id(0) * BLOCK_N
    part = (i % 2) * n

    # 2. Norm: already done by rmsnorm's kernel. The load of the first tile of w is issued before the
    # wait for that kernel.
    out = first + i // 2
    tile = load_rows(w, out + part, out < n, col, k, EVEN_K)
    wait_for_inputs(PDL)

    for _ in range(tl.program_id(0), tl.cdiv(n, BLOCK_N), programs):
        # 3. Multiply: the twin has a hand-written cp.async ring; here the compiler makes it from STAGES.
        acc = dot_rows(
            tile,
            w,
            out + part,
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

        # 5. Activate and store: from the float32 sums, rounded once.
        result = activate(total, BLOCK_B, BLOCK_N)
        column = first + tl.arange(0, BLOCK_N)[None, :]
        tl.store(
            y + b.to(tl.int64) * n + column, result.to(y.dtype.element_ty), mask=(b < rows) & (column < n)
        )
        out += programs * BLOCK_N
        first += programs * BLOCK_N
        if LOOP:
            tile = load_rows(w, out + part, out < n, col, k, EVEN_K)


@triton.jit
def packed_norm_linear_silu_mul_kernel(
    xn,
    words,
    scales,
    y,
    rows,
    n,
    k,
    PDL: tl.constexpr,
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
    # 1. Locate: BLOCK_N rows of w.
    b = tl.arange(0, BLOCK_B)[:, None]
    first = tl.program_id(0) * (BLOCK_N // 2)
    out, row = paired_rows(first, n, BLOCK_N)

    # 2. Norm: already done by rmsnorm's kernel. Before the wait for it the first weights are asked for.
    prefetch_rows(words, row, out < n, k, BITS, SEGMENTS, PDL)
    wait_for_inputs(PDL)

    # 3. Multiply: packed weights are unpacked in registers and multiplied on tensor cores, for any number of
    # rows.
    # 4. Reduce: the warps of a program divide k, and their sums are added at the end.
    total = packed_product(
        xn,
        words,
        scales,
        row,
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

    # 5. Activate and store: from the float32 sums, rounded once.
    result = activated_runs(total, BLOCK_B, BLOCK_N)
    column = first + tl.arange(0, BLOCK_N // 2)[None, :]
    tl.store(y + b.to(tl.int64) * n + column, result.to(y.dtype.element_ty), mask=(b < rows) & (column < n))


def norm_linear_silu_mul(x, norm_w, eps, w, y):
    """Launch y = silu(gate) * up, (gate, up) = rmsnorm(x, norm_w) @ w.T; w may be a PackedMatrix."""
    (rows, k), n = x.shape, y.shape[1]
    if type(w) is PackedMatrix:
        programs, meta = settings.packed("norm_linear_silu_mul", PACKED, x, w, n, parts=2)
        meta.update(settings.dependent_launch(x))
        xn = normalised(x, norm_w, eps)
        launch(packed_norm_linear_silu_mul_kernel, (programs,), xn, *operands(w), y, rows, n, k, **meta)
        return
    path, programs, meta = settings.product(
        "norm_linear_silu_mul", CONFIGS, x, n, k, whole_rows=True, parts=2
    )
    if path == "sum":
        launch(norm_linear_silu_mul_kernel, (programs,), x, norm_w, w, y, rows, n, k, eps, **meta)
    else:
        xn = normalised(x, norm_w, eps)
        launch(norm_linear_silu_mul_dot_kernel, (programs,), xn, w, y, rows, n, k, **meta)
