// Split attention on CUDA cores: float32, and every dtype on a CPU.
#pragma once
#include "../sizes.h"
#include "split_attention.cuh"
#include "unpack.cuh"

namespace lab {

constexpr int lanes_per_token(int vectors) { return vectors <= 8 ? 8 : vectors <= 16 ? 16 : 32; }

// L lanes share a token and each keeps 16 bytes of it; four warps share the tokens of a tile. A warp serves
// Heads query heads, at most four: for every four heads of the group a block has four more warps, which work
// on the same tile. C: what the cache stores, T or codes.
template <typename T, int D, int Heads, typename C = T>
struct LaneAttention : SplitAttention<T, D, C> {
  // D / N of the L lanes have elements: 12 of 16 for D = 96.
  static constexpr int N = Vec<T>::size, L = lanes_per_token(D / N);
  static constexpr int kTokenWarps = 4, kPerLane = 4, kStages = 3, kTokensPerWarp = 32 / L;
  static constexpr int kParts = kTokenWarps * kTokensPerWarp;  // running softmaxes of one head
  static constexpr int kTokens = kParts * kPerLane;            // tokens of a tile
  static constexpr int kMaxThreads = kTokenWarps * 32 * 4;     // for a group of 16 query heads
  // A copy of 16 bytes brings the codes of several lanes; of these the first issues it.
  static constexpr int kLanesPerCopy = int(sizeof(T) / sizeof(C));
  struct PlainSmem {
    C k[kStages][kTokens][D], v[kStages][kTokens][D];
    AttentionInputs<T, D, C> inputs;
  };
  struct Int8Smem : PlainSmem {
    alignas(16) half scales[kStages][2][kTokens];  // of K, of V
  };
  using Smem = std::conditional_t<kIsInt8<C>, Int8Smem, PlainSmem>;
  using Base = SplitAttention<T, D, C>;
  using Base::begin, Base::end, Base::stored, Base::group;
  Smem& shared;
  // Lane within its token; its running softmax; first head of its warp; tiles.
  int c, part, head0, count;
  bool live;            // this lane has elements: c * N to c * N + N - 1
  int pages[kPerLane];  // page numbers of the tile to copy next
  float query[Heads][N], acc[Heads][N] = {}, maximum[Heads], weight[Heads] = {};

  static int threads(int group) { return kTokenWarps * 32 * ceil_div(group, 4); }
  LAB_DEVICE int query_rows() const { return group; }

  LAB_DEVICE LaneAttention(const KvCache<C>& cache, int splits_, int group_, int length, int in_cache, int)
      : Base(cache, splits_, group_, length, in_cache, kTokens, kTokens, 0), shared(smem<Smem>()) {
    const int warp = threadIdx.x / 32;
    c = threadIdx.x % L;
    part = warp % kTokenWarps * kTokensPerWarp + threadIdx.x % 32 / L;
    head0 = warp / kTokenWarps * Heads;
    live = c * N < D;
    count = end > begin ? (end - begin + kTokens - 1) / kTokens : 0;
    LAB_UNROLL
    for (int h = 0; h < Heads; ++h) maximum[h] = -FLT_MAX;
  }

  // Two tiles are in flight while one is used. A page number is looked up one tile ahead, so that no copy
  // waits for it. The dependent kernel may launch right away: see MmaAttention::start().
  LAB_DEVICE void start() {
    look_up(0);
    for (int t = 0; t < kStages - 1; ++t) copy(t);
    pdl_launch_dependents();
  }
  // Query rows of heads beyond the group are zero.
  LAB_DEVICE void load_query(float scale_log2) {
    LAB_UNROLL
    for (int h = 0; h < Heads; ++h) {
      const bool valid = live && head0 + h < group;
      unpack<T>(query[h], valid ? load_packed<N>(&shared.inputs.q[head0 + h][c * N]) : Packed<T, N>{});
      LAB_UNROLL
      for (int e = 0; e < N; ++e) query[h][e] *= kIsFp8<C> ? scale_log2 * Base::keys_scale : scale_log2;
    }
  }
  // Waits for tile t, issues the asynchronous copy of a later tile, and writes the new token over the zeros
  // that the copies left in its place.
  LAB_DEVICE void wait_for(int t) {
    cp_async_wait<kStages - 2>();
    // Tile t is visible to all threads, and none still reads tile t - 1.
    __syncthreads();
    copy(t + kStages - 1);
    if (stored < end && t == count - 1) {
      if (live && threadIdx.x < L) {
        const int row = stored - begin - t * kTokens;
        store(&shared.k[t % kStages][row][c * N], load<N>(&shared.inputs.new_k[c * N]));
        store(&shared.v[t % kStages][row][c * N], load<N>(&shared.inputs.new_v[c * N]));
        if constexpr (kIsInt8<C>) {
          if (c < 2) shared.scales[t % kStages][c][row] = shared.inputs.new_scales[c];
        }
      }
      __syncthreads();
    }
  }

  // Each lane computes its part of every dot product, and the parts are summed over the lanes of the token.
  // Then the sums so far are scaled down to the new maximum, and the values of the tile are added.
  LAB_DEVICE void attend(int t) {
    float scores[kPerLane * Heads] = {};
    if (live) {
      LAB_UNROLL
      for (int j = 0; j < kPerLane; ++j) {
        float key[N];
        numbers(key, &shared.k[t % kStages][j * kParts + part][c * N]);
        LAB_UNROLL
        for (int h = 0; h < Heads; ++h) {
          LAB_UNROLL
          for (int e = 0; e < N; ++e)
            scores[j * Heads + h] = fmadd(query[h][e], key[e], scores[j * Heads + h]);
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
        if constexpr (kIsInt8<C>) score *= to_float(shared.scales[t % kStages][0][j * kParts + part]);
        if (begin + t * kTokens + j * kParts + part >= end) score = -INFINITY;
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
        if constexpr (kIsInt8<C>) {
          // A slot past the end may hold any scale, and its weight is 0.
          const bool within = begin + t * kTokens + j * kParts + part < end;
          score *= within ? to_float(shared.scales[t % kStages][1][j * kParts + part]) : 0.f;
        }
      }
    }
    if (live) {
      LAB_UNROLL
      for (int j = 0; j < kPerLane; ++j) {
        float value[N];
        numbers(value, &shared.v[t % kStages][j * kParts + part][c * N]);
        LAB_UNROLL
        for (int h = 0; h < Heads; ++h) {
          LAB_UNROLL
          for (int e = 0; e < N; ++e) acc[h][e] = fmadd(scores[j * Heads + h], value[e], acc[h][e]);
        }
      }
    }
  }

  LAB_DEVICE void publish(T* out, float* partial) {
    float* sums = &smem<float>();  // reuses the memory of the tiles
    cp_async_wait<0>();
    __syncthreads();
    LAB_UNROLL
    for (int h = 0; h < Heads; ++h) {
      if (!live || head0 + h >= group) continue;
      const int row = part * group + head0 + h;
      LAB_UNROLL
      for (int e = 0; e < N; e += 4) {
        const Vec<float> v{{acc[h][e], acc[h][e + 1], acc[h][e + 2], acc[h][e + 3]}};
        store(sums + row * Base::kRow + c * N + e, v);
      }
      if (c == 0) store(sums + kParts * group * Base::kRow + row * 2, Vec<float, 2>{{maximum[h], weight[h]}});
    }
    __syncthreads();
    Base::template publish<kParts>(sums, out, partial);
  }

 private:
  // This lane's elements of a token, or what their codes stand for before the scale.
  LAB_DEVICE static void numbers(float (&f)[N], const C* from) {
    if constexpr (kIsCode<C>) {
      const Vec<C, N> codes = load<N>(from);
      LAB_UNROLL
      for (int e = 0; e < N; ++e) f[e] = number_of(codes.v[e]);
    } else {
      unpack<T>(f, load_packed<N>(from));
    }
  }
  LAB_DEVICE void look_up(int t) {
    const int row0 = threadIdx.x / L, row_step = blockDim.x / L;
    LAB_UNROLL
    for (int j = 0; j < kPerLane; ++j) {
      const int row = row0 + j * row_step, token = begin + t * kTokens + row;
      pages[j] = row < kTokens && token < stored ? Base::page_of(token) : -1;
    }
  }
  LAB_DEVICE void copy(int t) {
    const int row0 = threadIdx.x / L, row_step = blockDim.x / L;
    LAB_UNROLL
    for (int j = 0; j < kPerLane; ++j) {
      const int row = row0 + j * row_step, token = begin + t * kTokens + row;
      if (!live || row >= kTokens || c % kLanesPerCopy) continue;
      const bool valid = pages[j] >= 0;  // tokens past the end become zeros
      const size_t from = valid ? Base::place(pages[j], token) + c * N : 0;
      cp_async16(&shared.k[t % kStages][row][c * N], Base::cache.k + from, valid);
      cp_async16(&shared.v[t % kStages][row][c * N], Base::cache.v + from, valid);
      if constexpr (kIsInt8<C>) {
        // The scales of 8 tokens lie together in a page.
        if (c || row % 8) continue;
        const size_t first = valid ? Base::row_of(pages[j], token) : 0;
        cp_async16(&shared.scales[t % kStages][0][row], Base::cache.scales.k + first, valid);
        cp_async16(&shared.scales[t % kStages][1][row], Base::cache.scales.v + first, valid);
      }
    }
    cp_async_commit();
    look_up(t + 1);
  }
};

}  // namespace lab
