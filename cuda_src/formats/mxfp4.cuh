// mxfp4: floating-point numbers of 4 bits (e2m1) with one power of two for every 32 columns
//
//   weight = 2^(exponent - 127) * number(code)
//   contract  lab/formats/mxfp4.py          twin  triton_kernels/formats/mxfp4.py
#pragma once
#include "codes.cuh"

namespace lab {

struct Mxfp4 {
  static constexpr int kBits = 4, kGroup = 32;
  static constexpr bool kSecond = false, kMinimum = false, kZero = false;
  using Scale = uint8_t;

  template <typename T>
  static LAB_DEVICE uint32_t zero_pair(float) {
    return 0;
  }

  // 1. Move the fields: sign, exponent and mantissa to the places of T's, as in fp8.
  // 2. Multiply: by the power of two that is the difference of the biases.
  template <typename T>
  static LAB_DEVICE void numbers(uint32_t (&pairs)[4], const uint32_t* word, uint32_t) {
    constexpr bool kHalf = std::is_same_v<T, half>;
    LAB_UNROLL
    for (int p = 0; p < 4; ++p) {
      const uint32_t sign = word[0] << (12 - 4 * p) & 0x80008000u;
      constexpr int kTo = kHalf ? 9 : 6;  // where the lowest bit goes
      const uint32_t size = 4 * p <= kTo ? word[0] << (kTo - 4 * p) : word[0] >> (4 * p - kTo);
      const uint32_t bits = sign | (size & (kHalf ? 0x0e000e00u : 0x01c001c0u));
      pairs[p] = multiply_pair<T>(bits, kHalf ? 0x74007400u : 0x7e807e80u);  // 2^14, 2^126
    }
  }

  // 1. Move the fields: the same in float32, whose exponent has the bias of bfloat16's.
  // 2. Multiply: by 2^126.
  static LAB_DEVICE void values(float (&f)[8], const uint32_t* word) {
    constexpr int kShift[8] = {0, 16, 4, 20, 8, 24, 12, 28};
    LAB_UNROLL
    for (int j = 0; j < 8; ++j) {
      const uint32_t code = word[0] >> kShift[j];
      f[j] = bit_cast<float>((code & 8u) << 28 | (code & 7u) << 22) * 0x1p126f;
    }
  }
};

}  // namespace lab
