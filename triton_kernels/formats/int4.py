"""int4: integers of 4 bits; a code c stands for c - MIDDLE, with MIDDLE 8 in the symmetric formats and else 0

contract  lab/formats/int4.py          twin  cuda_src/formats/int4.cuh
"""

import triton
import triton.language as tl

from triton_kernels.formats.halves import (
    BF16_PAIR_128,
    F16_PAIR_1024,
    F32_8388608,
    halves,
    in_register,
    wide_halves,
)


@triton.jit
def int4_numbers(pairs, T: tl.constexpr, MIDDLE: tl.constexpr):
    """T [..., 2]: c - MIDDLE of both codes of each word."""
    # 1. Make a number around the code: its bits become the last bits of the mantissa of a
    # power of two P, so the number is P + c. This replaces the conversion from integer, which the hardware
    # does slowly.
    # 2. Subtract: P + c and P + MIDDLE are exact in T, and so is their difference.
    if T == tl.bfloat16:
        result = halves(pairs | in_register(BF16_PAIR_128)).to(tl.bfloat16, bitcast=True) - (128.0 + MIDDLE)
    elif T == tl.float16:
        result = halves(pairs | in_register(F16_PAIR_1024)).to(tl.float16, bitcast=True) - (1024.0 + MIDDLE)
    else:
        bits = wide_halves(pairs) | in_register(F32_8388608)
        result = bits.to(tl.float32, bitcast=True) - (8388608.0 + MIDDLE)
    return result
