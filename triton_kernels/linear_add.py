"""linear_add: residual[b,n] += sum_k x[b,k] * w[n,k] (+ bias[n]), in place;
accumulated in float32, rounded once

  x [rows, k], rows 1..64   w [n, k]   bias [n] or None   residual [rows, n]     row-major, contiguous
  mapping   a program owns BLOCK_N rows of w for every row of x, and walks along k
  traffic   w once whatever the batch (nearly all of it); x from L2, once per program; residual read and
            written once
  contract  lab/ops/linear_add.py          twin  cuda_src/linear_add.cu

Two kernels, as in norm_linear: float32 arithmetic for few rows, tensor cores for more. These matrices have
few outputs and long rows, so where BLOCK_K covers k, all of a program's weights are loaded into registers
before the wait.

Packed weights have a kernel of their own, for every format: core/packed_rows.py unpacks and multiplies them.
"""

import triton
import triton.language as tl

from lab.formats import PackedMatrix
from triton_kernels import settings
from triton_kernels.common import launch
from triton_kernels.core.fused_product import dot_rows, load_rows, wait_for_inputs
from triton_kernels.core.packed_rows import PACKED, operands, packed_product, prefetch_rows
from triton_kernels.core.packed_splits import split_product
from triton_kernels.settings import ANY

# See settings.by_hand. UNROLL tiles of the sum path are in flight.
SM_80 = {
    "sum_rows": 2,
    "sum_rows_f32": 4,
    "sum": [
        (1, ANY, dict(BLOCK_N=2, lane=16, num_warps=4, UNROLL=1)),
        (4, ANY, dict(BLOCK_N=2, lane=8, num_warps=4, UNROLL=2)),
    ],
    "dot": [
        (64, 4096, dict(BLOCK_N=16, BLOCK_K=128, num_warps=4, STAGES=6)),
        (64, ANY, dict(BLOCK_N=64, BLOCK_K=64, num_warps=4, STAGES=6)),
    ],
    "dot_f32": [(64, ANY, dict(BLOCK_N=32, BLOCK_K=32, num_warps=4, STAGES=3))],
}
CONFIGS = {"sm_90": SM_80, "sm_80": SM_80, "interpreter": {"sum_rows": 4}}


@triton.jit
def linear_add_kernel(
    x,
    w,
    bias,
    residual,
    rows,
    n,
    k,
    PDL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    # 1. Locate: BLOCK_N rows of w. Addresses are [batch, n, k], so that all loads and the sum have the same
    # layout and no data move between threads inside the loop.
    b = tl.arange(0, BLOCK_B)[:, None, None]
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :, None]
    col = tl.arange(0, BLOCK_K)[None, None, :]
    live = (b < rows) & (out < n)
    x_row = x + tl.where(b < rows, b, 0) * k

    # 2. Multiply: the loads of the first weights are issued before the wait for the preceding kernel. What
    # the sums are added to is loaded after it, long before its use.
    tile = load_rows(w, out, out < n, col, k, EVEN_K)
    wait_for_inputs(PDL)
    target = residual + b.to(tl.int64) * n + out
    base = tl.load(target, mask=live, other=0.0).to(tl.float32)
    xv = tl.load(x_row + col, mask=col < k, other=0.0, eviction_policy="evict_last")
    acc = tile.to(tl.float32) * xv.to(tl.float32)
    if not WHOLE_ROW:
        for k0 in tl.range(BLOCK_K, k, BLOCK_K, loop_unroll_factor=UNROLL):
            at = k0 + col
            tile = load_rows(w, out, out < n, at, k, EVEN_K)
            if EVEN_K:
                xv = tl.load(x_row + at, eviction_policy="evict_last")
            else:
                xv = tl.load(x_row + at, mask=at < k, other=0.0, eviction_policy="evict_last")
            acc += tile.to(tl.float32) * xv.to(tl.float32)

    # 3. Reduce: each lane has summed its own columns; one reduction at the end adds the lanes and warps.
    total = tl.sum(acc, axis=2, keep_dims=True)

    # 4. Add and store: each output is read and written by one program.
    if HAS_BIAS:
        total += tl.load(bias + out, mask=out < n, other=0.0).to(tl.float32)
    tl.store(target, (base + total).to(residual.dtype.element_ty), mask=live)


@triton.jit
def linear_add_dot_kernel(
    x,
    w,
    bias,
    residual,
    rows,
    n,
    k,
    PDL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FULL: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    # 1. Locate: rows as above; w is the left operand [n, k], and x will be the right one [k, batch].
    b = tl.arange(0, BLOCK_B)[:, None]
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    col = tl.arange(0, BLOCK_K)[None, :]

    # 2. Multiply: the load of the first tile is issued before the wait for the preceding kernel. The twin has
    # a hand-written cp.async ring; here the compiler makes it from STAGES.
    tile = load_rows(w, out, out < n, col, k, EVEN_K)
    wait_for_inputs(PDL)
    acc = dot_rows(
        tile,
        w,
        out,
        live=out < n,
        x=x,
        rows=rows,
        k=k,
        b=b,
        col=col,
        FULL=FULL,
        EVEN_K=EVEN_K,
        BLOCK_K=BLOCK_K,
        STAGES=STAGES,
    )

    # 3. Reduce: the dot has already done it; its result is transposed.
    total = tl.trans(acc)
    column = tl.trans(out)

    # 4. Add and store: each output is read and written by one program.
    target = residual + b.to(tl.int64) * n + column
    live = (b < rows) & (column < n)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)
    total += tl.load(target, mask=live, other=0.0).to(tl.float32)
    tl.store(target, total.to(residual.dtype.element_ty), mask=live)


@triton.jit
def packed_linear_add_kernel(
    x,
    words,
    scales,
    bias,
    residual,
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

    # 2. Multiply: packed weights are unpacked in registers and multiplied on tensor cores, for any number of
    # rows.
    # 3. Reduce: the warps of a program divide k, and their sums are added at the end.
    prefetch_rows(words, out, out < n, k, BITS, SEGMENTS, PDL)
    wait_for_inputs(PDL)
    total = packed_product(
        x,
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

    # 4. Add and store: each output is read and written by one program.
    target = residual + b.to(tl.int64) * n + out[None, :]
    live = (b < rows) & (out < n)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + out, mask=out < n, other=0.0).to(tl.float32)[None, :]
    total += tl.load(target, mask=live, other=0.0).to(tl.float32)
    tl.store(target, total.to(residual.dtype.element_ty), mask=live)


def linear_add(x, w, bias, residual):
    """Launch residual += x @ w.T + bias; w may be a PackedMatrix, bias None or [n]."""
    (rows, k), n = x.shape, w.shape[0]
    if type(w) is PackedMatrix:
        programs, meta = settings.packed("linear_add", PACKED, x, w, n)
        if (splits := meta.pop("SPLITS", 1)) > 1:
            split_product(x, w, bias, residual, programs, splits, meta, add=True)
            return
        meta.update(HAS_BIAS=bias is not None, **settings.dependent_launch(x))
        launch(packed_linear_add_kernel, (programs,), x, *operands(w), bias, residual, rows, n, k, **meta)
        return
    path, programs, meta = settings.product("linear_add", CONFIGS, x, n, k)
    kernel = linear_add_kernel if path == "sum" else linear_add_dot_kernel
    if path == "sum":
        meta["WHOLE_ROW"] = meta["BLOCK_K"] >= k
    launch(kernel, (programs,), x, w, bias, residual, rows, n, k, HAS_BIAS=bias is not None, **meta)
