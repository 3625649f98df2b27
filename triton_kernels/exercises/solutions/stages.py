"""Solution of stages: y = w x, a block of 32 rows of w a program.

A tile of w has 32 x 128 x 4 bytes = 16 KiB. One stage keeps nothing in flight: each step waits for the
whole latency. Three keep 32 KiB in flight in 48 KiB of shared memory; up to 14 would fit, but more than the
latency needs gains nothing, and takes shared memory from other programs of the SM.
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def product_kernel(w, x, y, k, ROWS: tl.constexpr, K: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for k0 in range(0, k, K):
        col = k0 + tl.arange(0, K)
        tile = tl.load(w + row[:, None] * k + col[None, :])
        total += tl.sum(tile * tl.load(x + col)[None, :], axis=1)
    tl.store(y + row, total)


def product(w, x, y):
    rows, k = w.shape
    launch(product_kernel, (rows // 32,), w, x, y, k, ROWS=32, K=128, num_stages=3)
