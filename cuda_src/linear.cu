// linear: y[b, n] = sum over k of x[b, k] * w[n, k] (+ bias[n]), float32 accumulation, rounded once
//
//   x [rows, k]   w [n, k]   bias [n] (optional)   y [rows, n] in the dtype of x or float32
//   row-major, rows <= 64
//   mapping   up to 2 rows, and float32: the lanes of a warp share k and multiply 4 rows of w; for long
//             rows, or few outputs, 2 or 4 warps share them (shared_by in core/stream_rows.cuh)
//             more rows in float16 or bfloat16: tensor cores; a block owns 16 to 64 rows of w, and its warps
//             share k; on Hopper, from 17 rows on, its warpgroups do, and for long rows of w the two blocks
//             of a cluster (core/mma_rows.cuh)
//             packed w (formats/): core/packed_product.cuh
//   traffic   w once (the only traffic that counts), x once per block from L2, y once
//   contract  lab/ops/linear.py          twin  triton_kernels/linear.py
#include "common.cuh"
#include "core/mma_rows.cuh"
#include "core/packed_linear.h"
#include "core/packed_product.cuh"
#include "core/stream_rows.cuh"
#include "launchers/linear.h"

using namespace lab;

template <typename T, typename C>
__global__ void __launch_bounds__(C::kThreads, C::kResident)
    linear_stream_kernel(const T* x, const T* w, const T* bias, void* y, int rows, int n, int k,
                         bool out_f32) {
  // 1. Locate: R rows of w per lane group, a slice of k per lane.
  RowStream<T, C> stream(smem<StagedSmem<T, C>>().stream, w, n, k);
  for (int b0 = 0; b0 < rows; b0 += C::B) {
    // 2. Multiply: U * R independent 16-byte loads are in flight; each is replaced as soon as its data are
    // used. The first loads are issued before the wait for the preceding kernel, because weights depend on no
    // earlier kernel. x is read from shared memory.
    stream.start(true);
    StagedRows<T, C> x_rows(x, b0, rows, k);
    for (; stream.more(); stream.next()) {
      float base[C::kMine] = {}, acc[C::R][C::B][C::kLanes] = {}, sums[C::R * C::B];
      if (bias)
        stream.each_output(b0, rows, [&](int j, int output, int) { base[j] = to_float(bias[output]); });
      x_rows.multiply(stream, acc);

      // 3. Reduce: over the lanes and warps that share k, in a fixed order.
      stream.reduce(sums, acc);

      // 4. Store: neighbouring lanes store neighbouring outputs.
      stream.each_output(b0, rows, [&](int j, int output, int b) {
        store_as<T>(y, size_t(b) * n + output, sums[j] + base[j], out_f32);
      });
    }
  }
}

template <typename T, typename C>
__global__ void __launch_bounds__(C::kThreads)
    linear_mma_kernel(const T* x, const T* w, const T* bias, void* y, int rows, int n, int k, bool out_f32) {
  // 1. Locate: the block owns kRows rows of w; its teams, warps or warpgroups, share k.
  MmaRows<T, C> product(smem<MmaSmem<T, C>>(), x, w, rows, n, k);

  // 2. Multiply: each team has a cp.async pipeline. The copies of the first stages of w are issued before the
  // wait for the preceding kernel.
  product.start_w();
  pdl_wait();
  product.start_x();
  product.multiply();

  // 3. Reduce: the teams' sums are added in shared memory, where the tiles were.
  product.reduce();

  // 4. Store: neighbouring threads store neighbouring outputs.
  product.each_output([&](int, int r, int output, int b) {
    store_as<T>(y, size_t(b) * n + output, product.product(r, b) + (bias ? to_float(bias[output]) : 0.f),
                out_f32);
  });
  product.finish();
}

template <typename P>
__global__ void __launch_bounds__(P::kThreads, P::kResident)
    linear_packed_kernel(PackedProduct<typename P::T> inputs, const typename P::T* bias,
                         const typename P::T* residual, void* y, bool out_f32) {
  // 1. Locate: the block's rows of w; core/packed_product.cuh chooses how its warps divide them and k.
  P product(inputs);
  product.start();
  for (; product.more(); product.next()) {
    // 2. Multiply: packed weights go from DRAM into registers and become numbers there. The first loads are
    // issued before the wait for the preceding kernel.
    // 3. Reduce: over the warps or blocks that share k, in a fixed order.
    product.multiply();

    // 4. Store: neighbouring threads store neighbouring outputs. (linear_add's residual is added here.)
    product.each_output([&](int output, int b, float sum, float) {
      const size_t place = size_t(b) * inputs.n + output;
      float base = bias ? to_float(bias[output]) : 0.f;
      if (residual) base += to_float(residual[place]);
      store_as<typename P::T>(y, place, sum + base, out_f32);
    });
  }
}

template <typename T>
static void packed_of(const LinearArgs& a, Ptr residual) {
  const bool out_f32 = a.out_dtype == int(DType::f32);
  by_packed_rows(packed_product<T>(a.x, a.tiled, a.w, a.rows, a.n, a.k), [&](const auto& product, int b0) {
    const size_t first = size_t(b0) * a.n;
    const auto* before = residual ? as<const T>(residual) + first : nullptr;
    auto* y = as<char>(a.y) + first * (out_f32 ? sizeof(float) : sizeof(T));
    by_packed<T, 1>(product, [&](const auto& how) {
      using P = typename std::decay_t<decltype(how)>::P;
      how.start(a.stream, "linear_packed_kernel", linear_packed_kernel<P>, product, as<const T>(a.bias),
                before, static_cast<void*>(y), out_f32);
    });
  });
}

// With x in T. residual: of linear_add, for packed weights alone; else 0.
template <typename T>
void linear_of(const LinearArgs& a, Ptr residual) {
  if (a.w.format != int(Format::plain)) return packed_of<T>(a, residual);
  const Settings tuned = settings::find("linear", sizeof(T), a.rows, {a.n, a.k});
  const auto start = [&](const char* name, const Config& config, auto kernel) {
    launch(config, name, kernel, as<const T>(a.x), as<const T>(a.w.data), as<const T>(a.bias), as<void>(a.y),
           a.rows, a.n, a.k, a.out_dtype == int(DType::f32));
  };
  if constexpr (sizeof(T) == 2) {
    if (a.rows > most_stream_rows()) {
      return by_mma_shape<T, 1>(a.rows, a.n, a.k, tuned, [&](auto shape, unsigned cluster) {
        using C = typename decltype(shape)::type;
        start("linear_mma_kernel", mma_config<C>(a.n, cluster, sizeof(MmaSmem<T, C>), a.stream),
              linear_mma_kernel<T, C>);
      });
    }
  }
  by_stream_shape<T, 1, 8, true>(a.rows, a.n, a.k, a.rows, tuned, [&](auto shape) {
    using C = typename decltype(shape)::type;
    const dim3 blocks(stream_blocks<C>(a.n, false, tuned));
    start("linear_stream_kernel", {blocks, dim3(C::kThreads), staged_smem_bytes<T, C>(a.k), a.stream, true},
          linear_stream_kernel<T, C>);
  });
}

// The parts that nvcc compiles one by one: setup.py finds them here, and LAB_PART is one of them.
#ifdef LAB_PART
extern template void linear_of<float>(const LinearArgs&, Ptr);
extern template void linear_of<half>(const LinearArgs&, Ptr);
extern template void linear_of<bf16>(const LinearArgs&, Ptr);
template void linear_of<LAB_PART>(const LinearArgs&, Ptr);
#endif

static void start_linear(const LinearArgs& a, Ptr residual) {
  if (a.rows == 0 || a.n == 0) return;
  by_dtype(a.dtype, [&](auto tag) { linear_of<decltype(tag)>(a, residual); });
}

// weak: every part has these functions, and the linker takes one of each.
__attribute__((weak)) void linear(const LinearArgs& a) { start_linear(a, 0); }
__attribute__((weak)) void packed_linear(const LinearArgs& a, Ptr residual) { start_linear(a, residual); }
