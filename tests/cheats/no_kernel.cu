// Computes on the host.
#define silu_mul honest
#include "silu_mul.cu"
#undef silu_mul
#include <cmath>

void silu_mul(const SiluMulArgs& a) {
  by_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* in = as<const T>(a.gate_up);
    T* y = as<T>(a.y);
    for (int r = 0; r < a.rows; ++r)
      for (int c = 0; c < a.cols; ++c) {
        const float g = to_float(in[r * 2 * a.cols + c]), u = to_float(in[(r * 2 + 1) * a.cols + c]);
        y[r * a.cols + c] = from_float<T>(g / (1.f + expf(-g)) * u);
      }
  });
}
