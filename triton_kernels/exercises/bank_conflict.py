"""Exercise bank_conflict: y = the transpose of x [rows, cols], a tile a program.

Question: in Triton the compiler lays out shared memory, so there is no bank conflict to mend; what is left
to you is the shape of the tile. Stores of y are whole lines here. How many lines of 128 bytes does one load
of x touch, and which tile has whole lines in both?

Mend it here, then: lab exercise check bank_conflict --language triton
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
    R, C = 32, 1
    launch(transpose_kernel, (rows // R, cols // C), x, y, rows, cols, R=R, C=C)
