// A value and its index packed into one integer, so that an integer maximum is an argmax: the larger value
// wins, and of equal values the lower index. NaN counts as the largest value, so that a NaN in the input is
// always noticed.
#pragma once
#include "../common.cuh"

namespace lab {

// An integer that orders as x does; every NaN becomes the largest integer.
LAB_DEVICE uint32_t order_key(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = bit_cast<uint32_t>(x == 0.f ? 0.f : x);  // -0 and +0 are equal
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
LAB_DEVICE float key_value(uint32_t key) { return bit_cast<float>(key >> 31 ? key & 0x7fffffffu : ~key); }

LAB_DEVICE uint64_t candidate(float value, int index) {
  return uint64_t(order_key(value)) << 32 | uint32_t(~index);
}
LAB_DEVICE int candidate_index(uint64_t c) { return int(~uint32_t(c)); }

// The largest candidate among each `lanes` neighbouring lanes (a power of two), returned to each of them. All
// lanes of the warp must call it.
LAB_DEVICE uint64_t warp_best(uint64_t c, int lanes = 32) {
  for (int distance = lanes / 2; distance > 0; distance >>= 1) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, c, distance);
    c = other > c ? other : c;
  }
  return c;
}

}  // namespace lab
