// Decode attention over a paged cache, one split of one sequence and KV head per block: the core of decode_attention and
// rope_append_attention.
//
// kTokenWarps warps share the tokens of a tile, L lanes share a token, a lane keeps 16 bytes of it; kTokenWarps more warps
// on the same tile for every kHeadsPerWarp more query heads of the group. Scores are kept in base 2: exp(x) =
// exp2(x * log2(e)), and log2(e) is folded into the query.
#pragma once
#include <cfloat>

#include "common.cuh"
#include "sizes.h"
#include "unpack.cuh"

namespace lab {

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

// k, v [pages, kv_heads, page_size, D]; table [batch, max_pages]; a page holds 2^page_shift tokens.
template <typename T>
struct PagedCache {
  T *k, *v;
  const int* table;
  int page_shift, max_pages;
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
struct SplitAttention {
  using Tile = Tiles<T, D>;
  static constexpr int N = Tile::N, L = Tile::L, kTokens = Tile::kTokens;
  const PagedCache<T>& cache;
  int split, splits, kv_head, kv_heads, b, group; // from the grid (splits, kv_heads, batch)
  int c, part, head0;                             // lane of a token, running softmax, this warp's first head of the group
  bool live;                                      // this lane has elements: c * N to c * N + N
  int begin, end, stored, count;                  // tokens of the split, of these in the cache, tiles of the split
  int pages[kPerLane];                            // of the tile to copy next
  float query[Heads][N];                          // times scale * log2(e)
  float acc[Heads][N] = {}, maximum[Heads], weight[Heads] = {};

  // Split s owns tokens [begin, end) of `length`, rounded to whole tiles. Tokens from `in_cache` on are not read from the
  // cache: their rows of a tile are left zero.
  LAB_DEVICE SplitAttention(const PagedCache<T>& cache_, int group_, int length, int in_cache)
      : cache(cache_), group(group_) {
    split = blockIdx.x, splits = gridDim.x, kv_head = blockIdx.y, kv_heads = gridDim.y, b = blockIdx.z;
    const int warp = threadIdx.x / 32;
    c = threadIdx.x % L;
    part = warp % kTokenWarps * Tile::kTokensPerWarp + threadIdx.x % 32 / L;
    head0 = warp / kTokenWarps * Heads;
    live = c * N < D;
    const int chunk = ((length + splits - 1) / splits + kTokens - 1) / kTokens * kTokens;
    begin = split * chunk, end = min(length, begin + chunk), stored = min(end, in_cache);
    count = end > begin ? (end - begin + kTokens - 1) / kTokens : 0;
    LAB_UNROLL
    for (int h = 0; h < Heads; ++h) maximum[h] = -FLT_MAX;
  }

  // cp.async fills a ring of kStages tiles. A page number is looked up one tile ahead, so that no copy waits for the block
  // table.
  LAB_DEVICE void start() {
    look_up(0);
    for (int t = 0; t < kStages - 1; ++t) copy(t);
  }
  // Waits for tile t and sends for the next one to come.
  LAB_DEVICE void wait_for(int t) {
    cp_async_wait<kStages - 2>();
    __syncthreads();                              // tile t has landed for all, and all are done with tile t - 1
    copy(t + kStages - 1);
  }

  // Online softmax: a lane's share of each dot product, summed over the token's lanes; then the sums so far shrink to the
  // new maximum and the tile's values join them.
  LAB_DEVICE void attend(int t) {
    auto& tiles = smem<Tile>();
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

  // The block's running softmaxes meet in shared memory, where the tiles were. With one split the result is final: out
  // [batch, q_heads, D]; else it goes to partial [batch, kv_heads, splits, group, D + 2].
  LAB_DEVICE void publish(T* out, float* partial) {
    cp_async_wait<0>();
    __syncthreads();
    const int stride = group * (D + 2);           // floats from one part to the next: [part][group][D + 2]
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
  }

  // Each block takes a ticket after its results are visible; whoever takes the last one sees them all, merges them in the
  // order of the splits and leaves the counter at zero for the next launch.
  LAB_DEVICE void merge_in_last_block(T* out, const float* partial, unsigned* tickets) {
    int& last = smem<int>();
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(&tickets[b * kv_heads + kv_head], 1u) == unsigned(splits - 1);
    __syncthreads();
    if (!last) return;
    __threadfence();
    const int stride = group * (D + 2);
    T* out_head = out + (size_t(b) * kv_heads + kv_head) * group * D;
    const float* published = partial + (size_t(b) * kv_heads + kv_head) * splits * stride;
    for (int i = threadIdx.x; i < group * D; i += blockDim.x) {
      out_head[i] = normalised<T>(merge<D>(published + i / D * (D + 2), splits, stride, i % D));
    }
    if (threadIdx.x == 0) tickets[b * kv_heads + kv_head] = 0;
  }

  // Where element c * N of token `slot` of page `page` is.
  LAB_DEVICE size_t place(int page, int token) const {
    const int slot = token & ((1 << cache.page_shift) - 1);
    return (((size_t(page) * kv_heads + kv_head) << cache.page_shift) + slot) * D + c * N;
  }
  LAB_DEVICE int page_of(int token) const {
    return cache.table[size_t(b) * cache.max_pages + (token >> cache.page_shift)];
  }

 private:
  LAB_DEVICE void look_up(int t) {
    const int row0 = threadIdx.x / L, row_step = blockDim.x / L;
    LAB_UNROLL
    for (int j = 0; j < kPerLane; ++j) {
      const int row = row0 + j * row_step, token = begin + t * kTokens + row;
      pages[j] = row < kTokens && token < stored ? page_of(token) : -1;
    }
  }
  LAB_DEVICE void copy(int t) {
    auto& tiles = smem<Tile>();
    const int row0 = threadIdx.x / L, row_step = blockDim.x / L;
    LAB_UNROLL
    for (int j = 0; j < kPerLane; ++j) {
      const int row = row0 + j * row_step, token = begin + t * kTokens + row;
      if (!live || row >= kTokens) continue;
      const bool valid = pages[j] >= 0;           // past the end: zeros
      const size_t from = valid ? place(pages[j], token) : 0;
      cp_async16(&tiles.k[t % kStages][row][c * N], cache.k + from, valid);
      cp_async16(&tiles.v[t % kStages][row][c * N], cache.v + from, valid);
    }
    cp_async_commit();
    look_up(t + 1);
  }
};

// Shared memory of a block.
template <typename T, int D>
inline size_t attention_smem_bytes(int group) {
  const size_t merging = size_t(Tiles<T, D>::kParts) * group * (D + 2) * sizeof(float);
  return merging > sizeof(Tiles<T, D>) ? merging : sizeof(Tiles<T, D>);
}

// Calls f(dim, heads, threads) with the head dimension and the query heads of a warp as compile-time constants.
template <typename F>
inline void by_attention_shape(const char* op, int head_dim, int group, F&& f) {
  const int teams = ceil_div(group, kHeadsPerWarp), threads = kTokenWarps * 32 * teams;
  if (teams > 4) throw std::invalid_argument(std::string(op) + ": more than 16 query heads per kv head");
  const auto by_heads = [&](auto dim) {
    switch (ceil_div(group, teams)) {
      case 1: return f(dim, std::integral_constant<int, 1>{}, threads);
      case 2: return f(dim, std::integral_constant<int, 2>{}, threads);
      case 3: return f(dim, std::integral_constant<int, 3>{}, threads);
      default: return f(dim, std::integral_constant<int, 4>{}, threads);
    }
  };
  switch (head_dim) {
    case 64: return by_heads(std::integral_constant<int, 64>{});
    case 96: return by_heads(std::integral_constant<int, 96>{});
    case 128: return by_heads(std::integral_constant<int, 128>{});
  }
  throw std::invalid_argument(std::string(op) + ": head_dim " + std::to_string(head_dim) + " is not 64, 96 or 128");
}

inline int log2_of(int power_of_two) {
  int shift = 0;
  while (1 << shift < power_of_two) ++shift;
  return shift;
}

}  // namespace lab
