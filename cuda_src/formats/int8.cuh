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

  // A signed byte is its low 7 bits minus 128 times its sign bit. Each becomes a number of T by an OR, the
  // latter because 128 with the sign bit added to its bits is 256 (for float16: 1024 + 128).
  template <typename T>
  static LAB_DEVICE void numbers(uint32_t (&pairs)[4], const uint32_t* words, uint32_t) {
    LAB_UNROLL
    for (int p = 0; p < 4; ++p) {
      const uint32_t bytes = words[p / 2] >> (p % 2 * 8);
      pairs[p] = subtract_pair<T>(cut_into<0x007f007fu, Magic<T>::kPair>(bytes),
                                  cut_into<0x00800080u, Magic<T>::kPair>(bytes));
    }
  }

  static LAB_DEVICE void values(float (&f)[8], const uint32_t* words) {
    constexpr int kToTop[8] = {24, 8, 16, 0, 24, 8, 16, 0};
    LAB_UNROLL
    for (int j = 0; j < 8; ++j) f[j] = float(int32_t(words[j / 4] << kToTop[j]) >> 24);
  }
};

}  // namespace lab
