"""fp8: floating-point numbers of 8 bits, e4m3: a sign, 4 bits of exponent with bias 7, 3 of mantissa

contract  lab/formats/fp8.py          twin  cuda_src/formats/fp8.cuh
"""

import triton
import triton.language as tl

from triton_kernels.formats.halves import halves, wide_halves

TWO_120 = tl.constexpr(float(1 << 120))


@triton.jit
def fp8_numbers(pairs, T: tl.constexpr):
    """T [..., 2]: the numbers of both codes of each word."""
    # 1. Move the fields: the sign to the top of T, exponent and mantissa so that the mantissas begin at the
    # same bit.
    # 2. Multiply: by the power of two that is the difference of the biases. Exact, for the numbers without a
    # leading one (exponent 0), too: they are subnormal in T before, and normal after.
    if T == tl.bfloat16:
        moved = (pairs & 0x00800080) << 8 | (pairs & 0x007F007F) << 4
        result = halves(moved).to(tl.bfloat16, bitcast=True) * TWO_120
    elif T == tl.float16:
        moved = (pairs & 0x00800080) << 8 | (pairs & 0x007F007F) << 7
        result = halves(moved).to(tl.float16, bitcast=True) * 256.0
    else:
        code = wide_halves(pairs)
        moved = (code & 0x80) << 24 | (code & 0x7F) << 20
        result = moved.to(tl.float32, bitcast=True) * TWO_120
    return result
