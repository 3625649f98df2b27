// Exercise dependent_launch: y = w x, launched while the kernel that writes x still runs.
//
// Question: with programmatic dependent launch a kernel may start before the preceding one has ended. What
// may it read before pdl_wait(), what not, and why is it worth something to read the rest early?
//
// Mend it here, then: lab exercise check dependent_launch --language cuda
#include "watch.cuh"

using namespace lab;

__global__ void scale_kernel(const float* x, const float* w, float* y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float weight = watched_load(w + i), value = watched_load(x + i);
  pdl_wait();
  pdl_launch_dependents();
  y[i] = weight * value;
}
