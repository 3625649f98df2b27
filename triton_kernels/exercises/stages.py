"""Exercise stages: y = w x, a block of 32 rows of w a program.

Question: the result is right at any num_stages: the compiler makes the ring of tiles, its cp.async and its
waits (CUDA's twin of this exercise does that by hand). With n stages, n - 1 tiles are in flight while one
is multiplied, and n tiles lie in shared memory. An SM runs one of these programs, and an H100 needs about
25 KB in flight on each SM: 3.35 TB/s x 1 us / 132. It has 227 KB of shared memory. How many bytes has a
tile, and how many stages are right?

Mend it here, then: lab exercise check stages --language triton
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
    launch(product_kernel, (rows // 32,), w, x, y, k, ROWS=32, K=128, num_stages=1)
