"""Solution of split_merge: the last step of split attention, out [D] from the results of several splits.

The weights of split s are exp(score - tops[s]), each split with a maximum of its own. Before sums and masses
may be added they must refer to the same maximum: multiply them by exp(tops[s] - the largest top).
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def merge_kernel(sums, tops, masses, out, splits, D: tl.constexpr, SPLITS: tl.constexpr):
    s, d = tl.arange(0, SPLITS), tl.arange(0, D)
    live = s < splits
    top = tl.load(tops + s, mask=live, other=float("-inf"))
    mass = tl.load(masses + s, mask=live, other=0.0)
    share = tl.load(sums + s[:, None] * D + d[None, :], mask=live[:, None], other=0.0)
    factor = tl.exp(top - tl.max(top, axis=0))
    result = tl.sum(share * factor[:, None], axis=0) / tl.sum(mass * factor, axis=0)
    tl.store(out + d, result)


def merge(sums, tops, masses, out):
    splits, dim = sums.shape
    launch(merge_kernel, (1,), sums, tops, masses, out, splits, D=dim, SPLITS=triton.next_power_of_2(splits))
