// Solution of counter: the sum of x by several blocks; the last one to finish adds up their sums.
//
// Tickets of the second launch go on where those of the first ended, so no block draws number gridDim.x -
// 1. The block with the last ticket is the only one that knows that no other will touch the counter in this
// launch: it sets the counter to 0. No memset is needed, and a CUDA graph can replay the kernel.
#include "common.cuh"

using namespace lab;

__global__ void sum_kernel(const float* x, float* partial, unsigned* counter, float* out) {
  const float sum = group_sum<32>(x[blockIdx.x * 32 + threadIdx.x]);
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = sum;
  if (take_ticket(counter) != gridDim.x - 1) return;  // another block is still to come
  float total = 0.f;
  for (unsigned b = 0; b < gridDim.x; ++b) total += partial[b];
  *out = total;
  *counter = 0;  // for the next launch: no other block of this one draws a ticket any more
}
