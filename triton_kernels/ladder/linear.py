"""The ladder of linear: y[b,n] = sum_k x[b,k] * w[n,k] (+ bias[n]), from a sum in every step to tensor cores.

Each rung changes one thing of the rung before it. What it should gain, and why: lab/rungs/.
Numbers and names are those of the twin; rungs that Triton's compiler decides about are absent.
twin  cuda_src/ladder/linear.cu          the op's own kernel  triton_kernels/linear.py
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def put(y, bias, b, out, rows, n, total, HAS_BIAS: tl.constexpr):
    """Stores total[b, out] where it is inside y: bias added in float32, rounded once."""
    if HAS_BIAS:
        total += tl.load(bias + out, mask=out < n, other=0.0).to(tl.float32)
    tl.store(y + b.to(tl.int64) * n + out, total.to(y.dtype.element_ty), mask=(b < rows) & (out < n))


@triton.jit
def linear_naive_kernel(x, w, bias, y, rows, n, k, HAS_BIAS: tl.constexpr, BLOCK_K: tl.constexpr):
    # 1. Naive: a program per output; each step loads 32 elements and sums them at once. Even the plainest
    # Triton reads memory well: neighbouring lanes read neighbouring elements from the start.
    out, b = tl.program_id(0), tl.program_id(1)
    total = 0.0
    for k0 in range(0, k, BLOCK_K):
        col = k0 + tl.arange(0, BLOCK_K)
        wv = tl.load(w + out.to(tl.int64) * k + col, mask=col < k, other=0.0).to(tl.float32)
        xv = tl.load(x + b.to(tl.int64) * k + col, mask=col < k, other=0.0).to(tl.float32)
        total += tl.sum(wv * xv, axis=0)
    put(y, bias, b, out, rows, n, total, HAS_BIAS)


@triton.jit
def linear_row_kernel(
    x, w, bias, y, rows, n, k, HAS_BIAS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr
):
    # 4. Warp reduction: each lane keeps a sum of its own, and one reduction at the end adds the lanes.
    # BLOCK_K is 32: an element a lane and step.
    #
    # 5. Vectorised: the same kernel with BLOCK_K = 32 lanes of 16 bytes.
    #
    # 6. Pipeline: STAGES tiles are in flight through shared memory; the compiler writes the cp.async ring.
    #
    # 7. Split-K: four warps share a row instead of one, and BLOCK_K is four times as long; the compiler adds
    # the warps.
    out, b = tl.program_id(0), tl.program_id(1)
    acc = tl.zeros([BLOCK_K], tl.float32)
    for k0 in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        col = k0 + tl.arange(0, BLOCK_K)
        wv = tl.load(w + out.to(tl.int64) * k + col, mask=col < k, other=0.0).to(tl.float32)
        xv = tl.load(x + b.to(tl.int64) * k + col, mask=col < k, other=0.0).to(tl.float32)
        acc += wv * xv
    put(y, bias, b, out, rows, n, tl.sum(acc, axis=0), HAS_BIAS)


@triton.jit
def linear_dot_kernel(
    x,
    w,
    bias,
    y,
    rows,
    n,
    k,
    HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    # 8. Tensor cores: w is the left operand, whose 16 rows fill the tile; x, transposed and padded to 16
    # columns, is the right one. So w is read once for up to 16 rows of x.
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    acc = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    for k0 in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        col = k0 + tl.arange(0, BLOCK_K)[None, :]
        wv = tl.load(w + out.to(tl.int64)[:, None] * k + col, mask=(out < n)[:, None] & (col < k), other=0.0)
        xv = tl.load(x + b.to(tl.int64)[:, None] * k + col, mask=(b < rows)[:, None] & (col < k), other=0.0)
        acc = tl.dot(wv, tl.trans(xv), acc)
    put(y, bias, b[:, None], out[None, :], rows, n, tl.trans(acc), HAS_BIAS)


def linear(rung, x, w, bias, y):
    """Launch rung 1, 4, 5, 6, 7 or 8 of y = x @ w.T + bias; bias None or [n], y of x's dtype or float32."""
    (rows, k), n = x.shape, w.shape[0]
    wide = 32 * 16 // x.itemsize  # elements that a warp loads at once, 16 bytes a lane
    args, shared = (x, w, bias, y, rows, n, k), dict(HAS_BIAS=bias is not None)
    if rung == 1:
        launch(linear_naive_kernel, (n, rows), *args, **shared, BLOCK_K=32, num_warps=1)
    elif rung == 8:
        launch(
            linear_dot_kernel,
            (triton.cdiv(n, 16), triton.cdiv(rows, 16)),
            *args,
            **shared,
            BLOCK_B=16,
            BLOCK_N=16,
            BLOCK_K=256,
            STAGES=4,
            num_warps=4,
        )
    else:
        block_k, warps, stages = {4: (32, 1, 1), 5: (wide, 1, 1), 6: (wide, 1, 8), 7: (4 * wide, 4, 4)}[rung]
        launch(linear_row_kernel, (n, rows), *args, **shared, BLOCK_K=block_k, STAGES=stages, num_warps=warps)
