// Solution of grouped_queries: scores[h][t] = q[h] . k[t] for the four query heads that share one KV head.
//
// With the loop over heads outside, all keys are loaded once for each head: four times, and in a decode
// step the keys are what costs time. With the loop over tokens outside a key is loaded once, into a
// register, and multiplied with all four queries, which fit in registers as well.
#include "watch.cuh"

using namespace lab;

constexpr int kGroup = 4, kDim = 32;  // lane d of the warp has dimension d

__global__ void scores_kernel(const float* q, const float* k, float* scores, int length) {
  const int lane = threadIdx.x;
  float query[kGroup];
  for (int h = 0; h < kGroup; ++h) query[h] = q[h * kDim + lane];
  for (int t = 0; t < length; ++t) {
    const float key = watched_load(k + t * kDim + lane);
    for (int h = 0; h < kGroup; ++h) {
      const float score = group_sum<kDim>(query[h] * key);
      if (lane == 0) scores[h * length + t] = score;
    }
  }
}
