"""Exercise coalescing: y = 2 x, a block of numbers a program.

Question: the result is right, and every byte is loaded and stored once. In CUDA neighbouring threads take
neighbouring numbers, and so a thread's own are far apart. A program of Triton is not a thread: how many
lines of 128 bytes does one load of it touch here, how few would do, and which numbers should a program
take?

Mend it here, then: lab exercise check coalescing --language triton
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def double_kernel(x, y, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) + tl.arange(0, BLOCK) * PROGRAMS
    tl.store(y + at, 2.0 * tl.load(x + at))


def double(x, y):
    launch(double_kernel, (x.numel() // 128,), x, y, PROGRAMS=x.numel() // 128, BLOCK=128)
