"""int8: signed integers of 8 bits; a code is the bits of the integer

contract  lab/formats/int8.py          twin  cuda_src/formats/int8.cuh
"""

import triton
import triton.language as tl

from triton_kernels.formats.halves import BF16_PAIR_128, halves, in_register, wide_halves

# 2^10 in float16, and the sign bit of a code: in both halves of a word.
F16_PAIR_1024_FLIPPED = tl.constexpr(0x64806480)


@triton.jit
def int8_numbers(pairs, T: tl.constexpr):
    """T [..., 2]: the integers of both codes of each word."""
    # 1. Make a number around the code: as int4 does. With the sign bit flipped a code is c + 128, so the
    # number is P + c + 128. The mantissa of bfloat16 has room for 7 of the 8 bits, so the sign, which counts
    # -128, becomes a number of its own: P + 0, or P + 128 where the code is negative.
    # 2. Subtract: all terms are exact in T, and so is their difference.
    if T == tl.bfloat16:
        low = halves((pairs & 0x007F007F) | in_register(BF16_PAIR_128)).to(tl.bfloat16, bitcast=True)
        sign = halves((pairs & 0x00800080) | in_register(BF16_PAIR_128)).to(tl.bfloat16, bitcast=True)
        result = low - sign
    elif T == tl.float16:
        result = halves(pairs ^ in_register(F16_PAIR_1024_FLIPPED)).to(tl.float16, bitcast=True) - 1152.0
    else:
        result = (wide_halves(pairs) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0
    return result
