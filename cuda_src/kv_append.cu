// kv_append: k_cache[page, h, slot, :] = k[b, h, :], page and slot from positions[b]; v likewise
//
//   k, v [batch, kv_heads, D], any stride between sequences   block_table [batch, max_pages] int32
//   positions [batch] int32
//   k_cache, v_cache [pages, kv_heads, page_size, D]
//   k_scales, v_scales   of a quantised cache: core/kv_codes.cuh
//   mapping   one thread per vector of k and the same vector of v; into a quantised cache one warp per head
//   traffic   2 * batch * kv_heads * D elements read and written
//   contract  lab/ops/kv_append.py          twin  triton_kernels/kv_append.py
#include "common.cuh"
#include "core/kv_codes.cuh"
#include "launchers/kv_append.h"
#include "sizes.h"

using namespace lab;

template <typename T, int N>
__global__ void kv_append_kernel(const T* k, const T* v, T* k_cache, T* v_cache, const int* block_table,
                                 const int* positions, int batch, int kv_heads, int head_dim, int page_size,
                                 int max_pages, int64_t k_stride, int64_t v_stride) {
  // 1. Locate: thread -> (sequence b, head h, elements i to i + N - 1); an idle sequence has position -1.
  const int threads_per_head = head_dim / N;
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  const int i = index % threads_per_head * N, h = index / threads_per_head % kv_heads;
  const int b = index / threads_per_head / kv_heads;
  if (b >= batch) return;
  pdl_wait();
  const int position = positions[b];
  if (position < 0) return;

  // 2. Find the slot: page position / page_size of this sequence, row position % page_size of the page.
  const int page = block_table[size_t(b) * max_pages + position / page_size];
  const size_t slot = (size_t(page) * kv_heads + h) * page_size + position % page_size;

  // 3. Copy: without arithmetic, so that the cache holds exactly the results of the projection and of rope.
  const Vec<T, N> key = load<N>(k + b * k_stride + h * head_dim + i);
  const Vec<T, N> value = load<N>(v + b * v_stride + h * head_dim + i);
  pdl_launch_dependents();
  store(k_cache + slot * head_dim + i, key);
  store(v_cache + slot * head_dim + i, value);
}

constexpr int kMostPerLane = 8;  // elements of a head, so that it has at most 256

// The same into a quantised cache: a warp takes a head of k, then the same head of v.
template <typename T, typename C>
__global__ void kv_append_codes_kernel(const T* k, const T* v, C* k_cache, C* v_cache, KvScales<C> scales,
                                       const int* block_table, const int* positions, int batch, int kv_heads,
                                       int head_dim, int page_size, int max_pages, int64_t k_stride,
                                       int64_t v_stride) {
  // 1. Locate: warp -> (sequence b, head h).
  const int index = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  const int h = index % kv_heads, b = index / kv_heads;
  if (b >= batch) return;
  pdl_wait();
  const int position = positions[b];
  if (position < 0) return;

  // 2. Find the slot: as above.
  const int page = block_table[size_t(b) * max_pages + position / page_size];
  const size_t slot = (size_t(page) * kv_heads + h) * page_size + position % page_size;

  // 3. Copy: as codes. int8 has a scale of its own for each head of a token.
  for (int which = 0; which < 2; ++which) {
    const T* from = which ? v + b * v_stride + h * head_dim : k + b * k_stride + h * head_dim;
    C* to = (which ? v_cache : k_cache) + slot * head_dim;
    float x[kMostPerLane];
    uint32_t most = 0;
    LAB_UNROLL
    for (int j = 0; j < kMostPerLane; ++j) {
      const int i = j * 32 + lane;
      x[j] = i < head_dim ? to_float(from[i]) : 0.f;
      const uint32_t magnitude = magnitude_of(x[j]);
      most = magnitude > most ? magnitude : most;
    }
    if (which) pdl_launch_dependents();
    std::conditional_t<kIsFp8<C>, float, half> scale;
    if constexpr (kIsFp8<C>) {
      scale = *(which ? scales.v : scales.k);
    } else {
      scale = int8_scale<32>(most);
      if (lane == 0) (which ? scales.v : scales.k)[slot] = scale;
    }
    LAB_UNROLL
    for (int j = 0; j < kMostPerLane; ++j) {
      const int i = j * 32 + lane;
      if (i >= head_dim) continue;
      if constexpr (kIsFp8<C>) {
        to[i] = fp8_code(x[j], scale);
      } else {
        to[i] = int8_code(x[j], scale);
      }
    }
  }
}

template <typename T, typename C>
static void append_codes(const KvAppendArgs& a) {
  if (a.head_dim > 32 * kMostPerLane)
    throw std::invalid_argument("kv_append: a quantised cache takes heads of at most 256");
  launch({dim3(blocks_for(int64_t(a.batch) * a.cache.kv_heads, 4)), dim3(128), 0, a.stream},
         "kv_append_codes_kernel", kv_append_codes_kernel<T, C>, as<const T>(a.k.data), as<const T>(a.v.data),
         as<C>(a.cache.k), as<C>(a.cache.v), kv_scales<C>(a.cache), as<const int>(a.cache.block_table),
         as<const int>(a.positions), a.batch, a.cache.kv_heads, a.head_dim, a.cache.page_size,
         a.cache.max_pages, a.k.stride, a.v.stride);
}

void kv_append(const KvAppendArgs& a) {
  if (a.batch == 0) return;
  by_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (a.cache.format) {
      return by_cache<T>(a.cache.format, [&](auto code) {
        if constexpr (kIsCode<decltype(code)>) append_codes<T, decltype(code)>(a);
      });
    }
    by_width<T>(
        [&](auto width) {
          constexpr int N = decltype(width)::value;
          const int64_t items = int64_t(a.batch) * a.cache.kv_heads * (a.head_dim / N);
          launch({dim3(blocks_for(items, 128)), dim3(128), 0, a.stream}, "kv_append_kernel",
                 kv_append_kernel<T, N>, as<const T>(a.k.data), as<const T>(a.v.data), as<T>(a.cache.k),
                 as<T>(a.cache.v), as<const int>(a.cache.block_table), as<const int>(a.positions), a.batch,
                 a.cache.kv_heads, a.head_dim, a.cache.page_size, a.cache.max_pages, a.k.stride, a.v.stride);
        },
        a.head_dim, a.k.stride, a.v.stride);
  });
}
