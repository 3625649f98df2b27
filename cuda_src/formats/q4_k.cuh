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
    uint32_t low;
    Vec<uint32_t, 2> d_and_high;

    LAB_DEVICE void load_from(const uint8_t* at, int place) {
      low = reinterpret_cast<const uint32_t*>(at)[place];
      d_and_high = load<2>(reinterpret_cast<const uint32_t*>(at) + 2);
    }

    // 1. Put together: the lower four bits of a group's integer and the upper two, for the four groups of a
    // segment at once, each in its byte.
    static constexpr uint32_t kLow = 0x0f0f0f0fu, kHigh = 0x30303030u;
    LAB_DEVICE uint32_t four_scales(int place) const { return (low & kLow) | (high(place) & kHigh); }
    LAB_DEVICE uint32_t four_minima(int place) const {
      return (low >> 4 & kLow) | (high(place) >> 2 & kHigh);
    }

    // 2. Multiply: the product has 17 bits, so it is exact.
    LAB_DEVICE float scale(int group, int place) const {
      return times_byte(to_float(bit_cast<half>(uint16_t(d_and_high.v[0]))), four_scales(place), group);
    }
    LAB_DEVICE float second(int group, int place) const {
      return times_byte(-to_float(bit_cast<half>(uint16_t(d_and_high.v[0] >> 16))), four_minima(place),
                        group);
    }

   private:
    // The upper bits of scales in the bits 4 and 5 of each byte, of minima in 6 and 7.
    LAB_DEVICE uint32_t high(int place) const { return d_and_high.v[1] << (4 - 4 * place); }

    // d * byte i of the word, without a conversion from integer: one instruction makes the byte the last bits of
    // 2^23, and from the product d * (2^23 + byte) a fused multiply-add subtracts d * 2^23.
    static LAB_DEVICE float times_byte(float d, uint32_t word, int i) {
#ifdef __CUDACC__
      return fmadd(bit_cast<float>(__byte_perm(word, 0x4b000000u, 0x7440u | i)), d, d * -0x1p23f);
#else
      return d * float(word >> (8 * i) & 0xffu);
#endif
    }
  };
};

}  // namespace lab
