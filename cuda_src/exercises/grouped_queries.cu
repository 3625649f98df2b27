// Exercise grouped_queries: scores[h][t] = q[h] . k[t] for the four query heads that share one KV head.
//
// Question: the result is right. How often does the warp load each key, how often would be enough, and
// which loop must be the outer one?
//
// Mend it here, then: lab exercise check grouped_queries --language cuda
#include "watch.cuh"

using namespace lab;

constexpr int kGroup = 4, kDim = 32;  // lane d of the warp has dimension d

__global__ void scores_kernel(const float* q, const float* k, float* scores, int length) {
  const int lane = threadIdx.x;
  for (int h = 0; h < kGroup; ++h) {
    const float query = q[h * kDim + lane];
    for (int t = 0; t < length; ++t) {
      const float score = group_sum<kDim>(query * watched_load(k + t * kDim + lane));
      if (lane == 0) scores[h * length + t] = score;
    }
  }
}
