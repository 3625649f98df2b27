// decode_attention: out[b, h, :] = sum over tokens t of softmax_t(scale * q[b, h, :] . k[t, :]) * v[t, :]
//
//   q [batch, q_heads, D], stride of batch free   out [batch, q_heads, D]   context_lens [batch] int32
//   k_cache, v_cache [pages, kv_heads, page_size, D]   block_table [batch, max_pages] int32
//   partial [batch, kv_heads, splits, group, D + 2] float32: sums, then maximum and weight   tickets [batch, kv_heads]
//   mapping   grid (splits, kv_heads, batch); 4 warps share the tokens of a tile, L lanes share a token, a lane keeps 16
//             bytes of it; 4 more warps on the same tile for every 4 more query heads of the group
//   traffic   K and V once for all query heads of their group; q, partial and out are small
//   contract  lab/ops/decode_attention.py          twin  triton_kernels/decode_attention.py
//
// Scores are kept in base 2: exp(x) = exp2(x * log2(e)), and log2(e) is folded into the query.
#include <cfloat>

#include "common.cuh"
#include "launchers.h"
#include "sizes.h"
#include "unpack.cuh"

using namespace lab;

constexpr int kTokenWarps = 4;                    // warps that share the tokens of a tile
constexpr int kPerLane = 4;                       // tokens of a tile that one lane works on
constexpr int kStages = 3;                        // tiles in shared memory: two in flight, one in use
constexpr int kHeadsPerWarp = 4;                  // query heads one warp serves at most
constexpr int kMaxThreads = kTokenWarps * 32 * 4;  // for a group of 16

constexpr int lanes_per_token(int vectors) { return vectors <= 8 ? 8 : vectors <= 16 ? 16 : 32; }

template <typename T, int D>
struct Tiles {
  static constexpr int N = Vec<T>::size;
  static constexpr int L = lanes_per_token(D / N);  // of these, D / N have elements (12 of 16 for D = 96)
  static constexpr int kTokensPerWarp = 32 / L;
  static constexpr int kParts = kTokenWarps * kTokensPerWarp;  // running softmaxes of one head in a block
  static constexpr int kTokens = kParts * kPerLane;
  T k[kStages][kTokens][D];
  T v[kStages][kTokens][D];
};

struct Merged {
  float sum, max, weight;
};

// Element d of several partial softmaxes of one head, each D sums, their maximum and their weight, `stride` floats apart.
// Always in the same order, so that a run repeats bit for bit.
template <int D>
LAB_DEVICE Merged merge(const float* parts, int count, int stride, int d) {
  Merged all{0.f, -FLT_MAX, 0.f};
  for (int p = 0; p < count; ++p) all.max = fmaxf(all.max, parts[size_t(p) * stride + D]);
  for (int p = 0; p < count; ++p) {
    const float* part = parts + size_t(p) * stride;
    const float factor = exp2f(part[D] - all.max);
    all.sum = fmadd(part[d], factor, all.sum);
    all.weight = fmadd(part[D + 1], factor, all.weight);
  }
  return all;
}

template <typename T>
LAB_DEVICE T normalised(const Merged& all) {
  return from_float<T>(all.weight == 0.f ? 0.f : all.sum / all.weight);  // no token at all: zeros
}

template <typename T, int D, int Heads>
__global__ void __launch_bounds__(kMaxThreads)
    decode_attention_kernel(const T* q, const T* k_cache, const T* v_cache, const int* block_table,
                            const int* context_lens, T* out, float* partial, unsigned* tickets, int group,
                            int page_shift, int max_pages, int64_t q_stride, float scale_log2) {
  // 1. Locate: split s owns tokens [begin, end) of one sequence, rounded to whole tiles; the length is read here, so that a
  // captured graph serves every length. Lane c of a token holds its elements c * N to c * N + N.
  using Tile = Tiles<T, D>;
  constexpr int N = Tile::N, L = Tile::L, kTokens = Tile::kTokens;
  auto& tiles = smem<Tile>();
  const int split = blockIdx.x, splits = gridDim.x, kv_head = blockIdx.y, kv_heads = gridDim.y, b = blockIdx.z;
  const int warp = threadIdx.x / 32, c = threadIdx.x % L;
  const int part = warp % kTokenWarps * Tile::kTokensPerWarp + threadIdx.x % 32 / L;
  const int head0 = warp / kTokenWarps * Heads;   // this warp's heads of the group
  const bool live = c * N < D;
  pdl_wait();
  const int length = context_lens[b];
  const int chunk = ((length + splits - 1) / splits + kTokens - 1) / kTokens * kTokens;
  const int begin = split * chunk, end = min(length, begin + chunk);
  const int count = end > begin ? (end - begin + kTokens - 1) / kTokens : 0;

  // 2. Load the query: in float32, times scale * log2(e); heads beyond the group are zero.
  float query[Heads][N];
  LAB_UNROLL
  for (int h = 0; h < Heads; ++h) {
    Packed<T, N> packed{};
    if (live && head0 + h < group) {
      packed = load_packed<N>(q + b * q_stride + (kv_head * group + head0 + h) * D + c * N);
    }
    unpack<T>(query[h], packed);
    LAB_UNROLL
    for (int e = 0; e < N; ++e) query[h][e] *= scale_log2;
  }

  // 3. Stream the tiles: cp.async fills a ring of kStages tiles. A page number is looked up one tile ahead, so that no copy
  // waits for the block table.
  const int row0 = threadIdx.x / L, row_step = blockDim.x / L;
  int pages[kPerLane];
  const auto look_up = [&](int t) {
    LAB_UNROLL
    for (int j = 0; j < kPerLane; ++j) {
      const int row = row0 + j * row_step, token = begin + t * kTokens + row;
      pages[j] = row < kTokens && token < end ? block_table[size_t(b) * max_pages + (token >> page_shift)] : -1;
    }
  };
  const auto copy = [&](int t) {
    LAB_UNROLL
    for (int j = 0; j < kPerLane; ++j) {
      const int row = row0 + j * row_step, token = begin + t * kTokens + row;
      if (!live || row >= kTokens) continue;
      const bool valid = pages[j] >= 0;           // past the end: zeros
      const int slot = token & ((1 << page_shift) - 1);
      const size_t from = valid ? ((((size_t(pages[j]) * kv_heads + kv_head) << page_shift) + slot) * D + c * N) : 0;
      cp_async16(&tiles.k[t % kStages][row][c * N], k_cache + from, valid);
      cp_async16(&tiles.v[t % kStages][row][c * N], v_cache + from, valid);
    }
    cp_async_commit();
    look_up(t + 1);
  };
  look_up(0);
  for (int t = 0; t < kStages - 1; ++t) copy(t);

  float acc[Heads][N] = {}, maximum[Heads], weight[Heads] = {};
  LAB_UNROLL
  for (int h = 0; h < Heads; ++h) maximum[h] = -FLT_MAX;
  for (int t = 0; t < count; ++t) {
    cp_async_wait<kStages - 2>();
    __syncthreads();                              // tile t has landed for all, and all are done with tile t - 1
    copy(t + kStages - 1);

    // 4. Online softmax: a lane's share of each dot product, summed over the token's lanes; then the sums so far shrink to
    // the new maximum and the tile's values join them.
    float scores[kPerLane * Heads] = {};
    if (live) {
      LAB_UNROLL
      for (int j = 0; j < kPerLane; ++j) {
        float key[N];
        unpack<T>(key, load_packed<N>(&tiles.k[t % kStages][j * Tile::kParts + part][c * N]));
        LAB_UNROLL
        for (int h = 0; h < Heads; ++h) {
          LAB_UNROLL
          for (int e = 0; e < N; ++e) scores[j * Heads + h] = fmadd(query[h][e], key[e], scores[j * Heads + h]);
        }
      }
    }
    group_sum<L>(scores);
    LAB_UNROLL
    for (int h = 0; h < Heads; ++h) {
      float top = maximum[h];
      LAB_UNROLL
      for (int j = 0; j < kPerLane; ++j) {
        float& score = scores[j * Heads + h];
        if (begin + t * kTokens + j * Tile::kParts + part >= end) score = -INFINITY;
        top = fmaxf(top, score);
      }
      const float shrink = exp2f(maximum[h] - top);
      maximum[h] = top;
      weight[h] *= shrink;
      LAB_UNROLL
      for (int e = 0; e < N; ++e) acc[h][e] *= shrink;
      LAB_UNROLL
      for (int j = 0; j < kPerLane; ++j) {
        float& score = scores[j * Heads + h];
        score = exp2f(score - top);
        weight[h] += score;
      }
    }
    if (live) {
      LAB_UNROLL
      for (int j = 0; j < kPerLane; ++j) {
        float value[N];
        unpack<T>(value, load_packed<N>(&tiles.v[t % kStages][j * Tile::kParts + part][c * N]));
        LAB_UNROLL
        for (int h = 0; h < Heads; ++h) {
          LAB_UNROLL
          for (int e = 0; e < N; ++e) acc[h][e] = fmadd(scores[j * Heads + h], value[e], acc[h][e]);
        }
      }
    }
  }
  pdl_launch_dependents();

  // 5. Publish the split: the block's running softmaxes meet in shared memory, where the tiles were. With one split the
  // result is final.
  cp_async_wait<0>();
  __syncthreads();
  const int stride = group * (D + 2);             // floats from one part to the next: [part][group][D + 2]
  float* parts = &smem<float>();
  LAB_UNROLL
  for (int h = 0; h < Heads; ++h) {
    if (!live || head0 + h >= group) continue;
    float* mine = parts + part * stride + (head0 + h) * (D + 2);
    LAB_UNROLL
    for (int e = 0; e < N; e += 2) store(mine + c * N + e, Vec<float, 2>{{acc[h][e], acc[h][e + 1]}});
    if (c == 0) store(mine + D, Vec<float, 2>{{maximum[h], weight[h]}});
  }
  __syncthreads();
  T* out_head = out + (size_t(b) * kv_heads + kv_head) * group * D;
  float* published = partial + (size_t(b) * kv_heads + kv_head) * splits * stride;
  for (int i = threadIdx.x; i < group * D; i += blockDim.x) {
    const int h = i / D, d = i % D;
    const Merged all = merge<D>(parts + h * (D + 2), Tile::kParts, stride, d);
    if (splits == 1) {
      out_head[i] = normalised<T>(all);
    } else {
      float* mine = published + size_t(split) * stride + h * (D + 2);
      mine[d] = all.sum;
      if (d == 0) {
        mine[D] = all.max;
        mine[D + 1] = all.weight;
      }
    }
  }
  if (splits == 1) return;

  // 6. Merge in the last block: each block takes a ticket after its results are visible; whoever takes the last one sees
  // them all, merges them in the order of the splits and leaves the counter at zero for the next launch.
  int& last = smem<int>();
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&tickets[b * kv_heads + kv_head], 1u) == unsigned(splits - 1);
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int i = threadIdx.x; i < group * D; i += blockDim.x) {
    out_head[i] = normalised<T>(merge<D>(published + i / D * (D + 2), splits, stride, i % D));
  }
  if (threadIdx.x == 0) atomicExch(&tickets[b * kv_heads + kv_head], 0u);
}

namespace {

// Calls f with the head dimension and the query heads per warp as compile-time constants.
template <typename F>
void by_shape(int head_dim, int heads, F&& f) {
  const auto by_heads = [&](auto dim) {
    switch (heads) {
      case 1: return f(dim, std::integral_constant<int, 1>{});
      case 2: return f(dim, std::integral_constant<int, 2>{});
      case 3: return f(dim, std::integral_constant<int, 3>{});
      default: return f(dim, std::integral_constant<int, 4>{});
    }
  };
  switch (head_dim) {
    case 64: return by_heads(std::integral_constant<int, 64>{});
    case 96: return by_heads(std::integral_constant<int, 96>{});
    case 128: return by_heads(std::integral_constant<int, 128>{});
  }
  throw std::invalid_argument("decode_attention: head_dim " + std::to_string(head_dim) + " is not 64, 96 or 128");
}

}  // namespace

void decode_attention(Ptr q, Ptr k_cache, Ptr v_cache, Ptr block_table, Ptr context_lens, Ptr out, Ptr partial,
                      Ptr tickets, int batch, int q_heads, int kv_heads, int head_dim, int page_size, int max_pages,
                      int splits, int64_t q_stride, float scale, int dtype, Ptr stream) {
  if (batch == 0) return;
  const int group = q_heads / kv_heads, teams = ceil_div(group, kHeadsPerWarp), heads = ceil_div(group, teams);
  if (teams > 4) throw std::invalid_argument("decode_attention: more than 16 query heads per kv head");
  int page_shift = 0;
  while (1 << page_shift < page_size) ++page_shift;
  by_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    by_shape(head_dim, heads, [&](auto dim, auto heads_per_warp) {
      constexpr int D = decltype(dim)::value, Heads = decltype(heads_per_warp)::value;
      using Tile = Tiles<T, D>;
      const size_t merging = size_t(Tile::kParts) * group * (D + 2) * sizeof(float);
      const size_t bytes = merging > sizeof(Tile) ? merging : sizeof(Tile);
      launch({dim3(splits, kv_heads, batch), dim3(kTokenWarps * 32 * teams), bytes, stream}, "decode_attention_kernel",
             decode_attention_kernel<T, D, Heads>, as<const T>(q), as<const T>(k_cache), as<const T>(v_cache),
             as<const int>(block_table), as<const int>(context_lens), as<T>(out), as<float>(partial),
             as<unsigned>(tickets), group, page_shift, max_pages, q_stride, scale * 1.4426950408889634f);
    });
  });
}
