"""A quantised KV cache: how numbers become codes and codes numbers. lab/formats/kv.py describes the formats.

contract  lab/formats/kv.py          twin  cuda_src/core/kv_codes.cuh
"""

import torch
import triton
import triton.language as tl

from triton_kernels.common import architecture

# What a cache stores: NUMBERS in lab/formats/kv.py. FP8_BY_HARDWARE: fp8, where an instruction converts it.
PLAIN, FP8, INT8, FP8_BY_HARDWARE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
TWO_120 = tl.constexpr(float(1 << 120))


def format_of(cache):
    """FORMAT for kernels: PLAIN, FP8, INT8 or FP8_BY_HARDWARE, as an int."""
    if cache.dtype == torch.int8:
        return 2
    if cache.dtype != torch.uint8:
        return 0
    name = architecture(cache)
    return 3 if name != "interpreter" and int(name[3:]) >= 89 else 1


@triton.jit
def numbers(codes, T: tl.constexpr, FORMAT: tl.constexpr):
    """What the codes stand for before the scale, in T, exactly."""
    if FORMAT == INT8:
        result = codes.to(T)
    elif FORMAT == FP8_BY_HARDWARE:
        # One instruction converts two codes to float16; from there to bfloat16 it would take several slow
        # ones.
        result = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(T)
    elif T == tl.bfloat16:
        # As in formats/fp8.py: the fields are moved to their places in T, and the difference of the biases is
        # a power of two.
        code = codes.to(tl.int16)
        result = ((code & 0x80) << 8 | (code & 0x7F) << 4).to(tl.bfloat16, bitcast=True) * TWO_120
    elif T == tl.float16:
        code = codes.to(tl.int16)
        result = ((code & 0x80) << 8 | (code & 0x7F) << 7).to(tl.float16, bitcast=True) * 256.0
    else:
        code = codes.to(tl.int32)
        result = ((code & 0x80) << 24 | (code & 0x7F) << 20).to(tl.float32, bitcast=True) * TWO_120
    return result


@triton.jit
def as_float16(qv, scale_log2, FORMAT: tl.constexpr):
    """(queries, scale of their scores) for attend(): where the hardware makes float16 of codes, bfloat16
    becomes float16, too.

    Each row is divided by a power of two, so that its largest number is between 1 and 2. That is exact but
    for numbers below 2^-14, which lose what is below 2^-25.
    """
    scale = scale_log2 + tl.zeros([qv.shape[0], 1], tl.float32)
    if FORMAT == FP8_BY_HARDWARE and qv.dtype == tl.bfloat16:
        wide = qv.to(tl.float32)
        power = tl.max(tl.abs(wide), axis=1, keep_dims=True).to(tl.int32, bitcast=True) & 0x7F800000
        power = tl.where(power == 0, 1.0, power.to(tl.float32, bitcast=True))
        qv = (wide / power).to(tl.float16)
        scale *= power
    return qv, scale


@triton.jit
def fp8_codes(x, scale):
    """uint8: x / scale as e4m3, rounded to nearest even; +-448 where it is larger or NaN."""
    y = tl.div_rn(x, scale)
    y = tl.where(y < 448.0, y, 448.0)
    y = tl.where(y > -448.0, y, -448.0)
    bits = y.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Numbers with a leading one: the exponent's bias is 7, not 127, and 20 bits of the mantissa are rounded
    # off.
    normal = (magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    # The others are multiples of 2^-9: that is what the sum with 2^14 is rounded to.
    sum = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = sum.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)
    return code.to(tl.uint8)


@triton.jit
def int8_codes(x):
    """(codes int8, scales float16 [rows]) of heads x float32 [rows, BLOCK]."""
    # As integers the magnitudes compare as the numbers do, and NaN is above all numbers.
    most = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    scale = tl.div_rn(most, 127.0).to(tl.float16)
    divisor = scale.to(tl.float32)
    usable = (divisor > 0.0) & (divisor < float("inf"))
    y = tl.where(usable[:, None], tl.div_rn(x, tl.where(usable, divisor, 1.0)[:, None]), 0.0)
    # In the sum with 1.5 * 2^23 the last bit counts 1.
    rounded = (y + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    return tl.minimum(tl.maximum(rounded, -127), 127).to(tl.int8), scale


@triton.jit
def append_codes(cache, scales, x, row, where, live, live_row, FORMAT: tl.constexpr):
    """Stores heads x [rows, BLOCK] as codes at the offsets `where`. row [rows]: their tokens' rows in the
    cache.

    Returns what was stored: the codes' numbers before the scale, float32 [rows, BLOCK], and the scales,
    float32 [rows] (int8), or [] (fp8).
    """
    wide = x.to(tl.float32)
    if FORMAT == INT8:
        codes, scale = int8_codes(wide)
        tl.store(scales + row, scale, mask=live_row)
        scale = scale.to(tl.float32)
    else:
        scale = tl.load(scales)
        codes = fp8_codes(wide, scale)
    tl.store(cache + where, codes, mask=live)
    return numbers(codes, tl.float32, FORMAT), scale
