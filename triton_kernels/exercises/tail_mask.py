"""Exercise tail_mask: y[r] = mean of row r of x [rows, cols].

Question: the means are right wherever cols is a multiple of BLOCK. What does the last step of a row read
otherwise, and what must it read?

Mend it here, then: lab exercise check tail_mask --language triton
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def row_mean_kernel(x, y, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = 0.0
    for c0 in range(0, cols, BLOCK):
        col = c0 + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x + row * cols + col), axis=0)
    tl.store(y + row, total / cols)


def row_mean(x, y):
    launch(row_mean_kernel, (x.shape[0],), x, y, x.shape[1], BLOCK=32)
