// Exercise coalescing: y = 2 x, four numbers a thread.
//
// Question: the result is right, and every byte is loaded and stored once. How many lines of 128 bytes does
// one load of a warp touch, how few would do, and which thread should take which four numbers?
//
// Mend it here, still with one number at a time, then: lab exercise check coalescing --language cuda
#include "watch.cuh"

using namespace lab;

constexpr int kThreads = 128, kPerThread = 4;

__global__ void double_kernel(const float* x, float* y) {
  const int first = blockIdx.x * kThreads * kPerThread;
  for (int i = 0; i < kPerThread; ++i) {
    const int at = first + threadIdx.x * kPerThread + i;
    watched_store(y + at, 2.f * watched_load(x + at));
  }
}
