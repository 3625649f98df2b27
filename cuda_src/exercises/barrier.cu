// Exercise barrier: a block reverses each tile of 128 numbers through shared memory.
//
// Question: every thread waits until the tile is complete before it reads from it, and yet some numbers of
// the result belong to another tile. Which two accesses race, in which order must they happen, and what
// ensures that order?
//
// Mend it here, then: lab exercise check barrier --language cuda
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
  }
}
