// linear_add: residual[b, n] += sum over k of x[b, k] * w[n, k] (+ bias[n]), float32 arithmetic, rounded once
//
//   x [rows, k]   w [n, k]   bias [n] (optional)   residual [rows, n]     row-major, rows <= 64
//   mapping   as linear: CUDA cores up to 2 rows and for float32, tensor cores for more; packed w (formats/):
//             linear's own kernel
//   traffic   w once (the only traffic that counts), x once per block from L2, residual read and written once
//   contract  lab/ops/linear_add.py          twin  triton_kernels/linear_add.py
#include "common.cuh"
#include "core/mma_rows.cuh"
#include "core/packed_linear.h"
#include "core/stream_rows.cuh"
#include "launchers/linear_add.h"

using namespace lab;

template <typename T, typename C>
__global__ void __launch_bounds__(C::kThreads, C::kResident)
    linear_add_stream_kernel(const T* x, const T* w, const T* bias, T* residual, int rows, int n, int k) {
  // 1. Locate: R rows of w per lane group, a slice of k per lane.
  RowStream<T, C> stream(smem<StagedSmem<T, C>>().stream, w, n, k);
  for (int b0 = 0; b0 < rows; b0 += C::B) {
    // 2. Multiply: the loads of the first weights are issued before the wait for the preceding kernel; x is
    // read from shared memory. What the sums are added to is loaded long before its use.
    stream.start(true);
    StagedRows<T, C> x_rows(x, b0, rows, k);
    for (; stream.more(); stream.next()) {
      float base[C::kMine] = {}, acc[C::R][C::B][C::kLanes] = {}, sums[C::R * C::B];
      stream.each_output(b0, rows, [&](int j, int output, int b) {
        base[j] = to_float(residual[size_t(b) * n + output]) + (bias ? to_float(bias[output]) : 0.f);
      });
      x_rows.multiply(stream, acc);

      // 3. Reduce: over the lanes and warps that share k, in a fixed order.
      stream.reduce(sums, acc);

      // 4. Add and store: each output is read and written by one thread.
      stream.each_output(b0, rows, [&](int j, int output, int b) {
        residual[size_t(b) * n + output] = from_float<T>(sums[j] + base[j]);
      });
    }
  }
}

template <typename T, typename C>
__global__ void __launch_bounds__(C::kThreads)
    linear_add_mma_kernel(const T* x, const T* w, const T* bias, T* residual, int rows, int n, int k) {
  // 1. Locate: the block owns kRows rows of w; its teams share k.
  MmaRows<T, C> product(smem<MmaSmem<T, C>>(), x, w, rows, n, k);

  // 2. Multiply: the copies of the first stages of w are issued before the wait for the preceding kernel.
  // What the sums are added to is loaded long before its use, where there are registers for it.
  constexpr int kMine = MmaRows<T, C>::kMine;
  constexpr bool kEarly = kMine <= 16 && C::kAligned;
  T base[kEarly ? kMine : 1] = {};
  product.start_w();
  pdl_wait();
  product.start_x();
  if constexpr (kEarly) {
    product.each_output([&](int j, int, int output, int b) { base[j] = residual[size_t(b) * n + output]; });
  }
  product.multiply();

  // 3. Reduce: the teams' sums are added in shared memory, where the tiles were.
  product.reduce();

  // 4. Add and store: each output is read and written by one thread; neighbouring threads take neighbouring
  // outputs.
  product.each_output([&](int j, int r, int output, int b) {
    T& target = residual[size_t(b) * n + output];
    const float before = to_float(kEarly ? base[j] : target);
    target = from_float<T>(before + product.product(r, b) + (bias ? to_float(bias[output]) : 0.f));
  });
  product.finish();
}

void linear_add(const LinearAddArgs& a) {
  if (a.rows == 0 || a.n == 0) return;
  if (a.w.format != int(Format::plain)) {  // packed weights: linear's kernel, which adds the residual
    LinearArgs product{};
    product.x = a.x, product.tiled = a.tiled, product.w = a.w, product.bias = a.bias;
    product.y = a.residual;
    product.rows = a.rows, product.n = a.n, product.k = a.k;
    product.dtype = product.out_dtype = a.dtype;
    product.stream = a.stream;
    return packed_linear(product, a.residual);
  }
  by_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    const Settings tuned = settings::find("linear_add", sizeof(T), a.rows, {a.n, a.k});
    const auto start = [&](const char* name, const Config& config, auto kernel) {
      launch(config, name, kernel, as<const T>(a.x), as<const T>(a.w.data), as<const T>(a.bias),
             as<T>(a.residual), a.rows, a.n, a.k);
    };
    if constexpr (sizeof(T) == 2) {
      if (a.rows > most_stream_rows()) {
        return by_mma_shape<T, 1>(a.rows, a.n, a.k, tuned, [&](auto shape, unsigned cluster) {
          using C = typename decltype(shape)::type;
          start("linear_add_mma_kernel", mma_config<C>(a.n, cluster, sizeof(MmaSmem<T, C>), a.stream),
                linear_add_mma_kernel<T, C>);
        });
      }
    }
    by_stream_shape<T, 1, 8, true>(a.rows, a.n, a.k, a.rows, tuned, [&](auto shape) {
      using C = typename decltype(shape)::type;
      const dim3 blocks(stream_blocks<C>(a.n, false, tuned));
      start("linear_add_stream_kernel",
            {blocks, dim3(C::kThreads), staged_smem_bytes<T, C>(a.k), a.stream, true},
            linear_add_stream_kernel<T, C>);
    });
  });
}
