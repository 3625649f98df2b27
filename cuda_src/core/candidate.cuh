// The largest of many values and its index, in one integer: the larger value wins, of equals the lower index. NaN is
// the largest of all, so that none goes unnoticed.
#pragma once
#include "../common.cuh"

namespace lab {

// An integer that is ordered as x is; every NaN becomes the largest.
LAB_DEVICE uint32_t order_key(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = bit_cast<uint32_t>(x == 0.f ? 0.f : x);  // -0 and +0 tie
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
LAB_DEVICE float key_value(uint32_t key) { return bit_cast<float>(key >> 31 ? key & 0x7fffffffu : ~key); }

LAB_DEVICE uint64_t candidate(float value, int index) { return uint64_t(order_key(value)) << 32 | uint32_t(~index); }
LAB_DEVICE int candidate_index(uint64_t c) { return int(~uint32_t(c)); }

// The largest of the candidates of `lanes` neighbouring lanes (a power of two), for each of them. All of the warp call it.
LAB_DEVICE uint64_t warp_best(uint64_t c, int lanes = 32) {
  for (int distance = lanes / 2; distance > 0; distance >>= 1) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, c, distance);
    c = other > c ? other : c;
  }
  return c;
}

}  // namespace lab
