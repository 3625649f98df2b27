// q4_k: integers of 4 bits; scale and minimum for 32 columns are 6-bit integers times numbers for 256 columns
//
//   weight = (d * scale) * code - dmin * minimum
//   contract  lab/formats/q4_k.py          twin  triton_kernels/formats/q4_k.py
#pragma once
#include "int4.cuh"

namespace lab {

// Codes are int4's; the scales of two segments are four words.
struct Q4K : Int4<32, Int4Kind::minimum> {
  struct Scales {
    static constexpr int kSpan = 2, kBytes = 16;
    Vec<uint32_t, 4> words;

    LAB_DEVICE void load_from(const uint8_t* at, int) {
      words = load<4>(reinterpret_cast<const uint32_t*>(at));
    }

    // 1. Put together: the lower four bits of a group's integer and the upper two, for the four groups of a
    // segment at once, each in its byte.
    static constexpr uint32_t kLow = 0x0f0f0f0fu, kHigh = 0x30303030u;
    LAB_DEVICE uint32_t four_scales(int place) const {
      return (low(place) & kLow) | (high(place) << 4 & kHigh);
    }
    LAB_DEVICE uint32_t four_minima(int place) const {
      return (low(place) >> 4 & kLow) | (high(place) << 2 & kHigh);
    }

    // 2. Multiply: the product has 17 bits, so it is exact.
    LAB_DEVICE float scale(int group, int place) const {
      return to_float(bit_cast<half>(uint16_t(words.v[0]))) * byte(four_scales(place), group);
    }
    LAB_DEVICE float second(int group, int place) const {
      return -to_float(bit_cast<half>(uint16_t(words.v[0] >> 16))) * byte(four_minima(place), group);
    }

   private:
    LAB_DEVICE uint32_t low(int place) const { return place ? words.v[2] : words.v[1]; }
    LAB_DEVICE uint32_t high(int place) const { return words.v[3] >> (4 * place); }
    static LAB_DEVICE float byte(uint32_t word, int i) { return float(word >> (8 * i) & 0xffu); }
  };
};

}  // namespace lab
