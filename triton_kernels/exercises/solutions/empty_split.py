"""Solution of empty_split: the softmax average of a sequence's values, a number a token, by several splits.

A split without tokens has sum 0 and weight 0, and publishes 0 / 0, which is NaN. Its weight in the result
is zero, but zero times NaN is NaN. So it must publish a number, or, as the ops' own kernels do, the sum
itself, which is divided once at the end.
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def split_kernel(scores, values, published, tokens, CHUNK: tl.constexpr):
    split = tl.program_id(0)
    t = split * CHUNK + tl.arange(0, CHUNK)
    score = tl.load(scores + t, mask=t < tokens, other=-1e30)
    top = tl.max(score, axis=0)
    share = tl.where(t < tokens, tl.exp(score - top), 0.0)
    mass = tl.sum(share, axis=0)
    total = tl.sum(share * tl.load(values + t, mask=t < tokens, other=0.0), axis=0)
    tl.store(published + split * 3, total / tl.where(mass > 0.0, mass, 1.0))
    tl.store(published + split * 3 + 1, top)
    tl.store(published + split * 3 + 2, mass)


@triton.jit
def merge_kernel(published, out, SPLITS: tl.constexpr):
    s = tl.arange(0, SPLITS)
    top, mass = tl.load(published + s * 3 + 1), tl.load(published + s * 3 + 2)
    share = mass * tl.exp(top - tl.max(top, axis=0))
    tl.store(out, tl.sum(share * tl.load(published + s * 3), axis=0) / tl.sum(share, axis=0))


def average(scores, values, published, out):
    """published: three numbers for each of 4 splits, to work with: average, largest score, weight."""
    tokens = scores.numel()
    chunk = 32 * triton.next_power_of_2(triton.cdiv(triton.cdiv(tokens, 32), 4))
    launch(split_kernel, (4,), scores, values, published, tokens, CHUNK=chunk)
    launch(merge_kernel, (1,), published, out, SPLITS=4)
