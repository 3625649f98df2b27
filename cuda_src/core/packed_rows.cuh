// Matrix product of up to 64 rows of x with packed rows of w (formats/) on tensor cores.
//
// A block owns 16 rows of w; its warps share k, one segment of 64 bytes of each row at a time. The tensor
// core's left operand is 16 rows of w by 16 columns, its right one 16 columns of 8 rows of x. Codes go from
// DRAM into registers and become the left operand there: weights pass through no memory in between. Which
// column a lane holds is free, as long as w and x agree; the layout of the codes is made for it.
//
// Sums of one group of columns are multiplied by its scale in float32, so that a weight is never rounded.
#pragma once
#include "../formats/codes.cuh"
#include "../settings.h"
#include "../sizes.h"

namespace lab {

// Tiles: of 8 rows of x. Warps: that share k. U: segments of each row that a warp has in flight. Parts: rows
// of w for one output (gate and up: 2), n rows apart.
template <int Tiles_, int Warps_, int U_, int Parts_>
struct PackedShape {
  static constexpr int kTiles = Tiles_, kWarps = Warps_, U = U_, kParts = Parts_;
  static constexpr int kThreads = 32 * Warps_, kOutputs = 16 / Parts_;
  static constexpr int kSums = 20;  // floats between two columns of partial sums: no bank conflicts
};

template <typename T, typename C>
struct alignas(16) PackedSmem {
  // Two sets of sums take turns, so that one barrier each is enough.
  float partial[2][C::kWarps][C::kTiles * 8][C::kSums];
  alignas(16) T x[8];  // really `rows` rows of staged columns: see packed_smem_bytes()
};

// Segments of x that a block holds at a time: all, unless they take more than 64 KiB; whole rounds of loads.
template <typename F, typename C>
LAB_HOST_DEVICE int staged_segments(int rows, int k) {
  constexpr int kRound = C::kWarps * C::U;
  const int all = (k + Layout<F>::kColumns - 1) / Layout<F>::kColumns;
  const int most = 64 * 1024 / (rows * Layout<F>::kColumns * 2) / kRound * kRound;
  const int fit = most > kRound ? most : kRound;
  return all < fit ? all : fit;
}
// Elements between two rows of x in shared memory: 32 bytes more than the columns, so that four rows lie in
// different banks.
template <typename F, typename C>
LAB_HOST_DEVICE int staged_stride(int rows, int k) {
  return staged_segments<F, C>(rows, k) * Layout<F>::kColumns + 16;
}
template <typename T, typename F, typename C>
inline size_t packed_smem_bytes(int rows, int k) {
  return sizeof(PackedSmem<T, C>) + size_t(rows) * staged_stride<F, C>(rows, k) * sizeof(T);
}

template <typename T_, typename F, typename C_>
struct PackedRows {
  using T = T_;
  using C = C_;
  using L = Layout<F>;
  static constexpr int kThreads = C::kThreads, kOutputs = C::kOutputs, U = C::U;
  // The scales of a segment of a row, in words; see PackedType in unpack.cuh for why not in smaller elements.
  static constexpr bool kShort = L::kSegmentScales < 4;
  using ScaleWord = std::conditional_t<kShort, uint16_t, uint32_t>;
  using Scales = Vec<ScaleWord, kShort ? 1 : L::kSegmentScales / 4>;

  PackedSmem<T, C>& shared;
  const T* x;
  PackedWeights w;
  int rows, n, k, segments;  // segments: of a row of w
  int lane, g, t, warp;      // g, t: row and quarter of the lane in a tensor core's tile
  int output;                // first of the block's outputs that are summed now
  int stride, panel, staged = -1, turn = 0;
  int fetch_output, fetch_segment;            // where the next loads read
  const uint8_t *codes_of[2], *scales_of[2];  // of rows g and g + 8
  Vec<uint32_t, 4> words[U][2];
  Scales scales[U][2];
  float acc[C::kTiles][4];

  explicit LAB_DEVICE PackedRows(const PackedProduct<T>& p)
      : shared(smem<PackedSmem<T, C>>()), x(p.x), w(p.w), rows(p.rows), n(p.n), k(p.k) {
    segments = (k + L::kColumns - 1) / L::kColumns;
    stride = staged_stride<F, C>(rows, k), panel = staged_segments<F, C>(rows, k);
    lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  }

  // Issues the first loads, which are of weights and so depend on no earlier kernel, and waits for the
  // preceding kernel.
  LAB_DEVICE void start() {
    output = blockIdx.x * kOutputs;
    aim(output);
    LAB_UNROLL
    for (int u = 0; u < U; ++u) fetch(u);
    advance();
    // A block that has issued all its loads allows the dependent kernel to launch before the wait.
    release();
    pdl_wait();
    release();
  }
  LAB_DEVICE bool more() const { return output < n; }
  LAB_DEVICE void next() { output += gridDim.x * kOutputs; }

  // The sums of the present outputs; all threads must call it. each_output() then reads them.
  LAB_DEVICE void multiply() {
    float row_scale[2] = {1.f, 1.f};  // loaded now, used at the end
    if constexpr (F::kGroup == 0) {
      LAB_UNROLL
      for (int r = 0; r < 2; ++r) {
        row_scale[r] = load_now(reinterpret_cast<const float*>(w.scales) + row_of(output, r));
      }
    }
    LAB_UNROLL
    for (int tile = 0; tile < C::kTiles; ++tile) {
      LAB_UNROLL
      for (int i = 0; i < 4; ++i) acc[tile][i] = 0.f;
    }
    for (int begin = 0; begin < segments; begin += panel) {
      if (staged != begin) stage(begin);
      const int end = min(segments, begin + panel);
      for (int first = begin; first < end; first += C::kWarps * U) {
        LAB_UNROLL
        for (int u = 0; u < U; ++u) {
          const int segment = first + u * C::kWarps + warp;
          if (segment < end) add(u, shared.x + (segment - begin) * L::kColumns);
          fetch(u);
        }
        advance();
        release();
      }
    }
    auto& partial = shared.partial[turn];
    LAB_UNROLL
    for (int tile = 0; tile < C::kTiles; ++tile) {
      LAB_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int b = tile * 8 + 2 * t + i % 2;
        if (b < rows) partial[warp][b][g + i / 2 * 8] = acc[tile][i] * row_scale[i / 2];
      }
    }
    __syncthreads();
  }

  // Calls f(output, b, sum, second) for each output of this thread: the sums of the warps in a fixed order;
  // second is that of the output's second part.
  template <typename Use>
  LAB_DEVICE void each_output(Use use) {
    const auto& partial = shared.partial[turn];
    for (int i = threadIdx.x; i < kOutputs * rows; i += kThreads) {
      const int r = i % kOutputs, b = i / kOutputs;
      if (output + r >= n) continue;
      float sum = 0.f, second = 0.f;
      LAB_UNROLL
      for (int s = 0; s < C::kWarps; ++s) {
        sum += partial[s][b][r];
        if constexpr (C::kParts == 2) second += partial[s][b][r + 8];
      }
      use(output + r, b, sum, second);
    }
    turn ^= 1;
  }

 private:
  // The row of w that row g (r = 0) or g + 8 (r = 1) of the tile stands for. Rows past the end repeat the last
  // one; their sums are never stored.
  LAB_DEVICE int row_of(int first, int r) const {
    if constexpr (C::kParts == 2) return r * n + min(first + g, n - 1);
    return min(first + g + 8 * r, n - 1);
  }
  LAB_DEVICE void aim(int to) {
    fetch_output = to;
    fetch_segment = to < n ? 0 : segments;
    LAB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const size_t row = row_of(min(to, n - 1), r);
      codes_of[r] = w.codes + segment_place(row, segments, kSegmentBytes) + t * 16;
      scales_of[r] = w.scales + segment_place(row, segments, L::kSegmentScales);
    }
  }
  LAB_DEVICE void advance() {
    fetch_segment += C::kWarps * U;
    if (fetch_segment >= segments && fetch_output < n) aim(fetch_output + gridDim.x * kOutputs);
  }
  // Allows the dependent kernel to launch once this block has issued its last loads of weights.
  LAB_DEVICE void release() const {
    if (fetch_output >= n) pdl_launch_dependents();
  }
  LAB_DEVICE void fetch(int u) {
    const int segment = fetch_segment + u * C::kWarps + warp;
    if (segment >= segments) return;
    LAB_UNROLL
    for (int r = 0; r < 2; ++r) {
      words[u][r] = load_stream(
          reinterpret_cast<const uint32_t*>(codes_of[r] + size_t(segment) * (kBlockRows * kSegmentBytes)));
      if constexpr (F::kGroup != 0) {
        const auto* at =
            reinterpret_cast<const ScaleWord*>(scales_of[r] + segment * (kBlockRows * L::kSegmentScales));
        scales[u][r] = load<Scales::size>(at);
      }
    }
  }

  // acc += the 16 rows of one segment of w times that segment of all rows of x.
  LAB_DEVICE void add(int u, const T* xs) {
    // Sums of one group, of x alone as well where the format has a minimum.
    float sums[C::kTiles][4] = {}, of_x[C::kTiles][4] = {};
    const uint32_t ones = pair_of(from_float<T>(1.f));
    LAB_UNROLL
    for (int run = 0; run < L::kRuns; ++run) {
      const int group = F::kGroup ? run / L::kRunsPerGroup : 0;
      uint32_t pairs[2][4];
      LAB_UNROLL
      for (int r = 0; r < 2; ++r) {
        F::template numbers<T>(pairs[r], words[u][r].v + run * L::kWords,
                               F::template zero_pair<T>(F::kZero ? entry(u, r, group, 1) : 0.f));
      }
      LAB_UNROLL
      for (int half_run = 0; half_run < 2; ++half_run) {
        const int p = 2 * half_run;
        const uint32_t a[4] = {pairs[0][p], pairs[1][p], pairs[0][p + 1], pairs[1][p + 1]};
        LAB_UNROLL
        for (int tile = 0; tile < C::kTiles; ++tile) {
          // Rows past the last repeat it; their sums are never stored.
          const T* row =
              xs + min(tile * 8 + g, rows - 1) * stride + run * kRunColumns + half_run * 16 + 4 * t;
          const auto of_row = bit_cast<Vec<uint32_t, 2>>(load<4>(row));
          const uint32_t b[2] = {of_row.v[0], of_row.v[1]};
          mma_m16n8k16(F::kGroup ? sums[tile] : acc[tile], a, b, T{});
          if constexpr (F::kMinimum) mma_m16n8k16(of_x[tile], {ones, ones, ones, ones}, b, T{});
        }
      }
      if constexpr (F::kGroup != 0) {
        if ((run + 1) % L::kRunsPerGroup == 0) {
          LAB_UNROLL
          for (int r = 0; r < 2; ++r) {
            const float scale = entry(u, r, group, 0), minimum = F::kMinimum ? entry(u, r, group, 1) : 0.f;
            LAB_UNROLL
            for (int tile = 0; tile < C::kTiles; ++tile) {
              LAB_UNROLL
              for (int i = 2 * r; i < 2 * r + 2; ++i) {
                acc[tile][i] = fmadd(scale, sums[tile][i], acc[tile][i]);
                if constexpr (F::kMinimum) acc[tile][i] = fmadd(minimum, of_x[tile][i], acc[tile][i]);
                sums[tile][i] = of_x[tile][i] = 0.f;
              }
            }
          }
        }
      }
    }
  }

  // An entry of a scale of the segment in flight: 0 is the scale, 1 its second entry.
  LAB_DEVICE float entry(int u, int r, int group, int which) const {
    constexpr int kBits = 8 * int(sizeof(typename F::Scale)), kPerWord = 8 * int(sizeof(ScaleWord)) / kBits;
    const int i = group * L::kEntries + which;
    return scale_of<typename F::Scale>(uint32_t(scales[u][r].v[i / kPerWord]) >> (i % kPerWord * kBits));
  }

  // Copies `panel` segments of all rows of x to shared memory, with zeros past k.
  LAB_DEVICE void stage(int begin) {
    __syncthreads();  // the columns staged before have been multiplied
    const int first = begin * L::kColumns, columns = min(panel, segments - begin) * L::kColumns;
    for (int b = 0; b < rows; ++b) {
      const T* from = x + size_t(b) * k + first;
      T* to = shared.x + b * stride;
      for (int col = threadIdx.x * 8; col < columns; col += kThreads * 8) {
        if (k % 8 == 0) {
          cp_async16(to + col, first + col < k ? from + col : x, first + col < k);
        } else {
          LAB_UNROLL
          for (int e = 0; e < 8; ++e) to[col + e] = first + col + e < k ? from[col + e] : from_float<T>(0.f);
        }
      }
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    staged = begin;
  }
};

// Blocks for `outputs` outputs: as many as run at once, each of which works on several sets of outputs, or one
// for each set.
template <typename C>
inline int packed_blocks(int outputs) {
  const int all = ceil_div(outputs, C::kOutputs), slots = 16 / C::kWarps * multiprocessors();
  return slots < all ? slots : all;
}

// Calls f with the shape of a launch: f(PackedShape<...>{}).
template <int Parts, typename Use>
inline void by_packed_shape(int rows, int n, Use&& use) {
  // The host build has one shape, which all numbers of rows fit: each costs it half a second for every op.
  if constexpr (kHost) return use(PackedShape<8, 4, 2, Parts>{});
  if (rows > 16) return use(PackedShape<8, 4, 1, Parts>{});
  if (rows > 8) return use(PackedShape<2, 4, 2, Parts>{});
  use(PackedShape<1, 4, 4, Parts>{});
}

}  // namespace lab
