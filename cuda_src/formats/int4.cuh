// int4: integers of 4 bits with a scale for every 32 or 128 columns
//
//   int4-g32        weight = scale * (code - 8)
//   int4-g32-min    weight = scale * code + minimum
//   int4-g128       weight = scale * (code - 8)
//   int4-g128-zero  weight = scale * (code - zero)
//   contract  lab/formats/int4.py          twin  triton_kernels/formats/int4.py
#pragma once
#include "codes.cuh"

namespace lab {

enum class Int4Kind { symmetric, minimum, zero };

template <int Group, Int4Kind Kind>
struct Int4 {
  static constexpr int kBits = 4, kGroup = Group;
  static constexpr bool kSecond = Kind != Int4Kind::symmetric, kMinimum = Kind == Int4Kind::minimum;
  static constexpr bool kZero = Kind == Int4Kind::zero;
  using Scale = half;

  // What numbers() subtracts: the zero, on top of what the bit pattern adds. second: the scale's second entry.
  template <typename T>
  static LAB_DEVICE uint32_t zero_pair(float second) {
    const float zero = Kind == Int4Kind::symmetric ? 8.f : kZero ? second : 0.f;
    return pair_of(from_float<T>(Magic<T>::kValue + zero));
  }

  // 1. Make a number around the code: pair p is cut out with one mask, because codes 2p and 2p + 1 lie 16
  // bits apart, and an OR makes its bits the last ones of a power of two P; the number is P + code. Mask and
  // OR are one instruction (LOP3).
  // 2. Subtract: P and the zero, at once. Both terms are exact in T, and so is their difference.
  template <typename T>
  static LAB_DEVICE void numbers(uint32_t (&pairs)[4], const uint32_t* word, uint32_t zero) {
    LAB_UNROLL
    for (int p = 0; p < 4; ++p) {
      pairs[p] = subtract_pair<T>(cut_into<0x000f000fu, Magic<T>::kPair>(word[0] >> (4 * p)), zero);
    }
  }

  // 1. Make a number around the code: in float32 by a conversion from integer, which a CPU does at once.
  // 2. Subtract: before that, as integers.
  static LAB_DEVICE void values(float (&f)[8], const uint32_t* word) {
    constexpr int kShift[8] = {0, 16, 4, 20, 8, 24, 12, 28}, kMiddle = Kind == Int4Kind::symmetric ? 8 : 0;
    LAB_UNROLL
    for (int j = 0; j < 8; ++j) f[j] = float(int(word[0] >> kShift[j] & 15u) - kMiddle);
  }
};

}  // namespace lab
