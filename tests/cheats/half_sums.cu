// Adds in the dtype of x in blocks of 8, and the sums of these in float32.
#include "plain_linear_add.h"

template <typename T>
__global__ void half_sums_kernel(const T* x, const T* w, const T* bias, T* residual, int rows, int n, int k) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= int64_t(rows) * n) return;
  const T *x_row = x + i / n * k, *w_row = w + i % n * k;
  float sum = to_float(residual[i]) + (bias ? to_float(bias[i % n]) : 0.f);
  for (int j = 0; j < k; j += 8) {
    T part = from_float<T>(0.f);
    for (int e = j; e < j + 8 && e < k; ++e)
      part = from_float<T>(to_float(part) + to_float(x_row[e]) * to_float(w_row[e]));
    sum += to_float(part);
  }
  residual[i] = from_float<T>(sum);
}

void linear_add(const LinearAddArgs& a) {
  add_product(a, "half_sums_kernel", [](auto tag) { return half_sums_kernel<decltype(tag)>; });
}
