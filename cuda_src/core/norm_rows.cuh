// The prologue of the ops that normalise x before they multiply. Each block normalises the rows again,
// reading them from L2, and keeps them in shared memory. That costs less than a kernel of its own, which
// would write the normalised rows to memory and read them back.
#pragma once
#include "../launchers/rmsnorm.h"
#include "stream_rows.cuh"

namespace lab {

template <typename T, typename C>
struct alignas(16) NormSmem {
  StreamSmem<T, C> stream;
  float squares[C::kThreads / 32][C::B];
  alignas(16) T x[Vec<T>::size];  // really B rows of k elements: see norm_smem_bytes()
};

template <typename T, typename C>
size_t norm_smem_bytes(int k) {
  return sizeof(NormSmem<T, C>) + size_t(C::B) * k * sizeof(T);
}

// normed = rmsnorm(x, norm_w), by a kernel of its own: on tensor cores (more than 2 rows of half precision)
// the normalised rows pass through memory that the caller allocated. a: the arguments of the op.
template <typename Args>
inline void norm_into(const char* op, const Args& a) {
  if (!a.normed)
    throw std::invalid_argument(std::string(op) + ": more than 2 rows of half precision need `normed`");
  RmsnormArgs norm{};
  norm.x = a.x;
  norm.w = a.norm_w;
  norm.y = a.normed;
  norm.rows = a.rows;
  norm.groups = 1;
  norm.cols = a.k;
  norm.x_stride = norm.y_stride = a.k;
  norm.eps = a.eps;
  norm.dtype = a.dtype;
  norm.stream = a.stream;
  rmsnorm(norm);
}

// Calls f with the shape of a launch whose blocks keep the normalised rows in shared memory; see
// by_stream_shape.
template <typename T, int Parts, typename F>
inline void by_normed_shape(int rows, int outputs, int k, const Settings& tuned, F&& f) {
  // Bytes: a third of a multiprocessor's, so that several blocks fit.
  constexpr int kLimit = 64 * 1024;
  const int64_t row = int64_t(k) * sizeof(T);
  int batch = 8;  // the most rows that fit in it
  while (batch > 1 && batch * row > kLimit) batch /= 2;
  by_stream_shape<T, Parts, 32, false>(rows, outputs, k, batch, tuned, f);
}

template <typename T, typename C>
struct NormRows {
  static constexpr int N = C::N, B = C::B, kStep = C::kThreads * N;
  // How many vectors of the norm's weight a thread loads before it waits for the preceding kernel, and how
  // many steps of x it loads before it uses the first. Both are as many as the registers allow beside the
  // first weights of the matrix.
  static constexpr int kKeep = B < 4 ? 4 : 2, kAhead = B == 1 && sizeof(T) == 2 ? 2 : 1;
  Packed<T, N> weight[kKeep];

  // Issues the loads of the norm's weight, which depends on no earlier kernel: call it before pdl_wait().
  LAB_DEVICE void start(const T* norm_w, int k) {
    LAB_UNROLL
    for (int i = 0; i < kKeep; ++i) {
      const int col = threadIdx.x * N + i * kStep;
      if (col < k) weight[i] = load_packed<N>(norm_w + col);
    }
  }

  // shared.x[b] = T(x[b0 + b] * rsqrt(mean(x[b0 + b]^2) + eps)) * norm_w, with rmsnorm's rounding points;
  // visible to all threads when it returns. For rows past the end the last row is repeated.
  LAB_DEVICE void run(NormSmem<T, C>& shared, const T* x, const T* norm_w, int b0, int rows, int k,
                      float eps) {
    const int first = threadIdx.x * N;
    float squares[B] = {};
    for (int panel = first; panel < k; panel += kAhead * kStep) {
      Packed<T, N> v[kAhead][B];
      LAB_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int col = panel + i * kStep;
        if (col >= k) continue;
        LAB_UNROLL
        for (int b = 0; b < B; ++b) v[i][b] = load_packed<N>(x + size_t(min(b0 + b, rows - 1)) * k + col);
      }
      LAB_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int col = panel + i * kStep;
        if (col >= k) continue;
        LAB_UNROLL
        for (int b = 0; b < B; ++b) {
          float f[N];
          unpack<T>(f, v[i][b]);
          LAB_UNROLL
          for (int e = 0; e < N; ++e) squares[b] = fmadd(f[e], f[e], squares[b]);
          store_packed<N>(shared.x + b * k + col, v[i][b]);
        }
      }
    }
    group_sum<32>(squares);
    if (threadIdx.x % 32 == 0) {
      LAB_UNROLL
      for (int b = 0; b < B; ++b) shared.squares[threadIdx.x / 32][b] = squares[b];
    }
    __syncthreads();
    float scale[B] = {};
    LAB_UNROLL
    for (int b = 0; b < B; ++b) {
      LAB_UNROLL
      for (int warp = 0; warp < C::kThreads / 32; ++warp) scale[b] += shared.squares[warp][b];
      scale[b] = rsqrtf(scale[b] / k + eps);
    }
    // Each thread scales the columns it stored.
    const auto scale_at = [&](int col, const Packed<T, N>& packed) {
      float factor[N], f[N];
      unpack<T>(factor, packed);
      LAB_UNROLL
      for (int b = 0; b < B; ++b) {
        unpack<T>(f, load_packed<N>(shared.x + b * k + col));
        Vec<T, N> v;
        LAB_UNROLL
        for (int e = 0; e < N; ++e) v.v[e] = normed_element<T>(f[e], scale[b], factor[e]);
        store(shared.x + b * k + col, v);
      }
    };
    LAB_UNROLL
    for (int i = 0; i < kKeep; ++i) {
      if (first + i * kStep < k) scale_at(first + i * kStep, weight[i]);
    }
    for (int col = first + kKeep * kStep; col < k; col += kStep) scale_at(col, load_packed<N>(norm_w + col));
    __syncthreads();
  }
};

// Starts the multiply of B rows of x: issues the loads of the first weights and of the norm's weight, waits
// for the preceding kernel, then normalises the rows.
template <typename T, typename C>
LAB_DEVICE void start_normed(RowStream<T, C>& stream, NormSmem<T, C>& shared, const T* x, const T* norm_w,
                             int b0, int rows, float eps) {
  NormRows<T, C> norm;
  norm.start(norm_w, stream.k);
  // False: the dependent kernel may be attention, which reads the cache before it waits.
  stream.start(false);
  if (b0 > 0) __syncthreads();  // the preceding rows have been multiplied
  norm.run(shared, x, norm_w, b0, rows, stream.k, eps);
}

}  // namespace lab
