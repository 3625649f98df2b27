// rope: (x[i], x[i + D/2]) -> (x[i] cos - x[i + D/2] sin, x[i + D/2] cos + x[i] sin)
// for every head of q and k, in place
//
//   q [batch, q_heads, D]   k [batch, kv_heads, D], any stride between sequences   positions [batch] int32
//   cos_sin [max_positions, D] float32: D/2 cosines, then D/2 sines
//   mapping   one thread per N neighbouring pairs; q heads first, then k heads
//   traffic   q and k read and written once; the row of the table once per head (from L1 after the first)
//   contract  lab/ops/rope.py          twin  triton_kernels/rope.py
#include "common.cuh"
#include "launchers/rope.h"
#include "sizes.h"

using namespace lab;

template <int N>
LAB_DEVICE void load_floats(float (&out)[N], const float* p) {
  constexpr int kWidth = N < 4 ? N : 4;
  LAB_UNROLL
  for (int i = 0; i < N; i += kWidth) {
    const Vec<float, kWidth> v = load<kWidth>(p + i);
    LAB_UNROLL
    for (int e = 0; e < kWidth; ++e) out[i + e] = v.v[e];
  }
}

template <typename T, int N>
__global__ void rope_kernel(T* q, T* k, const int* positions, const float* cos_sin, int batch, int q_heads,
                            int kv_heads, int head_dim, int64_t q_stride, int64_t k_stride) {
  // 1. Locate: thread -> (sequence b, head h, pairs i to i + N - 1); an idle sequence has position -1.
  const int half_dim = head_dim / 2, threads_per_head = half_dim / N, heads = q_heads + kv_heads;
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  const int i = index % threads_per_head * N, h = index / threads_per_head % heads,
            b = index / threads_per_head / heads;
  if (b >= batch) return;
  pdl_wait();
  const int position = positions[b];
  if (position < 0) return;
  T* head = h < q_heads ? q + b * q_stride + h * head_dim : k + b * k_stride + (h - q_heads) * head_dim;

  // 2. Load: both elements of the pairs, and the cosines and sines of their angles.
  Vec<T, N> x0 = load<N>(head + i), x1 = load<N>(head + half_dim + i);
  float cosine[N], sine[N];
  load_floats(cosine, cos_sin + size_t(position) * head_dim + i);
  load_floats(sine, cos_sin + size_t(position) * head_dim + half_dim + i);
  pdl_launch_dependents();

  // 3. Rotate and store: in float32, rounded once.
  LAB_UNROLL
  for (int e = 0; e < N; ++e) {
    const float a = to_float(x0.v[e]), c = to_float(x1.v[e]);
    x0.v[e] = from_float<T>(a * cosine[e] - c * sine[e]);
    x1.v[e] = from_float<T>(c * cosine[e] + a * sine[e]);
  }
  store(head + i, x0);
  store(head + half_dim + i, x1);
}

void rope(const RopeArgs& a) {
  if (a.batch == 0) return;
  by_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    by_width<T>(
        [&](auto width) {
          constexpr int N = decltype(width)::value;
          const int64_t items = int64_t(a.batch) * (a.q_heads + a.kv_heads) * (a.head_dim / 2 / N);
          launch({dim3(blocks_for(items, 128)), dim3(128), 0, a.stream}, "rope_kernel", rope_kernel<T, N>,
                 as<T>(a.q.data), as<T>(a.k.data), as<const int>(a.positions), as<const float>(a.cos_sin),
                 a.batch, a.q_heads, a.kv_heads, a.head_dim, a.q.stride, a.k.stride);
        },
        a.head_dim / 2, a.q.stride, a.k.stride);
  });
}
