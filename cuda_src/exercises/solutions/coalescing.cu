// Solution of coalescing: y = 2 x, four numbers a thread.
//
// If each thread takes four neighbouring numbers, the lanes of one load are 16 bytes apart: 32 lanes touch 4
// lines and use a quarter of each. Neighbouring threads must take neighbouring numbers: 32 lanes, 128 bytes,
// one line. (Or each thread loads its four numbers at once, as 16 bytes: then a warp's load is 4 whole
// lines.)
#include "watch.cuh"

using namespace lab;

constexpr int kThreads = 128, kPerThread = 4;

__global__ void double_kernel(const float* x, float* y) {
  const int first = blockIdx.x * kThreads * kPerThread;
  for (int i = 0; i < kPerThread; ++i) {
    const int at = first + i * kThreads + threadIdx.x;
    watched_store(y + at, 2.f * watched_load(x + at));
  }
}
