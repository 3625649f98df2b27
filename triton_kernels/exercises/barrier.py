"""Exercise barrier: y = x minus the mean of x, a block of numbers a program.

Question: within a program Triton's compiler sets all barriers. Each program stores the sum of its block,
and then reads the sums of all blocks. Who guarantees that the others have stored theirs, and what could?

Mend it here, then: lab exercise check barrier --language triton
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def centre_kernel(x, sums, y, n, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at)
    tl.store(sums + tl.program_id(0), tl.sum(values, axis=0))
    total = tl.sum(tl.load(sums + tl.arange(0, PROGRAMS)), axis=0)
    tl.store(y + at, values - total / n)


def centre(x, sums, y):
    """sums: a number for each block of 64, to work with."""
    blocks = x.numel() // 64
    launch(centre_kernel, (blocks,), x, sums, y, x.numel(), PROGRAMS=blocks, BLOCK=64)
