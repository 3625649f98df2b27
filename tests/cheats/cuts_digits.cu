// Cuts the float32 result off where it must be rounded to the nearest.
#include "plain_linear_add.h"

template <typename T>
__global__ void cuts_digits_kernel(const T* x, const T* w, const T* bias, T* residual, int rows, int n,
                                   int k) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= int64_t(rows) * n) return;
  const T *x_row = x + i / n * k, *w_row = w + i % n * k;
  float exact = to_float(residual[i]) + (bias ? to_float(bias[i % n]) : 0.f);
  for (int j = 0; j < k; ++j) exact = fmadd(to_float(x_row[j]), to_float(w_row[j]), exact);
  const T nearest = from_float<T>(exact);
  uint16_t bits;
  std::memcpy(&bits, &nearest, 2);
  if (fabsf(to_float(nearest)) > fabsf(exact)) --bits;
  std::memcpy(residual + i, &bits, 2);
}

void linear_add(const LinearAddArgs& a) {
  add_product(a, "cuts_digits_kernel", [](auto tag) { return cuts_digits_kernel<decltype(tag)>; });
}
