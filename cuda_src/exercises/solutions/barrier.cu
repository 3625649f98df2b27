// Solution of barrier: a block reverses each tile of 128 numbers through shared memory.
//
// A thread that has read its number goes on to the next tile and overwrites an element that a slower thread
// has not read yet. The first barrier orders writes before reads; a second one orders these reads before the
// next writes.
#include "common.cuh"

using namespace lab;

constexpr int kTile = 128;

struct ReverseSmem { float tile[kTile]; };

__global__ void reverse_kernel(const float* x, float* y, int tiles) {
  auto& tile = smem<ReverseSmem>().tile;
  for (int t = 0; t < tiles; ++t) {
    tile[threadIdx.x] = x[t * kTile + threadIdx.x];
    __syncthreads();
    y[t * kTile + threadIdx.x] = tile[kTile - 1 - threadIdx.x];
    __syncthreads();  // all threads have read the tile
  }
}
