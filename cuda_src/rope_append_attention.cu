// rope_append_attention: q = rope(norm(q)), k = rope(norm(k)); k and v join the cache at positions[b];
// out[b, h, :] = sum over tokens t <= positions[b] of softmax_t(scale * q[b, h, :] . k[t, :]) * v[t, :]
//
//   q [batch, q_heads, D], k, v [batch, kv_heads, D], stride of batch free   q_norm, k_norm [D] (optional)
//   positions [batch] int32   cos_sin [max_positions, D] float32   out [batch, q_heads, D]
//   caches, block_table, partial and tickets as in decode_attention
//   mapping   as decode_attention; the block whose split holds the new token writes it and attends to it
//   traffic   K and V once for all query heads of their group; the rest is small
//   contract  lab/ops/rope_append_attention.py          twin  triton_kernels/rope_append_attention.py
#include "attention.cuh"
#include "common.cuh"
#include "launchers.h"

using namespace lab;

// What turns a head: its norm's weight (or none), its row of the table, and which lanes hold the halves of a pair.
template <typename T, int D>
struct Rotation {
  static constexpr int N = Tiles<T, D>::N, L = Tiles<T, D>::L, kHalf = D / 2 / N;
  int c, partner;                                 // lane of the token, and the lane of the warp that has the other half
  bool live;
  float cosine[N], sine[N];

  LAB_DEVICE Rotation(int c_, bool live_, const float* row) : c(c_), live(live_) {
    const int lane = threadIdx.x % 32, i = (c < kHalf ? c : c - kHalf) * N;
    partner = !live ? lane : c < kHalf ? lane + kHalf : lane - kHalf;
    LAB_UNROLL
    for (int e = 0; e < N; e += 4) {
      const Vec<float> cos4 = live ? load(row + i + e) : Vec<float>{}, sin4 = live ? load(row + D / 2 + i + e) : Vec<float>{};
      LAB_UNROLL
      for (int f = 0; f < 4; ++f) {
        cosine[e + f] = cos4.v[f];
        sine[e + f] = c < kHalf ? -sin4.v[f] : sin4.v[f];
      }
    }
  }

  // x: this lane's elements of a head; normed, rounded to T, rotated and rounded to T. All lanes of the warp call it.
  LAB_DEVICE void turn(float (&x)[N], const T* norm, float eps) const {
    if (norm) {
      float squares = 0.f, factor[N];
      LAB_UNROLL
      for (int e = 0; e < N; ++e) squares = fmadd(x[e], x[e], squares);
      const float scale = rsqrtf(group_sum<L>(squares) / D + eps);
      unpack<T>(factor, live ? load_packed<N>(norm + c * N) : Packed<T, N>{});
      LAB_UNROLL
      for (int e = 0; e < N; ++e) x[e] = to_float(from_float<T>(to_float(from_float<T>(x[e] * scale)) * factor[e]));
    }
    LAB_UNROLL
    for (int e = 0; e < N; ++e) {
      const float other = __shfl_sync(0xffffffffu, x[e], partner);
      x[e] = to_float(from_float<T>(x[e] * cosine[e] + other * sine[e]));
    }
  }
};

template <typename T, int D, int Heads>
__global__ void __launch_bounds__(kMaxThreads)
    rope_append_attention_kernel(const T* q, const T* k, const T* v, const T* q_norm, const T* k_norm, float eps,
                                 const int* positions, const float* cos_sin, PagedCache<T> cache, T* out, float* partial,
                                 unsigned* tickets, int group, int64_t q_stride, int64_t k_stride, int64_t v_stride,
                                 float scale_log2) {
  // 1. Locate: as decode_attention. What is older than the preceding kernel may be read before the wait: the position, the
  // table and the cache, so the first tiles leave here.
  using Tile = Tiles<T, D>;
  constexpr int N = Tile::N;
  auto& tiles = smem<Tile>();
  const int position = positions[blockIdx.z];     // negative: an idle row, which has no token at all
  SplitAttention<T, D, Heads> attention(cache, group, position + 1, position);
  attention.start();
  const int b = attention.b, kv_head = attention.kv_head, c = attention.c;
  const bool live = attention.live;
  const Rotation<T, D> rotation(c, live, cos_sin + size_t(max(position, 0)) * D);
  pdl_wait();
  pdl_launch_dependents();

  // 2. Norm and rotate the query: each running softmax does it for itself; then times scale * log2(e), in float32.
  LAB_UNROLL
  for (int h = 0; h < Heads; ++h) {
    const bool valid = live && attention.head0 + h < group;  // heads beyond the group are zero
    const T* head = q + b * q_stride + (kv_head * group + attention.head0 + h) * D;
    float(&query)[N] = attention.query[h];
    unpack<T>(query, valid ? load_packed<N>(head + c * N) : Packed<T, N>{});
    rotation.turn(query, q_norm, eps);
    LAB_UNROLL
    for (int e = 0; e < N; ++e) query[e] *= scale_log2;
  }

  // 3. Append the new token: the first lanes of the block that owns it write it to the cache, and keep it for its tile.
  const bool owner = position >= attention.begin && position < attention.end;
  Vec<T> key{}, value{};
  if (owner && threadIdx.x < 32) {
    float x[N];
    unpack<T>(x, live ? load_packed<N>(k + b * k_stride + kv_head * D + c * N) : Packed<T, N>{});
    rotation.turn(x, k_norm, eps);
    if (live && threadIdx.x < Tile::L) {
      LAB_UNROLL
      for (int e = 0; e < N; ++e) key.v[e] = from_float<T>(x[e]);
      value = load(v + b * v_stride + kv_head * D + c * N);
      const size_t to = attention.place(attention.page_of(position), position);
      store(cache.k + to, key);
      store(cache.v + to, value);
    }
  }

  // 4. Stream the tiles: the new token is in the split's last tile, in a row that the copies left zero.
  for (int t = 0; t < attention.count; ++t) {
    attention.wait_for(t);
    if (owner && t == attention.count - 1) {
      if (live && threadIdx.x < Tile::L) {
        const int row = position - attention.begin - t * Tile::kTokens;
        store(&tiles.k[t % kStages][row][c * N], key);
        store(&tiles.v[t % kStages][row][c * N], value);
      }
      __syncthreads();
    }

    // 5. Online softmax: in registers, each part of the block for its own tokens.
    attention.attend(t);
  }

  // 6. Publish the split: merged over the block; with one split the result is final.
  attention.publish(out, partial);

  // 7. Merge in the last block: in the order of the splits.
  if (attention.splits > 1) attention.merge_in_last_block(out, partial, tickets);
}

void rope_append_attention(Ptr q, Ptr k, Ptr v, Ptr q_norm, Ptr k_norm, float eps, Ptr positions, Ptr cos_sin, Ptr k_cache,
                           Ptr v_cache, Ptr block_table, Ptr out, Ptr partial, Ptr tickets, int batch, int q_heads,
                           int kv_heads, int head_dim, int page_size, int max_pages, int splits, int64_t q_stride,
                           int64_t k_stride, int64_t v_stride, float scale, int dtype, Ptr stream) {
  if (batch == 0) return;
  const int group = q_heads / kv_heads;
  by_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    by_attention_shape("rope_append_attention", head_dim, group, [&](auto dim, auto heads, int threads) {
      constexpr int D = decltype(dim)::value, Heads = decltype(heads)::value;
      launch({dim3(splits, kv_heads, batch), dim3(threads), attention_smem_bytes<T, D>(group), stream, true},
             "rope_append_attention_kernel", rope_append_attention_kernel<T, D, Heads>, as<const T>(q), as<const T>(k),
             as<const T>(v), as<const T>(q_norm), as<const T>(k_norm), eps, as<const int>(positions),
             as<const float>(cos_sin),
             PagedCache<T>{as<T>(k_cache), as<T>(v_cache), as<const int>(block_table), log2_of(page_size), max_pages},
             as<T>(out), as<float>(partial), as<unsigned>(tickets), group, q_stride, k_stride, v_stride,
             scale * 1.4426950408889634f);
    });
  });
}
