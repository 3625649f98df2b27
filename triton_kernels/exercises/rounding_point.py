"""Exercise rounding_point: out[0] = x + r and out[1] = out[0] * w, which were two kernels, fused into one.

Question: out[0] is stored in fp16, because a later kernel reads it. After the fusion some elements of
out[1] differ in the last bit from what the two kernels gave, which is enough to change a token. Which value
did the second kernel read that the fused one does not use?

Mend it here, then: lab exercise check rounding_point --language triton
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def add_scale_kernel(x, r, w, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + i).to(tl.float32) + tl.load(r + i).to(tl.float32)
    tl.store(out + i, total.to(tl.float16))
    tl.store(out + n + i, (total * tl.load(w + i).to(tl.float32)).to(tl.float16))


def add_scale(x, r, w, out):
    launch(add_scale_kernel, (x.numel() // 128,), x, r, w, out, x.numel(), BLOCK=128)
