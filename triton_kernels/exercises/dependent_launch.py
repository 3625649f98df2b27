"""Exercise dependent_launch: y = w x, launched while the kernel that writes x still runs.

Question: with programmatic dependent launch a kernel may start before the preceding one has ended. What may
it read before gdc_wait(), what not, and why is it worth something to read the rest early?

Mend it here, then: lab exercise check dependent_launch --language triton
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def scale_kernel(x, w, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(w + i)
    value = tl.load(x + i)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    tl.store(y + i, weight * value)


def scale(x, w, y):
    launch(scale_kernel, (x.numel() // 128,), x, w, y, BLOCK=128, launch_pdl=True)
