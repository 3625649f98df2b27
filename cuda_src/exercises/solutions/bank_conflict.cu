// Solution of bank_conflict: a warp transposes a 32 x 32 tile of floats through shared memory.
//
// With rows of 32 floats all elements of a column are in one bank: 32 steps. With one more float in a row,
// each element is in a bank of its own.
#include "watch.cuh"

using namespace lab;

constexpr int kSide = 32;

struct TransposeSmem {
  float tile[kSide][kSide + 1];  // 33: each row begins one bank further
};

__global__ void transpose_kernel(const float* x, float* y) {
  auto& tile = smem<TransposeSmem>().tile;
  const int lane = threadIdx.x;
  for (int row = 0; row < kSide; ++row) watched_store(&tile[row][lane], x[row * kSide + lane]);
  __syncwarp();
  for (int row = 0; row < kSide; ++row) y[row * kSide + lane] = watched_load(&tile[lane][row]);
}
