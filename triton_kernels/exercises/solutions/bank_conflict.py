"""Solution of bank_conflict: y = the transpose of x [rows, cols], a tile a program.

A tile of 32 rows and one column is a line of y, but each of its numbers comes from a line of x of its own.
A tile of 32 x 32 is 32 whole lines of both. Between load and store the compiler moves it through shared
memory, in a layout (swizzled or padded) without bank conflicts: what CUDA's twin of this exercise does by
hand.
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def transpose_kernel(x, y, rows, cols, R: tl.constexpr, C: tl.constexpr):
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.program_id(1) * C + tl.arange(0, C)
    tile = tl.load(x + r[:, None] * cols + c[None, :])
    tl.store(y + c[:, None] * rows + r[None, :], tl.trans(tile))


def transpose(x, y):
    rows, cols = x.shape
    R, C = 32, 32
    launch(transpose_kernel, (rows // R, cols // C), x, y, rows, cols, R=R, C=C)
