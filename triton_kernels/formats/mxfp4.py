"""mxfp4: floating-point numbers of 4 bits, e2m1 (a sign, 2 bits of exponent with bias 1, 1 of mantissa), and
scales that are powers of two

contract  lab/formats/mxfp4.py          twin  cuda_src/formats/mxfp4.cuh
"""

import triton
import triton.language as tl

from triton_kernels.formats.halves import halves, wide_halves

TWO_126 = tl.constexpr(float(1 << 126))


@triton.jit
def mxfp4_numbers(pairs, T: tl.constexpr):
    """T [..., 2]: the numbers of both codes of each word."""
    # 1. Move the fields: sign, exponent and mantissa to the places of T's, as in fp8.
    # 2. Multiply: by the power of two that is the difference of the biases.
    if T == tl.bfloat16:
        moved = (pairs & 0x00080008) << 12 | (pairs & 0x00070007) << 6
        result = halves(moved).to(tl.bfloat16, bitcast=True) * TWO_126
    elif T == tl.float16:
        moved = (pairs & 0x00080008) << 12 | (pairs & 0x00070007) << 9
        result = halves(moved).to(tl.float16, bitcast=True) * 16384.0
    else:
        code = wide_halves(pairs)
        moved = (code & 8) << 28 | (code & 7) << 22
        result = moved.to(tl.float32, bitcast=True) * TWO_126
    return result


@triton.jit
def mxfp4_scale(exponent):
    """float32: 2^(exponent - 127), which has the exponent's bits; 2^-127 is subnormal: a case apart."""
    bits = exponent.to(tl.int32) << 23
    return tl.where(bits == 0, 0x00400000, bits).to(tl.float32, bitcast=True)
