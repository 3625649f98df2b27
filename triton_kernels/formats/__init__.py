"""The weight formats in Triton: codes become numbers, and entries of `scales` become scales, in registers.

One file a format, as in cuda_src/formats/; this file chooses among them by FORMAT, the number of the format
in lab/formats. The layout of packed rows is described in lab/formats/format.py and unpacked in
core/packed_rows.py.

A kernel unpacks to T, the dtype of x. Each number (a code less the zero of its format) is exact in float32,
float16 and bfloat16, so no rounding happens before the multiplication. The scale is applied to the float32
sums.
"""

import triton
import triton.language as tl

from triton_kernels.formats.fp8 import fp8_numbers
from triton_kernels.formats.int4 import int4_numbers
from triton_kernels.formats.int8 import int8_numbers
from triton_kernels.formats.mxfp4 import mxfp4_numbers, mxfp4_scale
from triton_kernels.formats.q4_k import q4_k_scales, q4_k_words
from triton_kernels.formats.q6_k import q6_k_numbers, q6_k_scale, q6_k_words

# Format.number of lab/formats.
INT8, INT8_G32, INT4_G32, INT4_G32_MIN = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
INT4_G128, INT4_G128_ZERO, FP8, MXFP4 = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
FP8_G128, Q4_K, Q6_K = tl.constexpr(9), tl.constexpr(10), tl.constexpr(11)


@triton.constexpr_function
def span_of(format):
    """Segments whose scales are stored together: Format.span of lab/formats."""
    return 2 if format in (FP8_G128, Q4_K, Q6_K) else 1


@triton.constexpr_function
def items_of(format, parts):
    """Numbers of the scales of a span; parts: scales of a segment."""
    if format == Q4_K:
        return 4
    if format == Q6_K:
        return 5
    return parts


@triton.constexpr_function
def in_words(format):
    """Whether the scales of a segment are made of a few words: see load_words()."""
    return format in (Q4_K, Q6_K)


@triton.jit
def numbers(pairs, T: tl.constexpr, FORMAT: tl.constexpr):
    """What the codes stand for, before zero, scale and minimum: T [..., 2].

    pairs int32 [...]: two codes each, one in the low bits of either half, the other bits 0.
    """
    if FORMAT == INT8 or FORMAT == INT8_G32:
        result = int8_numbers(pairs, T)
    elif FORMAT == INT4_G32 or FORMAT == INT4_G128:
        result = int4_numbers(pairs, T, MIDDLE=8)
    elif FORMAT == INT4_G32_MIN or FORMAT == INT4_G128_ZERO or FORMAT == Q4_K:
        result = int4_numbers(pairs, T, MIDDLE=0)
    elif FORMAT == FP8 or FORMAT == FP8_G128:
        result = fp8_numbers(pairs, T)
    elif FORMAT == Q6_K:
        result = q6_k_numbers(pairs, T)
    else:
        tl.static_assert(FORMAT == MXFP4, "a weight format without a file in triton_kernels/formats")
        result = mxfp4_numbers(pairs, T)
    return result


@triton.jit
def load_words(at, place, known, FORMAT: tl.constexpr):
    """Three words of which scales_of_words() makes the scales of a segment. at: where the scales of its span
    begin. place: of the segment in the span."""
    if FORMAT == Q4_K:
        words = q4_k_words(at, place, known)
    else:
        words = q6_k_words(at, place, known)
    return words


@triton.jit
def scales_of_words(words, group, place, FORMAT: tl.constexpr):
    """(scale, minimum), float32: of group `group` of a segment; without a minimum the second is not one."""
    if FORMAT == Q4_K:
        result = q4_k_scales(words, group, place)
    else:
        scale = q6_k_scale(words, group)
        result = scale, scale
    return result


@triton.jit
def scale_number(entry, FORMAT: tl.constexpr):
    """float32: the scale of an entry of `scales`: the bits of a float16, the low ones of 32 if a second
    number follows, or the exponent of mxfp4."""
    if FORMAT == MXFP4:
        result = mxfp4_scale(entry)
    elif FORMAT == FP8_G128:
        result = entry
    else:
        result = entry.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return result


@triton.jit
def second_number(entry):
    """float32: the minimum or zero of an entry."""
    return (entry >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
