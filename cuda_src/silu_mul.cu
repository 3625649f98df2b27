// silu_mul: y[r, c] = T(silu(gate) * up), gate = gate_up[r, c], up = gate_up[r, cols + c],
// silu(g) = g / (1 + exp(-g))
//
//   gate_up [rows, 2 * cols]   y [rows, cols]     row-major
//   mapping   one thread per vector of y
//   traffic   2 * rows * cols elements read, rows * cols written
//   contract  lab/ops/silu_mul.py          twin  triton_kernels/silu_mul.py
#include "common.cuh"
#include "launchers/silu_mul.h"
#include "sizes.h"

using namespace lab;

template <typename T, int N>
__global__ void silu_mul_kernel(const T* gate_up, T* y, int rows, int cols) {
  // 1. Locate: thread -> (row r, columns c to c + N - 1).
  const int vectors = cols / N;
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t r = index / vectors;
  const int c = int(index % vectors) * N;
  if (r >= rows) return;
  pdl_wait();

  // 2. Load: the gate is the first half of a row, up the second.
  const T* row = gate_up + r * 2 * cols;
  const Vec<T, N> gate = load<N>(row + c), up = load<N>(row + cols + c);
  pdl_launch_dependents();

  // 3. Activate and store: in float32, rounded once.
  Vec<T, N> out;
  LAB_UNROLL
  for (int e = 0; e < N; ++e) {
    const float g = to_float(gate.v[e]);
    out.v[e] = from_float<T>(g / (1.f + expf(-g)) * to_float(up.v[e]));
  }
  store(y + r * cols + c, out);
}

void silu_mul(const SiluMulArgs& a) {
  if (a.rows == 0) return;
  by_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    by_width<T>(
        [&](auto width) {
          constexpr int N = decltype(width)::value;
          launch({dim3(blocks_for(int64_t(a.rows) * (a.cols / N), 128)), dim3(128), 0, a.stream},
                 "silu_mul_kernel", silu_mul_kernel<T, N>, as<const T>(a.gate_up), as<T>(a.y), a.rows,
                 a.cols);
        },
        a.cols);
  });
}
