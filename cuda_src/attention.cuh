// Decode attention over a paged cache, one split of one sequence and KV head per block: the core of decode_attention
// and rope_append_attention, on CUDA cores (LaneAttention) and on tensor cores (MmaAttention).
//
// A block keeps the group's queries in shared memory, streams the split's K and V through a ring of tiles (cp.async),
// and merges the running softmaxes of its parts. Scores are kept in base 2: exp(x) = exp2(x * log2(e)), and log2(e) is
// folded into the scale.
#pragma once
#include <cfloat>

#include "common.cuh"
#include "sizes.h"
#include "unpack.cuh"

namespace lab {

constexpr int kMaxGroup = 16;                     // query heads of one KV head

// k, v [pages, kv_heads, page_size, D]; table [batch, max_pages]; a page holds 2^page_shift tokens, 16 at least.
template <typename T>
struct PagedCache {
  T *k, *v;
  const int* table;
  int page_shift, max_pages;
};

// What a block reads before its tiles: the queries, and a new token that is not in the cache yet.
template <typename T, int D>
struct AttentionInputs {
  alignas(16) T q[kMaxGroup][D];
  T new_k[D], new_v[D];
};

// One block of the grid (splits, kv_heads, batch): which tokens are its own, and how its results meet the others'.
template <typename T_, int D_>
struct SplitAttention {
  using T = T_;
  static constexpr int D = D_;
  static constexpr int kRow = D + 4;              // floats of a head's sums in shared memory; the 4 spare bank conflicts
  PagedCache<T> cache;
  int split, kv_head, kv_heads, b, group;
  int splits, used;                               // the grid's splits, and those that a context of this length takes
  int begin, end;                                 // tokens of this split
  int stored;                                     // of these, the ones in the cache end here; at most one follows

  // Split s owns tokens [begin, end) of `length`, a multiple of `unit` each. A context of up to `alone` tokens is not
  // split, for a merge would cost more than it saves, and no split gets less than `least`. Tokens from `in_cache` on
  // are not read from the cache: a new one is put in its place from AttentionInputs.
  LAB_DEVICE SplitAttention(const PagedCache<T>& cache_, int group_, int length, int in_cache, int unit, int least,
                            int alone)
      : cache(cache_), group(group_) {
    split = blockIdx.x, splits = gridDim.x, kv_head = blockIdx.y, kv_heads = gridDim.y, b = blockIdx.z;
    const int wanted = length <= alone ? length : max(least, (length + splits - 1) / splits);
    const int chunk = max(unit, (wanted + unit - 1) / unit * unit);
    used = length > 0 ? (length + chunk - 1) / chunk : 1;  // no token at all: the first block writes zeros
    begin = split * chunk, end = min(length, begin + chunk), stored = min(end, in_cache);
  }
  LAB_DEVICE bool unused() const { return split >= used; }
  LAB_DEVICE bool owns(int token) const { return begin <= token && token < end; }

  LAB_DEVICE int page_of(int token) const {
    return cache.table[size_t(b) * cache.max_pages + (token >> cache.page_shift)];
  }
  // Where the first element of this KV head's token is, in a page.
  LAB_DEVICE size_t place(int page, int token) const {
    const int slot = token & ((1 << cache.page_shift) - 1);
    return (((size_t(page) * kv_heads + kv_head) << cache.page_shift) + slot) * D;
  }

  // Merges the block's running softmaxes: sums [parts][group][kRow] and then maxima and weights [parts][group][2], in
  // shared memory. If only one split is used the result is final: out [batch, q_heads, D]. Else it goes to partial,
  // whose part for this sequence and KV head holds the sums [splits][group][D] and then maxima and weights
  // [splits][group][2].
  template <int Parts>
  LAB_DEVICE void publish(const float* sums, T* out, float* partial) const {
    const float* stats = sums + Parts * group * kRow;
    for (int i = threadIdx.x * 4; i < group * D; i += blockDim.x * 4) {
      const int h = i / D, d = i % D;
      float top = -FLT_MAX, total = 0.f;
      Vec<float> sum{};
      LAB_UNROLL
      for (int p = 0; p < Parts; ++p) top = fmaxf(top, stats[(p * group + h) * 2]);
      LAB_UNROLL
      for (int p = 0; p < Parts; ++p) {
        const int row = p * group + h;
        const float factor = exp2f(stats[row * 2] - top);
        add(sum, load(sums + row * kRow + d), factor);
        total = fmadd(stats[row * 2 + 1], factor, total);
      }
      if (used == 1) {
        store_normalised(out, i, sum, total);
      } else {
        float* mine = published(partial) + size_t(split) * group * D + i;
        store(mine, Vec<float, 2>{{sum.v[0], sum.v[1]}});
        store(mine + 2, Vec<float, 2>{{sum.v[2], sum.v[3]}});
        if (d == 0) store(published_stats(partial) + (split * group + h) * 2, Vec<float, 2>{{top, total}});
      }
    }
  }

  // Each block takes a ticket after its results are visible; whoever takes the last one sees them all, merges them in
  // the order of the splits, so that a run repeats bit for bit, and leaves the counter at zero for the next launch.
  LAB_DEVICE void merge_in_last_block(T* out, float* partial, unsigned* tickets) const {
    int& last = smem<int>();
    unsigned* ticket = tickets + b * kv_heads + kv_head;
    __syncthreads();
    if (threadIdx.x == 0) last = take_ticket(ticket) == unsigned(used - 1);
    __syncthreads();
    if (!last) return;
    __syncthreads();                              // all have read `last`, whose place is used again
    float* stats = &smem<float>();                // [used][group][2], then the factors that bring each to one maximum
    float* factors = stats + used * group * 2;
    for (int i = threadIdx.x; i < used * group; i += blockDim.x) {
      store(stats + i * 2, load<2>(published_stats(partial) + i * 2));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < used * group; i += blockDim.x) {
      float top = -FLT_MAX;
      for (int j = i % group; j < used * group; j += group) top = fmaxf(top, stats[j * 2]);
      factors[i] = exp2f(stats[i * 2] - top);
    }
    __syncthreads();
    constexpr int kAhead = 8;                     // splits whose loads are in flight together
    for (int i = threadIdx.x * 4; i < group * D; i += blockDim.x * 4) {
      const float* sums = published(partial) + i;
      float total = 0.f;
      Vec<float> sum{};
      for (int s0 = 0; s0 < used; s0 += kAhead) {
        Vec<float, 2> low[kAhead], high[kAhead];  // a row of partial begins at a multiple of 8 bytes only
        LAB_UNROLL
        for (int s = 0; s < kAhead; ++s) {
          if (s0 + s >= used) continue;
          low[s] = load<2>(sums + size_t(s0 + s) * group * D);
          high[s] = load<2>(sums + size_t(s0 + s) * group * D + 2);
        }
        LAB_UNROLL
        for (int s = 0; s < kAhead; ++s) {
          if (s0 + s >= used) continue;
          const int row = (s0 + s) * group + i / D;
          add(sum, Vec<float>{{low[s].v[0], low[s].v[1], high[s].v[0], high[s].v[1]}}, factors[row]);
          total = fmadd(stats[row * 2 + 1], factors[row], total);
        }
      }
      store_normalised(out, i, sum, total);
    }
    if (threadIdx.x == 0) atomicExch(ticket, 0u);
  }

 private:
  LAB_DEVICE static void add(Vec<float>& sum, const Vec<float>& v, float factor) {
    LAB_UNROLL
    for (int e = 0; e < 4; ++e) sum.v[e] = fmadd(v.v[e], factor, sum.v[e]);
  }
  // Elements i to i + 4 of this group's part of out; no token at all gives zeros.
  LAB_DEVICE void store_normalised(T* out, int i, const Vec<float>& sum, float total) const {
    const float factor = total == 0.f ? 0.f : 1.f / total;
    Vec<T, 4> v;
    LAB_UNROLL
    for (int e = 0; e < 4; ++e) v.v[e] = from_float<T>(sum.v[e] * factor);
    store(out + (size_t(b) * kv_heads + kv_head) * group * D + i, v);
  }
  LAB_DEVICE float* published(float* partial) const {
    return partial + (size_t(b) * kv_heads + kv_head) * splits * group * (D + 2);
  }
  LAB_DEVICE float* published_stats(float* partial) const { return published(partial) + size_t(splits) * group * D; }
};

// ---- CUDA cores: float32, and every dtype on a CPU ------------------------------------------------------------------

constexpr int lanes_per_token(int vectors) { return vectors <= 8 ? 8 : vectors <= 16 ? 16 : 32; }

// Four warps share the tokens of a tile, L lanes share a token, a lane keeps 16 bytes of it; four more warps on the
// same tile for every four more query heads of the group. A warp serves Heads heads.
template <typename T, int D, int Heads>
struct LaneAttention : SplitAttention<T, D> {
  static constexpr int N = Vec<T>::size, L = lanes_per_token(D / N);  // D / N lanes have elements: 12 of 16 for D = 96
  static constexpr int kTokenWarps = 4, kPerLane = 4, kStages = 3, kTokensPerWarp = 32 / L;
  static constexpr int kParts = kTokenWarps * kTokensPerWarp;         // running softmaxes of one head
  static constexpr int kTokens = kParts * kPerLane;                   // of a tile
  static constexpr int kMaxThreads = kTokenWarps * 32 * 4;            // for a group of 16
  struct Smem {
    T k[kStages][kTokens][D], v[kStages][kTokens][D];
    AttentionInputs<T, D> inputs;
  };
  using Base = SplitAttention<T, D>;
  using Base::begin, Base::end, Base::stored, Base::group;
  Smem& shared;
  int c, part, head0, count;                      // lane of a token, running softmax, first head of this warp, tiles
  bool live;                                      // this lane has elements: c * N to c * N + N
  int pages[kPerLane];                            // of the tile to copy next
  float query[Heads][N], acc[Heads][N] = {}, maximum[Heads], weight[Heads] = {};

  static int threads(int group) { return kTokenWarps * 32 * ceil_div(group, 4); }
  LAB_DEVICE int query_rows() const { return group; }

  LAB_DEVICE LaneAttention(const PagedCache<T>& cache, int group_, int length, int in_cache)
      : Base(cache, group_, length, in_cache, kTokens, kTokens, 0), shared(smem<Smem>()) {
    const int warp = threadIdx.x / 32;
    c = threadIdx.x % L;
    part = warp % kTokenWarps * kTokensPerWarp + threadIdx.x % 32 / L;
    head0 = warp / kTokenWarps * Heads;
    live = c * N < D;
    count = end > begin ? (end - begin + kTokens - 1) / kTokens : 0;
    LAB_UNROLL
    for (int h = 0; h < Heads; ++h) maximum[h] = -FLT_MAX;
  }

  // Two tiles are in flight while one is used. A page number is looked up one tile ahead, so that no copy waits for it.
  LAB_DEVICE void start() {
    look_up(0);
    for (int t = 0; t < kStages - 1; ++t) copy(t);
  }
  // Heads beyond the group are zero.
  LAB_DEVICE void load_query(float scale_log2) {
    LAB_UNROLL
    for (int h = 0; h < Heads; ++h) {
      const bool valid = live && head0 + h < group;
      unpack<T>(query[h], valid ? load_packed<N>(&shared.inputs.q[head0 + h][c * N]) : Packed<T, N>{});
      LAB_UNROLL
      for (int e = 0; e < N; ++e) query[h][e] *= scale_log2;
    }
    release(-1);
  }
  // Waits for tile t, sends for the next to come, and puts a new token where the copies left zeros.
  LAB_DEVICE void wait_for(int t) {
    cp_async_wait<kStages - 2>();
    __syncthreads();                              // tile t has landed for all, and all are done with tile t - 1
    copy(t + kStages - 1);
    release(t);
    if (stored < end && t == count - 1) {
      if (live && threadIdx.x < L) {
        const int row = stored - begin - t * kTokens;
        store(&shared.k[t % kStages][row][c * N], load(&shared.inputs.new_k[c * N]));
        store(&shared.v[t % kStages][row][c * N], load(&shared.inputs.new_v[c * N]));
      }
      __syncthreads();
    }
  }

  // A lane's share of each dot product, summed over the token's lanes; then the sums so far shrink to the new maximum
  // and the tile's values join them.
  LAB_DEVICE void attend(int t) {
    float scores[kPerLane * Heads] = {};
    if (live) {
      LAB_UNROLL
      for (int j = 0; j < kPerLane; ++j) {
        float key[N];
        unpack<T>(key, load_packed<N>(&shared.k[t % kStages][j * kParts + part][c * N]));
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
      }
    }
    if (live) {
      LAB_UNROLL
      for (int j = 0; j < kPerLane; ++j) {
        float value[N];
        unpack<T>(value, load_packed<N>(&shared.v[t % kStages][j * kParts + part][c * N]));
        LAB_UNROLL
        for (int h = 0; h < Heads; ++h) {
          LAB_UNROLL
          for (int e = 0; e < N; ++e) acc[h][e] = fmadd(scores[j * Heads + h], value[e], acc[h][e]);
        }
      }
    }
  }

  LAB_DEVICE void publish(T* out, float* partial) const {
    float* sums = &smem<float>();                 // where the tiles were
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
  // Lets the next kernel come once the block has sent for its last tile: its own loads then follow at the heels.
  LAB_DEVICE void release(int t) const {
    if (t + kStages >= count) pdl_launch_dependents();
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
      if (!live || row >= kTokens) continue;
      const bool valid = pages[j] >= 0;           // past the end: zeros
      const size_t from = valid ? Base::place(pages[j], token) + c * N : 0;
      cp_async16(&shared.k[t % kStages][row][c * N], Base::cache.k + from, valid);
      cp_async16(&shared.v[t % kStages][row][c * N], Base::cache.v + from, valid);
    }
    cp_async_commit();
    look_up(t + 1);
  }
};

// ---- tensor cores: float16 and bfloat16 -----------------------------------------------------------------------------

// Every warp streams tiles of 16 tokens of its own, with a cp.async ring of its own and no barrier before the end. All
// heads of the group share a multiply: scores [heads, tokens] = Q K^T with the heads as its 16 rows; then sums
// [D, heads] = V^T P^T with D as the rows, so that 8 heads fill its columns. HeadTiles: multiples of 8 heads. P is
// rounded to T.
template <typename T, int D, int HeadTiles>
struct MmaAttention : SplitAttention<T, D> {
  static constexpr int kWarps = 4, kStages = 3, kTokens = 16, kChunks = D / 8, kSteps = D / 16;
  static constexpr int kMaxThreads = kWarps * 32;
  // A split of 128 tokens has all of them in flight at once; up to 256 are done sooner than two splits merge (H100).
  static constexpr int kLeast = kWarps * kTokens * (kStages - 1), kAlone = 2 * kLeast;
  struct Smem {
    T k[kWarps][kStages][kTokens][D], v[kWarps][kStages][kTokens][D];
    AttentionInputs<T, D> inputs;
  };
  using Base = SplitAttention<T, D>;
  using Base::begin, Base::end, Base::stored, Base::group;
  Smem& shared;
  int lane, warp, count;                          // count: this warp's tiles, which are warp, warp + kWarps, ...
  int page;                                       // of the tile to copy next: 16 tokens share one
  float scale;
  uint32_t query[kSteps][4];
  float acc[kSteps][HeadTiles][4] = {}, maximum[HeadTiles], weight[HeadTiles] = {};

  static int threads(int) { return kMaxThreads; }
  LAB_DEVICE int query_rows() const { return HeadTiles * 8; }

  LAB_DEVICE MmaAttention(const PagedCache<T>& cache, int group_, int length, int in_cache)
      : Base(cache, group_, length, in_cache, kTokens, kLeast, kAlone), shared(smem<Smem>()) {
    lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tiles = end > begin ? (end - begin + kTokens - 1) / kTokens : 0;
    count = (tiles - warp + kWarps - 1) / kWarps;
    LAB_UNROLL
    for (int h = 0; h < HeadTiles; ++h) maximum[h] = -FLT_MAX;
  }

  LAB_DEVICE void start() {
    look_up(0);
    for (int t = 0; t < kStages - 1; ++t) copy(t);
  }
  // The queries as the multiply's left operand; rows beyond HeadTiles * 8 are zero.
  LAB_DEVICE void load_query(float scale_log2) {
    const int g = lane / 4, t = lane % 4;
    scale = scale_log2;
    LAB_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      LAB_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int head = g + i % 2 * 8, d = s * 16 + i / 2 * 8 + 2 * t;
        query[s][i] = i % 2 < HeadTiles ? bit_cast<uint32_t>(load<2>(&shared.inputs.q[head][d])) : 0;
      }
    }
    release(-1);
  }
  // Waits for tile t, sends for the next to come, and puts a new token where the copies left zeros.
  LAB_DEVICE void wait_for(int t) {
    cp_async_wait<kStages - 2>();
    __syncwarp();                                 // tile t has landed for all lanes, and all are done with tile t - 1
    copy(t + kStages - 1);
    release(t);
    const int row = stored - token0(t);
    if (stored < end && 0 <= row && row < kTokens) {
      if (lane < kChunks) {
        store(at(shared.k[warp][t % kStages], row, lane), load(&shared.inputs.new_k[lane * 8]));
        store(at(shared.v[warp][t % kStages], row, lane), load(&shared.inputs.new_v[lane * 8]));
      }
      __syncwarp();
    }
  }

  LAB_DEVICE void attend(int t) {
    // A lane's address in four 8 x 8 tiles: tokens 0-7 and 8-15 by two neighbouring chunks of D.
    const int row = lane / 16 * 8 + lane % 8, side = lane / 8 % 2;
    T(*k)[D] = shared.k[warp][t % kStages];
    T(*v)[D] = shared.v[warp][t % kStages];
    float scores[2][4] = {};                      // tokens 0-7, 8-15: head g, tokens 2t, 2t + 1; head g + 8, the same
    LAB_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      uint32_t key[4];
      ldmatrix_x4(key, at(k, row, 2 * s + side));
      mma_m16n8k16(scores[0], query[s], {key[0], key[1]}, T{});
      mma_m16n8k16(scores[1], query[s], {key[2], key[3]}, T{});
    }
    const int token = token0(t) + lane % 4 * 2;
    uint32_t p[HeadTiles][2];
    float shrink[HeadTiles][2];                   // of the two heads whose sums this lane holds
    LAB_UNROLL
    for (int h = 0; h < HeadTiles; ++h) {
      float top = maximum[h];
      LAB_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& score = scores[i / 2][2 * h + i % 2];
        score = token + i / 2 * 8 + i % 2 < end ? score * scale : -INFINITY;
        top = fmaxf(top, score);
      }
      top = group_max<4>(top);                    // the lanes that hold this head's other tokens
      const float mine = exp2f(maximum[h] - top);
      maximum[h] = top;
      weight[h] *= mine;
      LAB_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float low = exp2f(scores[i][2 * h] - top), high = exp2f(scores[i][2 * h + 1] - top);
        weight[h] += low + high;
        p[h][i] = bit_cast<uint32_t>(Vec<T, 2>{{from_float<T>(low), from_float<T>(high)}});
        shrink[h][i] = __shfl_sync(0xffffffffu, mine, lane % 4 * 8 + i * 4);
      }
    }
    LAB_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      uint32_t value[4];
      ldmatrix_x4_trans(value, at(v, row, 2 * s + side));
      LAB_UNROLL
      for (int h = 0; h < HeadTiles; ++h) {
        LAB_UNROLL
        for (int i = 0; i < 4; ++i) acc[s][h][i] *= shrink[h][i % 2];
        mma_m16n8k16(acc[s][h], value, p[h], T{});
      }
    }
  }

  LAB_DEVICE void publish(T* out, float* partial) {
    float* sums = &smem<float>();                 // where the tiles were
    cp_async_wait<0>();
    __syncthreads();
    const int g = lane / 4, t = lane % 4;
    group_sum<4>(weight);
    LAB_UNROLL
    for (int h = 0; h < HeadTiles; ++h) {
      LAB_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int head = h * 8 + 2 * t + i % 2;
        if (head >= group) continue;
        LAB_UNROLL
        for (int s = 0; s < kSteps; ++s) {
          sums[(warp * group + head) * Base::kRow + s * 16 + g + i / 2 * 8] = acc[s][h][i];
        }
      }
      if (t == 0 && h * 8 + g < group) {
        float* stat = sums + kWarps * group * Base::kRow + (warp * group + h * 8 + g) * 2;
        store(stat, Vec<float, 2>{{maximum[h], weight[h]}});
      }
    }
    __syncthreads();
    Base::template publish<kWarps>(sums, out, partial);
  }

 private:
  LAB_DEVICE int token0(int t) const { return begin + (warp + t * kWarps) * kTokens; }
  // Chunk c (16 bytes) of a row, its place mixed with the row's number, so that the 8 rows that an ldmatrix reads at
  // one time meet every bank once. D = 96: neighbouring rows are half the banks apart already.
  LAB_DEVICE static T* at(T (*tile)[D], int row, int c) {
    return &tile[row][(c ^ (D == 96 ? row / 2 % 4 : row % 8)) * 8];
  }
  LAB_DEVICE void release(int t) const {
    if (t + kStages >= count) pdl_launch_dependents();
  }
  LAB_DEVICE void look_up(int t) { page = token0(t) < stored ? Base::page_of(token0(t)) : 0; }
  LAB_DEVICE void copy(int t) {
    if (t < count) {
      const size_t tile = Base::place(page, token0(t));
      LAB_UNROLL
      for (int j = 0; j < kChunks / 2; ++j) {
        const int item = lane + j * 32, row = item / kChunks, c = item % kChunks;
        const bool valid = token0(t) + row < stored;  // past the end: zeros
        const size_t from = valid ? tile + row * D + c * 8 : 0;
        cp_async16(at(shared.k[warp][t % kStages], row, c), Base::cache.k + from, valid);
        cp_async16(at(shared.v[warp][t % kStages], row, c), Base::cache.v + from, valid);
      }
    }
    cp_async_commit();
    look_up(t + 1);
  }
};

// ---- launch ---------------------------------------------------------------------------------------------------------

// Shared memory of a block: the tiles, then in their place what the block's parts, and at last the splits, merge.
template <typename A>
inline size_t attention_smem_bytes(int group, int splits) {
  constexpr int kParts = sizeof(typename A::T) == 4 || kHost ? 16 : 4;  // at most
  const size_t parts = size_t(kParts) * group * (A::kRow + 2) * sizeof(float);
  const size_t merging = size_t(splits) * group * 3 * sizeof(float);
  const size_t most = parts > merging ? parts : merging;
  return most > sizeof(typename A::Smem) ? most : sizeof(typename A::Smem);
}

// Calls f with the attention core for these heads, a type in f's argument: `using A = typename decltype(core)::type;`
template <typename A>
struct AttentionCore {
  using type = A;
};
template <typename T, int D, typename F>
inline void by_group(int group, F&& f) {
  if constexpr (sizeof(T) == 2) {
    if (!cpu_shapes()) {
      if (group <= 8) return f(AttentionCore<MmaAttention<T, D, 1>>{});
      return f(AttentionCore<MmaAttention<T, D, 2>>{});
    }
  }
  if constexpr (sizeof(T) == 4 || kHost) {
    switch (ceil_div(group, ceil_div(group, 4))) {  // query heads of a warp
      case 1: return f(AttentionCore<LaneAttention<T, D, 1>>{});
      case 2: return f(AttentionCore<LaneAttention<T, D, 2>>{});
      case 3: return f(AttentionCore<LaneAttention<T, D, 3>>{});
      default: return f(AttentionCore<LaneAttention<T, D, 4>>{});
    }
  }
}
template <typename T, typename F>
inline void by_attention_core(const char* op, int head_dim, int group, F&& f) {
  if (group > kMaxGroup) throw std::invalid_argument(std::string(op) + ": more than 16 query heads per KV head");
  switch (head_dim) {
    case 64: return by_group<T, 64>(group, f);
    case 96: return by_group<T, 96>(group, f);
    case 128: return by_group<T, 128>(group, f);
  }
  throw std::invalid_argument(std::string(op) + ": head_dim " + std::to_string(head_dim) + " is not 64, 96 or 128");
}

inline int log2_of(int power_of_two) {
  int shift = 0;
  while (1 << shift < power_of_two) ++shift;
  return shift;
}

}  // namespace lab
