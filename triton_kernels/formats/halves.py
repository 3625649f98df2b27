"""Two codes in the halves of a 32-bit word, as two elements.

The formats work on words as long as they can, because then one instruction does the work for two codes. The
compiler sees that the halves of a word go to one register of a tensor-core operand, and moves nothing.
"""

import triton
import triton.language as tl

# The bits of powers of two so large that the last bit of the mantissa counts 1: 2^7 in bfloat16 and 2^10 in
# float16, in both halves of a word, and 2^23 in float32.
BF16_PAIR_128 = tl.constexpr(0x43004300)
F16_PAIR_1024 = tl.constexpr(0x64006400)
F32_8388608 = tl.constexpr(0x4B000000)


@triton.jit
def in_register(constant):
    """The constant, as a value that the compiler does not know: no launch has a third axis of programs.

    One instruction (LOP3) computes `x & mask | constant` if mask or constant is in a register. It takes two
    if the compiler knows both.
    """
    return tl.program_id(2) + constant


@triton.jit
def halves(words):
    """int16 [..., 2]: the low and the high half of each word."""
    return tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))


@triton.jit
def wide_halves(words):
    """int32 [..., 2]: the same, widened without the sign."""
    return tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF)
