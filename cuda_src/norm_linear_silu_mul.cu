// norm_linear_silu_mul: y[b, j] = silu(g) * u, g = xn[b] . w[j], u = xn[b] . w[n + j],
// xn = rmsnorm(x, norm_w)
//
//   x [rows, k]   norm_w [k]   w [2 n, k], the gate's rows first   y [rows, n]     rows <= 64
//   normed [rows, k]: workspace, used on tensor cores
//   silu(g) = g / (1 + exp(-g))
//   mapping   as norm_linear; the threads that sum row j of the gate also sum row j of up
//             packed w (formats/): rmsnorm's kernel, then core/packed_product.cuh
//   traffic   w once (the only traffic that counts); x and norm_w, or on tensor cores normed, once per block
//             from L2; y once
//   contract  lab/ops/norm_linear_silu_mul.py          twin  triton_kernels/norm_linear_silu_mul.py
#include "common.cuh"
#include "core/mma_rows.cuh"
#include "core/norm_rows.cuh"
#include "core/packed_product.cuh"
#include "launchers/norm_linear_silu_mul.h"

using namespace lab;

template <typename T, typename C>
__global__ void __launch_bounds__(C::kThreads, C::kResident)
    norm_linear_silu_mul_stream_kernel(const T* x, const T* norm_w, const T* w, T* y, int rows, int n, int k,
                                       float eps) {
  // 1. Locate: a lane group takes R / 2 rows of the gate and the same rows of up, a lane a slice of k.
  auto& shared = smem<NormSmem<T, C>>();
  RowStream<T, C> stream(shared.stream, w, n, k);

  for (int b0 = 0; b0 < rows; b0 += C::B) {
    // 2. Norm: while the loads of the first weights are in flight. Rounded to T before and after norm_w.
    start_normed(stream, shared, x, norm_w, b0, rows, eps);

    for (; stream.more(); stream.next()) {
      // 3. Multiply: weights are loaded from DRAM into registers, x from shared memory.
      float acc[C::R][C::B][C::kLanes] = {}, gates[C::R * C::B], ups[C::R * C::B];
      stream.multiply(acc, 0, k, [&](int b, int col) { return load_packed<C::N>(shared.x + b * k + col); });

      // 4. Reduce: over the lanes and warps that share k, in a fixed order; then the thread with the gate's
      // sum receives up's.
      stream.reduce(gates, acc);
      stream.second_part(ups, gates);

      // 5. Activate and store: from the float32 sums, rounded once.
      stream.each_output(b0, rows, [&](int j, int output, int b) {
        y[size_t(b) * n + output] = from_float<T>(activate(gates[j], ups[j]));
      });
    }
  }
}

template <typename T, typename C>
__global__ void __launch_bounds__(C::kThreads)
    norm_linear_silu_mul_mma_kernel(const T* xn, const T* w, T* y, int rows, int n, int k) {
  // 1. Locate: the block owns kOutputs rows of the gate and the same rows of up; its teams share k.
  MmaRows<T, C> product(smem<MmaSmem<T, C>>(), xn, w, rows, n, k);

  // 2. Norm: already done by rmsnorm's kernel. The copies of the first stages of w are issued before the wait
  // for it.
  product.start_w();
  pdl_wait();

  // 3. Multiply: w and x pass through shared memory to the tensor cores.
  product.start_x();
  product.multiply();

  // 4. Reduce: the teams' sums are added in shared memory, where the tiles were.
  product.reduce();

  // 5. Activate and store: from the float32 sums, rounded once; neighbouring threads store neighbouring
  // outputs.
  product.each_output([&](int, int r, int output, int b) {
    y[size_t(b) * n + output] =
        from_float<T>(activate(product.product(r, b), product.product(r + C::kOutputs, b)));
  });
  product.finish();
}

template <typename P>
__global__ void __launch_bounds__(P::kThreads, P::kResident)
    norm_linear_silu_mul_packed_kernel(PackedProduct<typename P::T> normed, typename P::T* y) {
  // 1. Locate: the block's rows of the gate, and the same rows of up.
  P product(normed);

  // 2. Norm: already done by rmsnorm's kernel. The loads of the first weights are issued before the wait for
  // it, or for the kernel after it that lays the rows out in tiles.
  product.start();
  for (; product.more(); product.next()) {
    // 3. Multiply: packed weights go from DRAM into registers and become numbers there.
    // 4. Reduce: over the warps or blocks that share k, in a fixed order.
    product.multiply();

    // 5. Activate and store: from the float32 sums, rounded once.
    product.each_output([&](int output, int b, float gate, float up) {
      y[size_t(b) * normed.n + output] = from_float<typename P::T>(activate(gate, up));
    });
  }
}

// With x in T.
template <typename T>
void norm_linear_silu_mul_of(const NormLinearSiluMulArgs& a) {
  if (a.w.format != int(Format::plain)) {
    norm_into("norm_linear_silu_mul", a);
    const auto all = packed_product<T>(a.normed, a.tiled, a.w, a.rows, a.n, a.k);
    return by_packed_rows(all, [&](const auto& product, int b0) {
      by_packed<T, 2>(product, [&](const auto& how) {
        using P = typename std::decay_t<decltype(how)>::P;
        how.start(a.stream, "norm_linear_silu_mul_packed_kernel", norm_linear_silu_mul_packed_kernel<P>,
                  product, as<T>(a.y) + size_t(b0) * a.n);
      });
    });
  }
  const Settings tuned = settings::find("norm_linear_silu_mul", sizeof(T), a.rows, {a.n, a.k});
  if constexpr (sizeof(T) == 2) {
    if (a.rows > most_stream_rows()) {
      norm_into("norm_linear_silu_mul", a);
      return by_mma_shape<T, 2>(a.rows, a.n, a.k, tuned, [&](auto shape, unsigned cluster) {
        using C = typename decltype(shape)::type;
        launch(mma_config<C>(a.n, cluster, sizeof(MmaSmem<T, C>), a.stream),
               "norm_linear_silu_mul_mma_kernel", norm_linear_silu_mul_mma_kernel<T, C>,
               as<const T>(a.normed), as<const T>(a.w.data), as<T>(a.y), a.rows, a.n, a.k);
      });
    }
  }
  by_normed_shape<T, 2>(a.rows, a.n, a.k, tuned, [&](auto shape) {
    using C = typename decltype(shape)::type;
    launch({dim3(stream_blocks<C>(a.n, true, tuned)), dim3(C::kThreads), norm_smem_bytes<T, C>(a.k), a.stream,
            true},
           "norm_linear_silu_mul_stream_kernel", norm_linear_silu_mul_stream_kernel<T, C>, as<const T>(a.x),
           as<const T>(a.norm_w), as<const T>(a.w.data), as<T>(a.y), a.rows, a.n, a.k, a.eps);
  });
}

// The parts that nvcc compiles one by one: setup.py finds them here, and LAB_PART is one of them.
#ifdef LAB_PART
extern template void norm_linear_silu_mul_of<float>(const NormLinearSiluMulArgs&);
extern template void norm_linear_silu_mul_of<half>(const NormLinearSiluMulArgs&);
extern template void norm_linear_silu_mul_of<bf16>(const NormLinearSiluMulArgs&);
template void norm_linear_silu_mul_of<LAB_PART>(const NormLinearSiluMulArgs&);
#endif

// weak: every part has this function, and the linker takes one of them.
__attribute__((weak)) void norm_linear_silu_mul(const NormLinearSiluMulArgs& a) {
  if (a.rows == 0 || a.n == 0) return;
  by_dtype(a.dtype, [&](auto tag) { norm_linear_silu_mul_of<decltype(tag)>(a); });
}
