"""Solution of dependent_launch: y = w x, launched while the kernel that writes x still runs.

Before gdc_wait() the preceding kernel may not have written x yet. Weights are written by no kernel, so they
may be loaded before: that load then overlaps the end of the preceding kernel, and in a decode step weights
are nearly all bytes. All results of other kernels are read after the wait.
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def scale_kernel(x, w, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(w + i)
    tl.extra.cuda.gdc_wait()
    value = tl.load(x + i)
    tl.extra.cuda.gdc_launch_dependents()
    tl.store(y + i, weight * value)


def scale(x, w, y):
    launch(scale_kernel, (x.numel() // 128,), x, w, y, BLOCK=128, launch_pdl=True)
