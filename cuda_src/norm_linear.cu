// norm_linear: y[b, n] = sum over k of xn[b, k] * w[n, k] (+ bias[n]), xn = rmsnorm(x, norm_w)
//
//   x [rows, k]   norm_w [k]   w [n, k]   bias [n] (optional)   y [rows, n] in the dtype of x or float32
//   rows <= 64
//   normed [rows, k]: workspace, used on tensor cores
//   mapping   up to 2 rows, and float32: as linear; each block normalises all rows itself, into shared memory
//             more rows in float16 or bfloat16, and packed w: rmsnorm's kernel, then linear's
//   traffic   w once (the only traffic that counts); x and norm_w, or on tensor cores normed, once per block
//             from L2; y once
//   contract  lab/ops/norm_linear.py          twin  triton_kernels/norm_linear.py
#include "common.cuh"
#include "core/norm_rows.cuh"
#include "launchers/linear.h"
#include "launchers/norm_linear.h"

using namespace lab;

template <typename T, typename C>
__global__ void __launch_bounds__(C::kThreads, C::kResident)
    norm_linear_kernel(const T* x, const T* norm_w, const T* w, const T* bias, void* y, int rows, int n,
                       int k, float eps, bool out_f32) {
  // 1. Locate: R rows of w per lane group, a slice of k per lane.
  auto& shared = smem<NormSmem<T, C>>();
  RowStream<T, C> stream(shared.stream, w, n, k);

  for (int b0 = 0; b0 < rows; b0 += C::B) {
    // 2. Norm: while the loads of the first weights are in flight. Rounded to T before and after norm_w.
    start_normed(stream, shared, x, norm_w, b0, rows, eps);

    for (; stream.more(); stream.next()) {
      // 3. Multiply: weights are loaded from DRAM into registers, x from shared memory.
      float base[C::kMine] = {}, acc[C::R][C::B][C::kLanes] = {}, sums[C::R * C::B];
      if (bias)
        stream.each_output(b0, rows, [&](int j, int output, int) { base[j] = to_float(bias[output]); });
      stream.multiply(acc, 0, k, [&](int b, int col) { return load_packed<C::N>(shared.x + b * k + col); });

      // 4. Reduce: over the lanes and warps that share k, in a fixed order.
      stream.reduce(sums, acc);

      // 5. Store: neighbouring lanes store neighbouring outputs.
      stream.each_output(b0, rows, [&](int j, int output, int b) {
        store_as<T>(y, size_t(b) * n + output, sums[j] + base[j], out_f32);
      });
    }
  }
}

void norm_linear(const NormLinearArgs& a) {
  if (a.rows == 0 || a.n == 0) return;
  by_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    const Settings tuned = settings::find("norm_linear", sizeof(T), a.rows, {a.n, a.k});
    if (a.w.format != int(Format::plain) || (sizeof(T) == 2 && a.rows > most_stream_rows())) {
      norm_into("norm_linear", a);
      LinearArgs product{};
      product.x = a.normed;
      product.tiled = a.tiled;
      product.w = a.w;
      product.bias = a.bias;
      product.y = a.y;
      product.rows = a.rows;
      product.n = a.n;
      product.k = a.k;
      product.dtype = a.dtype;
      product.out_dtype = a.out_dtype;
      product.stream = a.stream;
      return linear(product);
    }
    by_normed_shape<T, 1>(a.rows, a.n, a.k, tuned, [&](auto shape) {
      using C = typename decltype(shape)::type;
      launch({dim3(stream_blocks<C>(a.n, true, tuned)), dim3(C::kThreads), norm_smem_bytes<T, C>(a.k),
              a.stream, true},
             "norm_linear_kernel", norm_linear_kernel<T, C>, as<const T>(a.x), as<const T>(a.norm_w),
             as<const T>(a.w.data), as<const T>(a.bias), as<void>(a.y), a.rows, a.n, a.k, a.eps,
             a.out_dtype == int(DType::f32));
    });
  });
}
