// Exercise counter: the sum of x by several blocks; the last one to finish adds up their sums.
//
// Question: a counter gives each block a ticket, and who draws the last one adds up. The first launch is
// right, the second one writes nothing. What does it find in the counter, and who may put that right, when?
//
// Mend it here, then: lab exercise check counter --language cuda
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
}
