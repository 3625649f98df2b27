// q6_k: integers of 6 bits; the scale for 16 columns is an 8-bit integer times a number for 256 columns
//
//   weight = (d * scale) * (code - 32)
//   contract  lab/formats/q6_k.py          twin  triton_kernels/formats/q6_k.py
#pragma once
#include "codes.cuh"

namespace lab {

struct Q6K {
  static constexpr int kBits = 6, kGroup = 16;
  static constexpr bool kSecond = false, kMinimum = false, kZero = false;

  // 16 scales of one byte and d: two segments.
  struct Scales {
    static constexpr int kSpan = 2, kBytes = 20;
    uint32_t integers[2];
    float d;

    LAB_DEVICE void load_from(const uint8_t* at, int place) {
      const auto* words = reinterpret_cast<const uint32_t*>(at);
      integers[0] = words[2 * place], integers[1] = words[2 * place + 1];
      d = reinterpret_cast<const float*>(at)[4];
    }
    // The product has 18 bits, so it is exact.
    LAB_DEVICE float scale(int group, int) const {
      return d * float(int8_t(integers[group / 4] >> (group % 4 * 8)));
    }
    LAB_DEVICE float second(int, int) const { return 0.f; }
  };

  template <typename T>
  static LAB_DEVICE uint32_t zero_pair(float) {
    return pair_of(from_float<T>(Magic<T>::kValue + 32.f));
  }

  // 1. Put together: the lower four bits of a pair and its upper two, which are in the second word at the
  // bits 2p .. of each half. An OR makes all six the last bits of a power of two P, as in int4.
  // 2. Subtract: P and 32, at once. Both terms are exact in T, and so is their difference.
  template <typename T>
  static LAB_DEVICE void numbers(uint32_t (&pairs)[4], const uint32_t* words, uint32_t zero) {
    LAB_UNROLL
    for (int p = 0; p < 4; ++p) {
      const uint32_t high = p < 2 ? words[1] << (4 - 2 * p) : words[1] >> (2 * p - 4);
      const uint32_t low = cut_into<0x000f000fu, Magic<T>::kPair>(words[0] >> (4 * p));
      pairs[p] = subtract_pair<T>((high & 0x00300030u) | low, zero);
    }
  }

  // 1. Put together: the same code by code, and a conversion from integer, which a CPU does at once.
  // 2. Subtract: before that, as integers.
  static LAB_DEVICE void values(float (&f)[8], const uint32_t* words) {
    constexpr int kShift[8] = {0, 16, 4, 20, 8, 24, 12, 28}, kHigh[8] = {0, 16, 2, 18, 4, 20, 6, 22};
    LAB_UNROLL
    for (int j = 0; j < 8; ++j) {
      const uint32_t code = (words[0] >> kShift[j] & 15u) | (words[1] >> kHigh[j] & 3u) << 4;
      f[j] = float(int(code) - 32);
    }
  }
};

}  // namespace lab
