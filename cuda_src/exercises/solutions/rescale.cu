// Solution of rescale: the softmax average of a sequence's values, one number a token, in one pass over the
// scores.
//
// Sums of earlier tiles were made with the maximum of then. When it grows from `maximum` to `higher`, each
// of their terms is too large by exp(higher - maximum): both sums must be multiplied by exp(maximum -
// higher) before new terms are added. In the first tile that factor is exp(-1e30), which is 0, and so are
// the sums.
#include "common.cuh"

using namespace lab;

__global__ void average_kernel(const float* scores, const float* values, int length, float* out) {
  float maximum = -1e30f, weight = 0.f, sum = 0.f;  // weight and sum: this lane's tokens
  for (int t0 = 0; t0 < length; t0 += 32) {
    const int t = t0 + threadIdx.x;
    const float higher = fmaxf(maximum, group_max<32>(t < length ? scores[t] : -1e30f));
    const float factor = expf(maximum - higher);  // brings the sums so far to the new maximum
    weight *= factor;
    sum *= factor;
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
