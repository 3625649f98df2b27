// Exercise bank_conflict: a warp transposes a 32 x 32 tile of floats through shared memory.
//
// Question: all loads and stores of global memory are coalesced. Shared memory has 32 banks of 4 bytes, and
// each bank serves one address in a step. How many steps does it take to read a column, and how must the type
// of the tile change so that it takes one?
//
// Mend it here, then: lab exercise check bank_conflict --language cuda
#include "watch.cuh"

using namespace lab;

constexpr int kSide = 32;

struct TransposeSmem { float tile[kSide][kSide]; };

__global__ void transpose_kernel(const float* x, float* y) {
  auto& tile = smem<TransposeSmem>().tile;
  const int lane = threadIdx.x;
  for (int row = 0; row < kSide; ++row) watched_store(&tile[row][lane], x[row * kSide + lane]);
  __syncwarp();
  for (int row = 0; row < kSide; ++row) y[row * kSide + lane] = watched_load(&tile[lane][row]);
}
