// rmsnorm: y[b,g,:] = T(x[b,g,:] * rsqrt(mean(x[b,g,:]^2) + eps)) * w,
// after residual += x where a residual is given
//
//   x, y [rows, groups, cols], any stride between rows   w [cols]
//   residual [rows, cols] (optional, groups = 1)
//   mapping   one block per row, one warp for short rows; a thread keeps up to 4 vectors of the row in
//             registers
//   traffic   x once, y once, w once per row (from L2 after the first); with a residual, that twice more
//   contract  lab/ops/rmsnorm.py          twin  triton_kernels/rmsnorm.py
#include "common.cuh"
#include "core/unpack.cuh"
#include "launchers/rmsnorm.h"
#include "sizes.h"

using namespace lab;

constexpr int kKeep = 4;  // vectors of a row that one thread holds

struct RmsnormSmem { float scratch[32]; };

template <typename T, int N, int Threads>
__global__ void __launch_bounds__(Threads) rmsnorm_kernel(const T* x, const T* w, T* residual, T* y, int cols,
                                                          int64_t x_stride, int64_t y_stride, float eps) {
  // 1. Locate: block (b, g) owns that row. It goes over the row in panels of kKeep vectors a thread; nearly
  // always there is only one panel.
  constexpr int kPanel = kKeep * Threads * N;
  const int b = blockIdx.x, g = blockIdx.y;
  const int first = threadIdx.x * N;
  x += b * x_stride + int64_t(g) * cols;
  y += b * y_stride + int64_t(g) * cols;
  if (residual) residual += size_t(b) * cols;  // groups = 1 here
  const T* source = residual ? residual : x;   // what is normalised: with a residual, the sum
  Packed<T, N> v[kKeep], weight[kKeep];
  float squares = 0.f;

  // 2. Load: the weight depends on no earlier kernel, so its loads are issued before the wait, and the
  // dependent kernel may launch to do the same. All vectors of a panel, and of the residual's, are in flight
  // before one is used: they stay Packed until then, or the compiler would take them apart, and wait for them,
  // right at the loads. The residual gets the sum, rounded to T.
  LAB_UNROLL
  for (int i = 0; i < kKeep; ++i) {
    const int col = first + i * Threads * N;
    if (col < cols) weight[i] = load_packed<N>(w + col);
  }
  pdl_launch_dependents();
  pdl_wait();
  for (int panel = 0; panel < cols; panel += kPanel) {
    LAB_UNROLL
    for (int i = 0; i < kKeep; ++i) {
      const int col = panel + first + i * Threads * N;
      if (col < cols) v[i] = load_packed<N>(x + col);
    }
    if (residual) {
      Packed<T, N> old[kKeep];
      LAB_UNROLL
      for (int i = 0; i < kKeep; ++i) {
        const int col = panel + first + i * Threads * N;
        if (col < cols) old[i] = load_packed<N>(residual + col);
      }
      LAB_UNROLL
      for (int i = 0; i < kKeep; ++i) {
        const int col = panel + first + i * Threads * N;
        if (col >= cols) continue;
        float before[N], added[N];
        unpack<T>(before, old[i]);
        unpack<T>(added, v[i]);
        Vec<T, N> sum;
        LAB_UNROLL
        for (int e = 0; e < N; ++e) sum.v[e] = from_float<T>(before[e] + added[e]);
        store(residual + col, sum);
        v[i] = bit_cast<Packed<T, N>>(sum);
      }
    }
    LAB_UNROLL
    for (int i = 0; i < kKeep; ++i) {
      if (panel + first + i * Threads * N >= cols) continue;
      float f[N];
      unpack<T>(f, v[i]);
      LAB_UNROLL
      for (int e = 0; e < N; ++e) squares = fmadd(f[e], f[e], squares);
    }
  }

  // 3. Reduce: the sum of squares in float32, over the warp and then over the block.
  const float scale = rsqrtf(block_sum<Threads>(squares, smem<RmsnormSmem>().scratch) / cols + eps);

  // 4. Scale and store: rounded to T before the weight, as in Hugging Face Llama. Rows of one panel are still
  // in registers.
  for (int panel = 0; panel < cols; panel += kPanel) {
    LAB_UNROLL
    for (int i = 0; i < kKeep; ++i) {
      const int col = panel + first + i * Threads * N;
      if (col >= cols) continue;
      if (cols > kPanel) {
        v[i] = load_packed<N>(source + col);
        weight[i] = load_packed<N>(w + col);
      }
      float f[N], factor[N];
      unpack<T>(f, v[i]);
      unpack<T>(factor, weight[i]);
      Vec<T, N> normed;
      LAB_UNROLL
      for (int e = 0; e < N; ++e) normed.v[e] = normed_element<T>(f[e], scale, factor[e]);
      store(y + col, normed);
    }
  }
}

void rmsnorm(const RmsnormArgs& a) {
  if (a.rows == 0) return;
  by_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    by_width<T>(
        [&](auto width) {
          constexpr int N = decltype(width)::value;
          const auto start = [&](auto threads, auto kernel) {
            launch({dim3(a.rows, a.groups), dim3(threads), sizeof(RmsnormSmem), a.stream, true},
                   "rmsnorm_kernel", kernel, as<const T>(a.x), as<const T>(a.w), as<T>(a.residual),
                   as<T>(a.y), a.cols, a.x_stride, a.y_stride, a.eps);
          };
          // One warp needs no barrier; so the CPU, which runs threads one after the other, always uses one
          // warp.
          if (cpu_shapes() || a.cols <= kKeep * 32 * N) {
            start(32, rmsnorm_kernel<T, N, 32>);
          } else {
            start(256, rmsnorm_kernel<T, N, 256>);
          }
        },
        a.cols, a.x_stride, a.y_stride);
  });
}
