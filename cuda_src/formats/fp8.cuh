// fp8: floating-point numbers of 8 bits (e4m3) with one scale a row, or one for every 128 columns
//
//   weight = scale * number(code)
//   contract  lab/formats/fp8.py          twin  triton_kernels/formats/fp8.py
#pragma once
#include "codes.cuh"

namespace lab {

template <int Group>
struct Fp8 {
  static constexpr int kBits = 8, kGroup = Group;
  static constexpr bool kSecond = false, kMinimum = false, kZero = false;
  using Scale = float;

  template <typename T>
  static LAB_DEVICE uint32_t zero_pair(float) {
    return 0;
  }

  // 1. Move the fields: exponent and mantissa to where T has the ends of its own; the sign stays at the top.
  // The bits are then a number of T, 2^-8 (float16) or 2^-120 (bfloat16) as large, because T's exponent has
  // another bias.
  // 2. Multiply: by that power of two. Exact, for subnormal numbers (exponent 0), too.
  template <typename T>
  static LAB_DEVICE void numbers(uint32_t (&pairs)[4], const uint32_t* words, uint32_t) {
    constexpr bool kHalf = std::is_same_v<T, half>;
    LAB_UNROLL
    for (int p = 0; p < 4; ++p) {
      const uint32_t bytes = p % 2 ? words[p / 2] : words[p / 2] << 8;
      const uint32_t bits = (bytes & 0x80008000u) | (bytes & 0x7f007f00u) >> (kHalf ? 1 : 4);
      pairs[p] = multiply_pair<T>(bits, kHalf ? 0x5c005c00u : 0x7b807b80u);
    }
  }

  // 1. Move the fields: the same in float32, whose exponent has the bias of bfloat16's.
  // 2. Multiply: by 2^120.
  static LAB_DEVICE void values(float (&f)[8], const uint32_t* words) {
    constexpr int kToTop[8] = {24, 8, 16, 0, 24, 8, 16, 0};
    LAB_UNROLL
    for (int j = 0; j < 8; ++j) {
      const uint32_t code = words[j / 4] << kToTop[j];
      f[j] = bit_cast<float>((code & 0x80000000u) | (code & 0x7f000000u) >> 4) * 0x1p120f;
    }
  }
};

}  // namespace lab
