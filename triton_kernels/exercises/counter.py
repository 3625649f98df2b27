"""Exercise counter: the sum of each row of x, a launch each; the last program to finish adds up.

Question: a counter gives each program a ticket, and who draws the last one adds up. The first launch is
right, the second one writes nothing. What does it find in the counter, and who may put that right, when?

Mend it here, then: lab exercise check counter --language triton
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def sum_kernel(x, partial, counter, out, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    values = tl.load(x + program * BLOCK + tl.arange(0, BLOCK))
    tl.store(partial + program, tl.sum(values, axis=0))
    ticket = tl.atomic_add(counter, 1)
    if ticket == PROGRAMS - 1:
        total = tl.sum(tl.load(partial + tl.arange(0, PROGRAMS)), axis=0)
        tl.store(out, total)


def sums(x, partial, counter, out):
    """x [launches, n]; partial and counter are there to work with, and the counter is 0 at first."""
    for row in range(x.shape[0]):
        launch(sum_kernel, (8,), x[row], partial, counter, out[row:], PROGRAMS=8, BLOCK=x.shape[1] // 8)
