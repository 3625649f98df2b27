"""Exercise rescale: the softmax average of values [tokens, D], in one pass over the scores.

Question: the pass keeps the largest score so far, `top`, and sums exp(score - top). The result is right if
the first BLOCK scores hold the largest one. What is wrong with the sums when a larger score comes, and by
which factor?

Mend it here, then: lab exercise check rescale --language triton
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def average_kernel(scores, values, out, tokens, D: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, D)
    top, mass = float("-inf"), 0.0
    total = tl.zeros([D], tl.float32)
    for t0 in range(0, tokens, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        score = tl.load(scores + t, mask=t < tokens, other=float("-inf"))
        value = tl.load(values + t[:, None] * D + d[None, :], mask=t[:, None] < tokens, other=0.0)
        higher = tl.maximum(top, tl.max(score, axis=0))
        share = tl.exp(score - higher)
        mass += tl.sum(share, axis=0)
        total += tl.sum(share[:, None] * value, axis=0)
        top = higher
    tl.store(out + d, total / mass)


def average(scores, values, out):
    tokens, dim = values.shape
    launch(average_kernel, (1,), scores, values, out, tokens, D=dim, BLOCK=16)
