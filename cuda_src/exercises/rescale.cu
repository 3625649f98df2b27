// Exercise rescale: the softmax average of a sequence's values, one number a token, in one pass over the
// scores.
//
// Question: the pass keeps the largest score so far, and sums exp(score - largest). The result is right if
// the first 32 scores hold the largest one. What is wrong with the sums when a larger score comes, and by
// which factor?
//
// Mend it here, then: lab exercise check rescale --language cuda
#include "common.cuh"

using namespace lab;

__global__ void average_kernel(const float* scores, const float* values, int length, float* out) {
  float maximum = -1e30f, weight = 0.f, sum = 0.f;  // weight and sum: this lane's tokens
  for (int t0 = 0; t0 < length; t0 += 32) {
    const int t = t0 + threadIdx.x;
    const float higher = fmaxf(maximum, group_max<32>(t < length ? scores[t] : -1e30f));
    if (t < length) {
      const float share = expf(scores[t] - higher);
      weight += share;
      sum += share * values[t];
    }
    maximum = higher;
  }
  weight = group_sum<32>(weight);
  sum = group_sum<32>(sum);
  if (threadIdx.x == 0) *out = sum / weight;
}
