// Rounds each product to the dtype of x before it is added.
#define linear honest
#include "linear.cu"
#undef linear

template <typename T>
__global__ void rounds_products_kernel(const T* x, const T* w, const T* bias, T* y, int rows, int n, int k) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= int64_t(rows) * n) return;
  const T *x_row = x + i / n * k, *w_row = w + i % n * k;
  float sum = bias ? to_float(bias[i % n]) : 0.f;
  for (int j = 0; j < k; ++j) sum += to_float(from_float<T>(to_float(x_row[j]) * to_float(w_row[j])));
  y[i] = from_float<T>(sum);
}

void linear(const LinearArgs& a) {
  if (a.w.format != 0 || a.out_dtype == 0) return honest(a);
  by_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    launch({dim3(blocks_for(int64_t(a.rows) * a.n, 128)), dim3(128), 0, a.stream}, "rounds_products_kernel",
           rounds_products_kernel<T>, as<const T>(a.x), as<const T>(a.w.data), as<const T>(a.bias),
           as<T>(a.y), a.rows, a.n, a.k);
  });
}
