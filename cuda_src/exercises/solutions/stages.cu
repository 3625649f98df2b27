// Solution of stages: a warp sums tiles that cp.async copies into a ring of three stages ahead of time.
//
// When tile t is read, the groups 0 to t + 1 are committed (tile t + 2 is issued after it). For group t to
// be complete one may be in flight: kStages - 2. With kStages - 1 the tile may not have arrived. With 0 the
// result is right, but each step waits for the newest copy, too, so memory is idle while the warp adds.
#include "common.cuh"

using namespace lab;

constexpr int kStages = 3;

struct Ring { float4 tile[kStages][32]; };

__global__ void sum_kernel(const float4* x, float* y, int tiles) {
  auto& tile = smem<Ring>().tile;
  const int lane = threadIdx.x;
  const auto issue = [&](int t) {
    if (t < tiles) cp_async16(&tile[t % kStages][lane], x + t * 32 + lane);
    cp_async_commit();  // past the end an empty group, so that each step has one
  };
  for (int t = 0; t < kStages - 1; ++t) issue(t);
  float sum = 0.f;
  for (int t = 0; t < tiles; ++t) {
    cp_async_wait<kStages - 2>();
    const float4 v = tile[t % kStages][lane];  // what this lane copied itself: no barrier is needed
    sum += v.x + v.y + v.z + v.w;
    issue(t + kStages - 1);
  }
  cp_async_wait<0>();  // when a thread ends, nothing may be in flight
  sum = group_sum<32>(sum);
  if (lane == 0) *y = sum;
}
