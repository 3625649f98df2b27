// Split attention on tensor cores: float16 and bfloat16.
#pragma once
#include "split_attention.cuh"

namespace lab {

// Each warp works on tiles of 16 tokens of its own, through a cp.async ring of its own, and meets the other
// warps at no barrier before the end. All heads of the group share one matrix multiply. Scores [heads,
// tokens] = Q K^T: the heads are its 16 rows. Sums [D, heads] = V^T P^T: here D gives the rows, so that 8
// heads already fill the columns. HeadTiles: how many tiles of 8 heads. P is rounded to T.
//
// Codes (C) are copied as they are and become pairs of numbers in registers. Their scales are applied to the
// scores and, in int8, to P, which is then rounded to bfloat16: times a scale it may be too small for float16.
template <typename T, int D, int HeadTiles, typename C = T>
struct MmaAttention : SplitAttention<T, D, C> {
  // Chunks are 16 bytes of a token's row. A ring has as many bytes whatever is stored.
  static constexpr int kWarps = 4, kStages = 3 * int(sizeof(T) / sizeof(C)), kTokens = 16;
  static constexpr int kPerChunk = 16 / int(sizeof(C)), kChunks = D / kPerChunk, kSteps = D / 16;
  static constexpr int kMaxThreads = kWarps * 32;
  using P = std::conditional_t<kIsInt8<C>, bf16, T>;  // of the second multiply
  // A split of 128 tokens has all its copies in flight at once. A context of up to 256 tokens is finished
  // sooner by one block than by two whose results must be merged (H100).
  static constexpr int kLeast = kWarps * kTokens * 2, kAlone = 2 * kLeast;
  struct PlainSmem {
    C k[kWarps][kStages][kTokens][D], v[kWarps][kStages][kTokens][D];
    AttentionInputs<T, D, C> inputs;
  };
  struct Int8Smem : PlainSmem {
    alignas(16) half scales[kWarps][kStages][2][kTokens];  // of K, of V
  };
  using Smem = std::conditional_t<kIsInt8<C>, Int8Smem, PlainSmem>;
  using Base = SplitAttention<T, D, C>;
  using Base::begin, Base::end, Base::stored, Base::group;
  Smem& shared;
  // count: tiles of this warp, which are warp, warp + kWarps, ...
  int lane, warp, count;
  // Page number of the tile to copy next: its 16 tokens lie in one page.
  int page;
  float scale;
  uint32_t query[kSteps][4];
  float acc[kSteps][HeadTiles][4] = {}, maximum[HeadTiles], weight[HeadTiles] = {};

  static int threads(int) { return kMaxThreads; }
  LAB_DEVICE int query_rows() const { return HeadTiles * 8; }

  // least: the fewest tokens of a split, where the tuner has measured it; 0 means kLeast.
  LAB_DEVICE MmaAttention(const KvCache<C>& cache, int splits_, int group_, int length, int in_cache,
                          int least)
      : Base(cache, splits_, group_, length, in_cache, kTokens, least ? least : kLeast,
             least ? least : kAlone),
        shared(smem<Smem>()) {
    lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tiles = end > begin ? (end - begin + kTokens - 1) / kTokens : 0;
    count = (tiles - warp + kWarps - 1) / kWarps;
    LAB_UNROLL
    for (int h = 0; h < HeadTiles; ++h) maximum[h] = -FLT_MAX;
  }

  // Allows the dependent kernel to launch right away: DRAM is idle while the steps of attention wait for each
  // other, and the dependent kernel's first weight loads fill that time (H100: 2.4 us in each layer of the
  // 8B's token).
  LAB_DEVICE void start() {
    look_up(0);
    for (int t = 0; t < kStages - 1; ++t) copy(t);
    pdl_launch_dependents();
  }
  // The queries as the left operand of the multiply. Rows from HeadTiles * 8 on are zero. With codes a column
  // of the operand is that element of the query by whose key attend() multiplies it.
  LAB_DEVICE void load_query(float scale_log2) {
    const int g = lane / 4, t = lane % 4;
    scale = scale_log2;
    if constexpr (kIsCode<C>) {
      scale *= Base::keys_scale;
      LAB_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        LAB_UNROLL
        for (int h = 0; h < 2; ++h) {
          const auto four =
              h < HeadTiles ? load<4>(&shared.inputs.q[g + h * 8][s * 16 + 4 * t]) : Vec<T, 4>{};
          query[s][h] = bit_cast<uint32_t>(Vec<T, 2>{{four.v[0], four.v[2]}});
          query[s][h + 2] = bit_cast<uint32_t>(Vec<T, 2>{{four.v[1], four.v[3]}});
        }
      }
      return;
    }
    LAB_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      LAB_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int head = g + i % 2 * 8, d = s * 16 + i / 2 * 8 + 2 * t;
        query[s][i] = i % 2 < HeadTiles ? bit_cast<uint32_t>(load<2>(&shared.inputs.q[head][d])) : 0;
      }
    }
  }
  // Waits for tile t, issues the asynchronous copy of a later tile, and writes the new token over the zeros
  // that the copies left in its place.
  LAB_DEVICE void wait_for(int t) {
    cp_async_wait<kStages - 2>();
    // Tile t is visible to all lanes, and none still reads tile t - 1.
    __syncwarp();
    copy(t + kStages - 1);
    const int row = stored - token0(t);
    if (stored < end && 0 <= row && row < kTokens) {
      if (lane < kChunks) {
        store(at(shared.k[warp][t % kStages], row, lane), load(&shared.inputs.new_k[lane * kPerChunk]));
        store(at(shared.v[warp][t % kStages], row, lane), load(&shared.inputs.new_v[lane * kPerChunk]));
      }
      if constexpr (kIsInt8<C>) {
        if (lane < 2) shared.scales[warp][t % kStages][lane][row] = shared.inputs.new_scales[lane];
      }
      __syncwarp();
    }
  }

  LAB_DEVICE void attend(int t) {
    // The address that this lane gives to ldmatrix, which loads four 8 x 8 tiles: tokens 0-7 and 8-15, each
    // with two neighbouring chunks of D.
    const int row = lane / 16 * 8 + lane % 8, side = lane / 8 % 2;
    C(*k)[D] = shared.k[warp][t % kStages];
    C(*v)[D] = shared.v[warp][t % kStages];
    // [tokens 0-7, tokens 8-15][head g: tokens 2t, 2t + 1; head g + 8: the same tokens].
    float scores[2][4] = {};
    if constexpr (kIsCode<C>) {
      // A word of ldmatrix is four codes of one token: columns 4t, 4t + 2 and 4t + 1, 4t + 3 of a step.
      LAB_UNROLL
      for (int s = 0; s < kSteps; s += 2) {
        uint32_t key[4], low[4], high[4];
        ldmatrix_x4(key, at(k, row, s + side));
        pairs_of<C, T>(low, key[0], key[1]);
        pairs_of<C, T>(high, key[2], key[3]);
        LAB_UNROLL
        for (int i = 0; i < 2; ++i) {
          mma_m16n8k16(scores[0], query[s + i], {low[2 * i], low[2 * i + 1]}, T{});
          mma_m16n8k16(scores[1], query[s + i], {high[2 * i], high[2 * i + 1]}, T{});
        }
      }
    } else {
      LAB_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        uint32_t key[4];
        ldmatrix_x4(key, at(k, row, 2 * s + side));
        mma_m16n8k16(scores[0], query[s], {key[0], key[1]}, T{});
        mma_m16n8k16(scores[1], query[s], {key[2], key[3]}, T{});
      }
    }
    const int token = token0(t) + lane % 4 * 2;
    // Of this lane's four tokens: what their scores and their weights are multiplied by.
    [[maybe_unused]] float of_keys[4], of_values[4];
    if constexpr (kIsInt8<C>) {
      const half(*scales)[kTokens] = shared.scales[warp][t % kStages];
      LAB_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int at_token = lane % 4 * 2 + i / 2 * 8 + i % 2;
        of_keys[i] = to_float(scales[0][at_token]) * scale;
        // A slot past the end may hold any scale, and its weight is 0.
        of_values[i] = token + i / 2 * 8 + i % 2 < end ? to_float(scales[1][at_token]) : 0.f;
      }
    }
    uint32_t p[HeadTiles][2];
    float shrink[HeadTiles][2];  // for the two heads whose sums this lane holds
    LAB_UNROLL
    for (int h = 0; h < HeadTiles; ++h) {
      float top = maximum[h];
      LAB_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& score = scores[i / 2][2 * h + i % 2];
        float factor = scale;
        if constexpr (kIsInt8<C>) factor = of_keys[i];
        score = token + i / 2 * 8 + i % 2 < end ? score * factor : -INFINITY;
        top = fmaxf(top, score);
      }
      top = group_max<4>(top);  // over the lanes that hold the other tokens of this head
      const float mine = exp2f(maximum[h] - top);
      maximum[h] = top;
      weight[h] *= mine;
      LAB_UNROLL
      for (int i = 0; i < 2; ++i) {
        float low = exp2f(scores[i][2 * h] - top), high = exp2f(scores[i][2 * h + 1] - top);
        weight[h] += low + high;
        if constexpr (kIsInt8<C>) low *= of_values[2 * i], high *= of_values[2 * i + 1];
        p[h][i] = bit_cast<uint32_t>(Vec<P, 2>{{from_float<P>(low), from_float<P>(high)}});
        shrink[h][i] = __shfl_sync(0xffffffffu, mine, lane % 4 * 8 + i * 4);
      }
    }
    const auto add_values = [&](int s, const uint32_t (&value)[4]) {
      LAB_UNROLL
      for (int h = 0; h < HeadTiles; ++h) {
        LAB_UNROLL
        for (int i = 0; i < 4; ++i) acc[s][h][i] *= shrink[h][i % 2];
        mma_m16n8k16(acc[s][h], value, p[h], P{});
      }
    };
    if constexpr (kIsCode<C>) {
      // A word of the transposed tile is columns 2g and 2g + 1 of two tokens: rows g and g + 8 of a step.
      LAB_UNROLL
      for (int s = 0; s < kSteps; s += 2) {
        uint32_t codes[4], value[4];
        ldmatrix_x4_trans(codes, at(v, row, s + side));
        pairs_of<C, P>(value, codes[0], codes[2]);
        add_values(s, value);
        pairs_of<C, P>(value, codes[1], codes[3]);
        add_values(s + 1, value);
      }
    } else {
      LAB_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        uint32_t value[4];
        ldmatrix_x4_trans(value, at(v, row, 2 * s + side));
        add_values(s, value);
      }
    }
  }

  LAB_DEVICE void publish(T* out, float* partial) {
    float* sums = &smem<float>();  // reuses the memory of the tiles
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
          const int row = kIsCode<C> ? 2 * g + i / 2 : g + i / 2 * 8;
          sums[(warp * group + head) * Base::kRow + s * 16 + row] = acc[s][h][i];
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
  // Address of chunk c (16 bytes) of a row. Its place is mixed with the row's number, so that the 8 rows that
  // ldmatrix reads at a time touch every bank once. Rows of 12 or 4 chunks already lie half the banks apart, and
  // rows of 6 a quarter.
  LAB_DEVICE static C* at(C (*tile)[D], int row, int c) {
    constexpr int kApart = kChunks == 6 ? 4 : kChunks % 8 ? 2 : 1;
    return &tile[row][(c ^ (row / kApart % (8 / kApart))) * kPerChunk];
  }
  LAB_DEVICE void look_up(int t) { page = token0(t) < stored ? Base::page_of(token0(t)) : 0; }
  LAB_DEVICE void copy(int t) {
    if (t < count) {
      const size_t tile = Base::place(page, token0(t));
      LAB_UNROLL
      for (int j = 0; j < kChunks / 2; ++j) {
        const int item = lane + j * 32, row = item / kChunks, c = item % kChunks;
        const bool valid = token0(t) + row < stored;  // tokens past the end become zeros
        const size_t from = valid ? tile + row * Base::token_stride() + c * kPerChunk : 0;
        cp_async16(at(shared.k[warp][t % kStages], row, c), Base::cache.k + from, valid);
        cp_async16(at(shared.v[warp][t % kStages], row, c), Base::cache.v + from, valid);
      }
      if constexpr (kIsInt8<C>) {
        // The scales of a page's tokens are neighbours: two lanes copy those of K, and two those of V.
        const half* scales = lane < 2 ? Base::cache.scales.k : Base::cache.scales.v;
        const int first = lane % 2 * 8;
        if (lane < 4)
          cp_async16(&shared.scales[warp][t % kStages][lane / 2][first],
                     scales + Base::row_of(page, token0(t)) + first);
      }
    }
    cp_async_commit();
    look_up(t + 1);
  }
};

}  // namespace lab
