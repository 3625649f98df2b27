"""Solution of coalescing: y = 2 x, a block of numbers a program.

A program's elements were as many numbers apart as there are programs: each of its loads touched a line for
every one or two numbers. Within a program the compiler assigns elements to threads so that they are
coalesced, if the elements are neighbours. So a program takes BLOCK numbers in a row.
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def double_kernel(x, y, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2.0 * tl.load(x + at))


def double(x, y):
    launch(double_kernel, (x.numel() // 128,), x, y, PROGRAMS=x.numel() // 128, BLOCK=128)
