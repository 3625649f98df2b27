"""q6_k: integers of 6 bits; a code c stands for c - 32; the scale of a group is an integer of 8 bits times d

contract  lab/formats/q6_k.py          twin  cuda_src/formats/q6_k.cuh
"""

import triton
import triton.language as tl

from triton_kernels.formats.int4 import int4_numbers


@triton.jit
def q6_k_pairs(low, high):
    """Two codes in each word, in the lowest bits of either half: of `low` their lower four bits, of `high`
    the upper two."""
    # 1. Put together: all six bits.
    return low | high << 4


@triton.jit
def q6_k_numbers(pairs, T: tl.constexpr):
    """T [..., 2]: c - 32 of both codes of each word."""
    # 2. Subtract: 32, as int4 subtracts its middle; 6 bits are not too many for it.
    return int4_numbers(pairs, T, MIDDLE=32)


@triton.jit
def q6_k_words(at, place, known):
    """Of the five words from `at` on those that the scales of a segment are made of. place: 0 or 1, of the
    segment in its span."""
    first = tl.load(at + 2 * place, mask=known, other=0)
    second = tl.load(at + 2 * place + 1, mask=known, other=0)
    d = tl.load(at + 4, mask=known, other=0)
    return first, second, d


@triton.jit
def q6_k_scale(words, group):
    """float32: the scale of group `group` of the eight of a segment. Exact: the product has 18 bits."""
    first, second, d = words
    integers = tl.where(group < 4, first, second) << (24 - group % 4 * 8)
    return d.to(tl.float32, bitcast=True) * (integers >> 24).to(tl.float32)
