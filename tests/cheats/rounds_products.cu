// Rounds each product to the dtype of x before it is added.
#include "plain_linear_add.h"

template <typename T>
__global__ void rounds_products_kernel(const T* x, const T* w, const T* bias, T* residual, int rows, int n,
                                       int k) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= int64_t(rows) * n) return;
  const T *x_row = x + i / n * k, *w_row = w + i % n * k;
  float sum = to_float(residual[i]) + (bias ? to_float(bias[i % n]) : 0.f);
  for (int j = 0; j < k; ++j) sum += to_float(from_float<T>(to_float(x_row[j]) * to_float(w_row[j])));
  residual[i] = from_float<T>(sum);
}

void linear_add(const LinearAddArgs& a) {
  add_product(a, "rounds_products_kernel", [](auto tag) { return rounds_products_kernel<decltype(tag)>; });
}
