"""q4_k: integers of 4 bits, as int4's; scale and minimum of a group are integers of 6 bits times d and dmin

contract  lab/formats/q4_k.py          twin  cuda_src/formats/q4_k.cuh
"""

import triton
import triton.language as tl


@triton.jit
def q4_k_words(at, place, known):
    """Of the four words from `at` on those that the scales of a segment are made of. place: 0 or 1, of the
    segment in its span."""
    low = tl.load(at + place, mask=known, other=0)
    d = tl.load(at + 2, mask=known, other=0)
    high = tl.load(at + 3, mask=known, other=0)
    return d, low, high


@triton.jit
def q4_k_scales(words, group, place):
    """(scale, minimum), float32: of group `group` of the four of a segment."""
    d, low, high = words
    # 1. Put together: the lower four bits of a group's integers and the upper two.
    low >>= 8 * group
    high >>= 8 * group + 4 * place
    scale = (low & 15) | (high & 3) << 4
    minimum = (low >> 4 & 15) | (high & 12) << 2
    # 2. Multiply: the product has 17 bits, so it is exact.
    of_scale = d.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    of_minimum = (d >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return of_scale * scale.to(tl.float32), -of_minimum * minimum.to(tl.float32)
