"""The ladder of rmsnorm: y[b,:] = T(x[b,:] * rsqrt(mean(x[b,:]^2) + eps)) * w, from step sums to wide loads.

Each rung changes one thing of the rung before it. What it should gain, and why: lab/rungs/.
x, y [rows, cols] contiguous. Numbers and names are the twin's; rungs that Triton's compiler decides about
are absent.
twin  cuda_src/ladder/rmsnorm.cu          the op's own kernel  triton_kernels/rmsnorm.py
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def scale_row(x, w, y, cols, scale, BLOCK: tl.constexpr):
    """The second pass: y = T(x * scale) * w."""
    for c0 in range(0, cols, BLOCK):
        col = c0 + tl.arange(0, BLOCK)
        v = tl.load(x + col, mask=col < cols, other=0.0)
        g = tl.load(w + col, mask=col < cols, other=0.0).to(tl.float32)
        out = (v.to(tl.float32) * scale).to(v.dtype).to(tl.float32) * g
        tl.store(y + col, out.to(v.dtype), mask=col < cols)


@triton.jit
def rmsnorm_naive_kernel(x, w, y, cols, eps, BLOCK: tl.constexpr):
    # 1. Naive: a program of one warp per row; each step loads 32 elements and sums them at once. Neighbouring
    # lanes read neighbouring elements from the start, which the twin does from rung 2 on.
    x += tl.program_id(0).to(tl.int64) * cols
    y += tl.program_id(0).to(tl.int64) * cols
    squares = 0.0
    for c0 in range(0, cols, BLOCK):
        col = c0 + tl.arange(0, BLOCK)
        v = tl.load(x + col, mask=col < cols, other=0.0).to(tl.float32)
        squares += tl.sum(v * v, axis=0)
    scale_row(x, w, y, cols, tl.rsqrt(squares / cols + eps), BLOCK)


@triton.jit
def rmsnorm_block_kernel(x, w, y, cols, eps, BLOCK: tl.constexpr):
    # 4. Warp reduction: 8 warps share the row, each lane keeps a sum of its own, and one reduction at the end
    # adds lanes and warps, by shuffles and one exchange through shared memory. BLOCK is 256: an element a
    # lane and step.
    #
    # 5. Vectorised: the same kernel with BLOCK = 256 lanes of 16 bytes.
    x += tl.program_id(0).to(tl.int64) * cols
    y += tl.program_id(0).to(tl.int64) * cols
    acc = tl.zeros([BLOCK], tl.float32)
    for c0 in range(0, cols, BLOCK):
        col = c0 + tl.arange(0, BLOCK)
        v = tl.load(x + col, mask=col < cols, other=0.0).to(tl.float32)
        acc += v * v
    scale_row(x, w, y, cols, tl.rsqrt(tl.sum(acc, axis=0) / cols + eps), BLOCK)


def rmsnorm(rung, x, w, eps, residual, y):
    """Launch rung 1, 4 or 5 on x, y [rows, cols], contiguous; residual is None (see lab/ladder.py)."""
    rows, cols = x.shape
    if rung == 1:
        launch(rmsnorm_naive_kernel, (rows,), x, w, y, cols, eps, BLOCK=32, num_warps=1)
    else:
        launch(
            rmsnorm_block_kernel,
            (rows,),
            x,
            w,
            y,
            cols,
            eps,
            BLOCK={4: 256, 5: 256 * 16 // x.itemsize}[rung],
            num_warps=8,
        )
