// The prologue of the ops that normalise x before they multiply: each block normalises the rows again, from L2, and
// keeps them in shared memory. That costs less than a kernel of its own, which would pass them through memory.
#pragma once
#include "../launchers.h"
#include "stream_rows.cuh"

namespace lab {

template <typename T, typename C>
struct alignas(16) NormSmem {
  StreamSmem<T, C> stream;
  float squares[C::kThreads / 32][C::B];
  alignas(16) T x[Vec<T>::size];                  // in fact B rows of k: size the launch by norm_smem_bytes
};

template <typename T, typename C>
size_t norm_smem_bytes(int k) {
  return sizeof(NormSmem<T, C>) + size_t(C::B) * k * sizeof(T);
}

// normed = rmsnorm(x, norm_w): more than 2 rows of half precision pass through memory on their way to the tensor cores,
// in memory that the caller gives. a: the arguments of the op.
template <typename Args>
inline void norm_into(const char* op, const Args& a) {
  if (!a.normed) throw std::invalid_argument(std::string(op) + ": more than 2 rows of half precision need `normed`");
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

// Calls f with the shape of a launch whose blocks keep the normalised rows in shared memory; see by_stream_shape.
template <typename T, int Parts, typename F>
inline void by_normed_shape(int rows, int outputs, int k, const Settings& tuned, F&& f) {
  constexpr int kLimit = 64 * 1024;               // a third of a multiprocessor's, so that blocks share it
  const int64_t row = int64_t(k) * sizeof(T);
  int batch = 8;                                  // the most rows that fit
  while (batch > 1 && batch * row > kLimit) batch /= 2;
  by_stream_shape<T, Parts, 32, false>(rows, outputs, k, batch, tuned, f);
}

template <typename T, typename C>
struct NormRows {
  static constexpr int N = C::N, B = C::B, kStep = C::kThreads * N;
  // Vectors of the norm's weight that a thread loads before the wait, and steps of x that it loads before it uses the
  // first: as many as registers allow beside the first weights.
  static constexpr int kKeep = B < 4 ? 4 : 2, kAhead = B == 1 && sizeof(T) == 2 ? 2 : 1;
  Packed<T, N> weight[kKeep];

  // Issues the loads of the weight, which depends on no earlier kernel: call it before pdl_wait().
  LAB_DEVICE void start(const T* norm_w, int k) {
    LAB_UNROLL
    for (int i = 0; i < kKeep; ++i) {
      const int col = threadIdx.x * N + i * kStep;
      if (col < k) weight[i] = load_packed<N>(norm_w + col);
    }
  }

  // shared.x[b] = T(x[b0 + b] * rsqrt(mean(x[b0 + b]^2) + eps)) * norm_w, the rounding points of rmsnorm; for all
  // threads when it returns. Rows past the end repeat the last.
  LAB_DEVICE void run(NormSmem<T, C>& shared, const T* x, const T* norm_w, int b0, int rows, int k, float eps) {
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
    const auto scale_at = [&](int col, const Packed<T, N>& packed) {  // a thread scales the columns that it stored
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

// One round of B rows of x: the first weights, and the weight of the norm, before the wait; after it the norm.
template <typename T, typename C>
LAB_DEVICE void start_normed(RowStream<T, C>& stream, NormSmem<T, C>& shared, const T* x, const T* norm_w, int b0,
                             int rows, float eps) {
  NormRows<T, C> norm;
  norm.start(norm_w, stream.k);
  stream.start(false);                            // what comes next may be attention, whose prologue reads the cache
  if (b0 > 0) __syncthreads();                    // the rows before these have been multiplied
  norm.run(shared, x, norm_w, b0, rows, stream.k, eps);
}

}  // namespace lab
