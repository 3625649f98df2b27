"""Exercise split_merge: the last step of split attention, out [D] from the results of several splits.

Split s has summed its tokens' values with weights exp(score - tops[s]), where tops[s] is its own largest
score: sums [splits, D]   tops [splits]   masses [splits] (the sum of the weights)

Question: the result is right when all splits have the same largest score. By what must the sums of two splits
be multiplied before they may be added?

Correct it here, then: lab check --exercise split_merge          Solution: solutions/split_merge.py
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def merge_kernel(sums, tops, masses, out, splits, D: tl.constexpr, SPLITS: tl.constexpr):
    s, d = tl.arange(0, SPLITS), tl.arange(0, D)
    live = s < splits
    top = tl.load(tops + s, mask=live, other=float("-inf"))  # noqa: F841 (what the exercise leaves to the learner)
    mass = tl.load(masses + s, mask=live, other=0.0)
    share = tl.load(sums + s[:, None] * D + d[None, :], mask=live[:, None], other=0.0)
    result = tl.sum(share, axis=0) / tl.sum(mass, axis=0)
    tl.store(out + d, result)


def merge(sums, tops, masses, out):
    splits, dim = sums.shape
    launch(merge_kernel, (1,), sums, tops, masses, out, splits, D=dim, SPLITS=triton.next_power_of_2(splits))
