"""Solution of rounding_point: out[0] = x + r and out[1] = out[0] * w, which were two kernels, fused into one.

The second kernel read the sum from memory, rounded to fp16; the fused one multiplied the float32 sum, which
was never rounded. More exact, but another result: a fused kernel has to round at the points at which the
ops that it replaces stored their results. Contracts in lab/ops name these points.
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def add_scale_kernel(x, r, w, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + i).to(tl.float32) + tl.load(r + i).to(tl.float32)
    stored = total.to(tl.float16)
    tl.store(out + i, stored)
    tl.store(out + n + i, (stored.to(tl.float32) * tl.load(w + i).to(tl.float32)).to(tl.float16))


def add_scale(x, r, w, out):
    launch(add_scale_kernel, (x.numel() // 128,), x, r, w, out, x.numel(), BLOCK=128)
