"""Solution of barrier: y = x minus the mean of x, a block of numbers a program.

Nobody did: programs run in any order, and those that are not yet launched have stored nothing. Nothing
short of a cooperative launch lets programs wait for each other. But a kernel starts when the preceding one
has ended: the end of a launch is the barrier, so the sums and what needs all of them are two kernels.
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def sum_kernel(x, sums, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + tl.program_id(0), tl.sum(tl.load(x + at), axis=0))


@triton.jit
def centre_kernel(x, sums, y, n, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(sums + tl.arange(0, PROGRAMS)), axis=0)
    tl.store(y + at, tl.load(x + at) - total / n)


def centre(x, sums, y):
    """sums: a number for each block of 64, to work with."""
    blocks = x.numel() // 64
    launch(sum_kernel, (blocks,), x, sums, BLOCK=64)
    launch(centre_kernel, (blocks,), x, sums, y, x.numel(), PROGRAMS=blocks, BLOCK=64)
