// Exercise empty_split: the softmax average of a sequence's values, one number a token, by several splits
// that a second kernel merges.
//
// Question: whole tiles of 32 tokens are given to the splits in turn, so with a short sequence the last
// splits have no token. What does such a split publish, and why does its weight of zero not keep that out of
// the result?
//
// Mend it here, then: lab exercise check empty_split --language cuda
#include "common.cuh"

using namespace lab;

struct Split { float average, maximum, weight; };

// A warp per split: average = sum of exp(score - maximum) * value / weight, weight = sum of exp(score -
// maximum).
__global__ void split_kernel(const float* scores, const float* values, int length, Split* published) {
  const int tiles = (length + 31) / 32, splits = gridDim.x, split = blockIdx.x;
  const int chunk = (tiles + splits - 1) / splits * 32;
  const int begin = split * chunk, end = min(length, begin + chunk);
  float maximum = -1e30f, weight = 0.f, sum = 0.f;
  for (int t = begin + threadIdx.x; t < end; t += 32) maximum = fmaxf(maximum, scores[t]);
  maximum = group_max<32>(maximum);
  for (int t = begin + threadIdx.x; t < end; t += 32) {
    const float share = expf(scores[t] - maximum);
    weight += share;
    sum += share * values[t];
  }
  weight = group_sum<32>(weight);
  sum = group_sum<32>(sum);
  if (threadIdx.x == 0) published[split] = {sum / weight, maximum, weight};
}

__global__ void merge_kernel(const Split* published, int splits, float* out) {
  float maximum = -1e30f, weight = 0.f, sum = 0.f;
  for (int s = 0; s < splits; ++s) maximum = fmaxf(maximum, published[s].maximum);
  for (int s = 0; s < splits; ++s) {
    const float share = published[s].weight * expf(published[s].maximum - maximum);
    weight += share;
    sum += share * published[s].average;
  }
  *out = weight == 0.f ? 0.f : sum / weight;  // without any token: zero
}
