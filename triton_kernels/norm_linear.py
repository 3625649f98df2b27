"""norm_linear: y[b,n] = sum_k xn[b,k] * w[n,k] (+ bias[n]), xn = rmsnorm(x, norm_w), accumulated in float32

  x [rows, k], rows 1..64   norm_w [k]   w [n, k]   bias [n] or None   y [rows, n] of x's dtype or float32
  mapping   a program takes BLOCK_N rows of w for every row of x, then the next tile of rows
  traffic   w once whatever the batch (nearly all of it); x and norm_w, or the normed x, once per program;
            y once
  contract  lab/ops/norm_linear.py          twin  cuda_src/norm_linear.cu

Two kernels. For few rows: float32 arithmetic on the loaded weights, with all of x in registers, normalised by
each program itself. For more rows, where that arithmetic would take longer than the loads: tensor cores,
after rmsnorm's kernel.
"""

import triton
import triton.language as tl

from lab.formats import PackedMatrix
from triton_kernels import settings
from triton_kernels.common import launch
from triton_kernels.core.fused_product import dot_rows, load_rows, normed_rows, wait_for_inputs
from triton_kernels.core.packed_rows import PACKED, operands, packed_product, prefetch_rows
from triton_kernels.core.packed_splits import split_product
from triton_kernels.rmsnorm import normalised
from triton_kernels.settings import ANY

# See settings.by_hand. 32 warps with 64 registers a thread use all registers of a multiprocessor. Small n
# needs small tiles, so that every multiprocessor has a program.
SM_80 = {
    "sum_rows": 2,
    "sum_rows_f32": 4,
    "sum": [
        (1, 4096, dict(BLOCK_N=2, lane=16)),
        (1, ANY, dict(BLOCK_N=2, lane=16, warps=32)),
        (4, ANY, dict(BLOCK_N=2, lane=32, warps=32)),
    ],
    "dot": [
        (64, 4096, dict(BLOCK_N=16, BLOCK_K=128, num_warps=4, STAGES=4)),
        (64, 8192, dict(BLOCK_N=32, BLOCK_K=128, num_warps=4, STAGES=4)),
        (64, ANY, dict(BLOCK_N=64, BLOCK_K=64, num_warps=4, STAGES=6)),
    ],
    "dot_f32": [(64, ANY, dict(BLOCK_N=32, BLOCK_K=32, num_warps=4, STAGES=3))],
}
CONFIGS = {"sm_90": SM_80, "sm_80": SM_80, "interpreter": {"sum_rows": 4}}


@triton.jit
def norm_linear_kernel(
    x,
    norm_w,
    w,
    bias,
    y,
    rows,
    n,
    k,
    eps,
    PDL: tl.constexpr,
    LOOP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    for _ in range(tl.program_id(0), tl.cdiv(n, BLOCK_N), programs):
        ahead = out + programs * BLOCK_N
        if LOOP:
            following = load_rows(w, ahead, ahead < n, col, k, EVEN_K)

        # 4. Reduce: over the lanes and warps that share k.
        total = tl.sum(tile.to(tl.float32) * xn.to(tl.float32), axis=2, keep_dims=True)

        # 5. Store: bias added in float32, rounded once.
        if HAS_BIAS:
            total += tl.load(bias + out, mask=out < n, other=0.0).to(tl.float32)
        tl.store(y + b.to(tl.int64) * n + out, total.to(y.dtype.element_ty), mask=(b < rows) & (out < n))
        if LOOP:
            tile = following
        out = ahead


@triton.jit
def norm_linear_dot_kernel(
    xn,
    w,
    bias,
    y,
    rows,
    n,
    k,
    PDL: tl.constexpr,
    LOOP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FULL: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
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

        # 5. Store: bias added in float32, rounded once.
        if HAS_BIAS:
            total += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)
        tl.store(
            y + b.to(tl.int64) * n + column, total.to(y.dtype.element_ty), mask=(b < rows) & (column < n)
        )
        out += programs * BLOCK_N
        if LOOP:
            tile = load_rows(w, out, out < n, col, k, EVEN_K)


@triton.jit
def packed_norm_linear_kernel(
    xn,
    words,
    scales,
    bias,
    y,
    rows,
    n,
    k,
    PDL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)

    # 2. Norm: already done by rmsnorm's kernel. Before the wait for it the first weights are asked for.
    prefetch_rows(words, out, out < n, k, BITS, SEGMENTS, PDL)
    wait_for_inputs(PDL)

    # 3. Multiply: packed weights are unpacked in registers and multiplied on tensor cores, for any number of
    # rows.
    # 4. Reduce: the warps of a program divide k, and their sums are added at the end.
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

    # 5. Store: bias added in float32, rounded once.
    if HAS_BIAS:
        total += tl.load(bias + out, mask=out < n, other=0.0).to(tl.float32)[None, :]
    where = y + b.to(tl.int64) * n + out[None, :]
    tl.store(where, total.to(y.dtype.element_ty), mask=(b < rows) & (out < n)[None, :])


def norm_linear(x, norm_w, eps, w, bias, y):
    """Launch y = rmsnorm(x, norm_w) @ w.T + bias; w may be a PackedMatrix, bias None or [n], y of x's dtype
    or float32."""
    (rows, k), n = x.shape, w.shape[0]
    if type(w) is PackedMatrix:
        programs, meta = settings.packed("norm_linear", PACKED, x, w, n)
        xn = normalised(x, norm_w, eps)
        if (splits := meta.pop("SPLITS", 1)) > 1:
            split_product(xn, w, bias, y, programs, splits, meta)
            return
        meta.update(HAS_BIAS=bias is not None, **settings.dependent_launch(x))
        launch(packed_norm_linear_kernel, (programs,), xn, *operands(w), bias, y, rows, n, k, **meta)
        return
    path, programs, meta = settings.product("norm_linear", CONFIGS, x, n, k, whole_rows=True)
    meta["HAS_BIAS"] = bias is not None
    if path == "sum":
        launch(norm_linear_kernel, (programs,), x, norm_w, w, bias, y, rows, n, k, eps, **meta)
    else:
        xn = normalised(x, norm_w, eps)
        launch(norm_linear_dot_kernel, (programs,), xn, w, bias, y, rows, n, k, **meta)
