// Solution of dependent_launch: y = w x, launched while the kernel that writes x still runs.
//
// Before pdl_wait() the preceding kernel may not have written x yet. Weights are written by no kernel, so
// they may be loaded before: that load then overlaps the end of the preceding kernel, and in a decode step
// weights are nearly all bytes. All results of other kernels are read after the wait.
#include "watch.cuh"

using namespace lab;

__global__ void scale_kernel(const float* x, const float* w, float* y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float weight = watched_load(w + i);
  pdl_wait();
  pdl_launch_dependents();
  y[i] = weight * watched_load(x + i);
}
