// int8: signed integers of 8 bits with one scale a row, or one for every 32 columns
//
//   weight = scale * code
//   contract  lab/formats/int8.py          twin  triton_kernels/formats/int8.py
#pragma once
#include "codes.cuh"

namespace lab {

template <int Group>
struct Int8 {
  static constexpr int kBits = 8, kGroup = Group;
  static constexpr bool kSecond = false, kMinimum = false, kZero = false;
  using Scale = std::conditional_t<Group == 0, float, half>;

  template <typename T>
  static LAB_DEVICE uint32_t zero_pair(float) {
    return 0;
  }

  // 1. Make a number around the code: a signed byte is its low 7 bits minus 128 times its sign bit. Either
  // becomes a number of T by an OR, which makes its bits the last ones of a power of two P: P + low bits, and
  // P or P + 128. (In bfloat16 P is 128, and with the sign bit 256.)
  // 2. Subtract: the second number from the first. Both are exact in T, and so is their difference.
  template <typename T>
  static LAB_DEVICE void numbers(uint32_t (&pairs)[4], const uint32_t* words, uint32_t) {
    LAB_UNROLL
    for (int p = 0; p < 4; ++p) {
      const uint32_t bytes = words[p / 2] >> (p % 2 * 8);
      pairs[p] = subtract_pair<T>(cut_into<0x007f007fu, Magic<T>::kPair>(bytes),
                                  cut_into<0x00800080u, Magic<T>::kPair>(bytes));
    }
  }

  // 1. Make a number around the code: in float32 by a conversion from integer, which a CPU does at once.
  // 2. Subtract: nothing, for the conversion knows the sign.
  static LAB_DEVICE void values(float (&f)[8], const uint32_t* words) {
    constexpr int kToTop[8] = {24, 8, 16, 0, 24, 8, 16, 0};
    LAB_UNROLL
    for (int j = 0; j < 8; ++j) f[j] = float(int32_t(words[j / 4] << kToTop[j]) >> 24);
  }
};

}  // namespace lab
