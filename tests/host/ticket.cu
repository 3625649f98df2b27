// Blocks leave values and take a ticket (common.cuh); the last one adds up what all have left. For the race
// detector.
#include <cstdio>

#include "common.cuh"

using namespace lab;

__global__ void ticket_kernel(float* partial, unsigned* ticket, float* out) {
  auto& last = smem<int>();
  partial[blockIdx.x * 32 + threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) last = take_ticket(ticket) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  float sum = 0.f;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b * 32 + threadIdx.x];
  out[threadIdx.x] = sum;
}

int main() {
  static float partial[320], out[32];
  static unsigned ticket;
  Config config;
  config.grid = dim3(10);
  config.block = dim3(32);
  config.smem_bytes = 16;
  launch(config, "ticket_kernel", ticket_kernel, partial, &ticket, out);
  return out[3] == 30.f ? 0 : 1;
}
