// Matrix product of up to 16 rows of x with packed rows of w (formats/) on tensor cores.
//
// A block owns 16 or 32 rows of w; its warps share k, one segment of 64 bytes of each row at a time. The tensor
// core's left operand is 16 rows of w by 16 columns, its right one 16 columns of 8 rows of x. Codes go from
// DRAM into registers and become the left operand there: weights pass through no memory in between. Which
// column a lane holds is free, as long as w and x agree; the layout of the codes is made for it.
//
// Sums of one group of columns are multiplied by its scale in float32, so that a weight is never rounded.
#pragma once
#include "../formats/codes.cuh"
#include "../sizes.h"

namespace lab {

// Tiles: of 8 rows of x. R: tiles of 16 rows of w. Warps: that share k. U: segments of each row that a warp has
// in flight. Parts: rows of w for one output (gate and up: 2), n rows apart. Staged: KiB of x that a block holds.
template <int Tiles_, int R_, int Warps_, int U_, int Parts_, int Staged>
struct PackedShape {
  static constexpr int kTiles = Tiles_, R = R_, kWarps = Warps_, U = U_, kParts = Parts_, kStaged = Staged;
  static constexpr int kThreads = 32 * Warps_, kTileOutputs = 16 / Parts_, kOutputs = R * kTileOutputs;
  static constexpr int kSums = 16 * R + 4;  // floats between two columns of partial sums: no bank conflicts
  // Blocks that a multiprocessor runs at once. (The registers must allow it: see the kernels' launch bounds.)
  static constexpr int kResident = Tiles_ == 1 ? 16 / Warps_ : 1;
};

template <typename T, typename C>
struct alignas(16) PackedSmem {
  // Two sets of sums take turns, so that one barrier each is enough.
  float partial[2][C::kWarps][C::kTiles * 8][C::kSums];
  alignas(16) T x[8];  // really `rows` rows of staged columns: see packed_smem_bytes()
};

// Segments of x that a block holds at a time: all, unless they take more than kStaged; whole rounds of loads.
template <typename F, typename C>
LAB_HOST_DEVICE int staged_segments(int rows, int k) {
  constexpr int kRound = C::kWarps * C::U;
  const int all = Layout<F>::segments(k);
  const int most = C::kStaged * 1024 / (rows * Layout<F>::kColumns * 2) / kRound * kRound;
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

// The numbers of a run of a tile of 16 rows of w, of both of the lane's rows.
template <typename F, typename T>
LAB_DEVICE void unpack_run(uint32_t (&pairs)[2][4], const UnitWords<F> (&words)[2],
                           const typename Layout<F>::Scales (&scales)[2], int run) {
  LAB_UNROLL
  for (int side = 0; side < 2; ++side) {
    float zero = 0.f;
    if constexpr (F::kZero) zero = scales[side].second(run / Layout<F>::kRunsPerGroup, 0);
    F::template numbers<T>(pairs[side], run_words<F>(words[side], run).v, F::template zero_pair<T>(zero));
  }
}

template <typename T_, typename F, typename C_>
struct PackedRows {
  using T = T_;
  using C = C_;
  using L = Layout<F>;
  static constexpr int kThreads = C::kThreads, kResident = C::kResident, kOutputs = C::kOutputs;
  static constexpr int U = C::U, R = C::R;
  using Scales = typename L::Scales;

  PackedSmem<T, C>& shared;
  const T* x;
  PackedWeights w;
  int rows, n, k, segments;  // segments: of a row of w
  int lane, g, t, warp;      // g, t: row and quarter of the lane in a tensor core's tile
  int place;                 // of a segment in its span: the same for all segments of a warp
  int output;                // first of the block's outputs that are summed now
  int stride, panel, staged = -1, turn = 0;
  int fetch_output, fetch_segment;                  // where the next loads read
  const uint8_t *codes_of[R][2], *scales_of[R][2];  // of rows g and g + 8 of each tile
  UnitWords<F> words[U][R][2];
  Scales scales[U][R][2];
  float acc[R][C::kTiles][4];
  float row_scale[R][2], next_scale[R][2];  // in this set of outputs and the next; 1 where groups have scales

  explicit LAB_DEVICE PackedRows(const PackedProduct<T>& p)
      : shared(smem<PackedSmem<T, C>>()), x(p.x), w(p.w), rows(p.rows), n(p.n), k(p.k) {
    segments = L::segments(k);
    stride = staged_stride<F, C>(rows, k), panel = staged_segments<F, C>(rows, k);
    lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    static_assert(C::kWarps % L::kSpan == 0, "rounds of loads begin with whole spans");
    place = warp % L::kSpan;
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
    take_row_scales();
  }
  LAB_DEVICE bool more() const { return output < n; }
  LAB_DEVICE void next() {
    output += gridDim.x * kOutputs;
    if (more()) take_row_scales();
  }

  // The sums of the present outputs; all threads must call it. each_output() then reads them.
  LAB_DEVICE void multiply() {
    LAB_UNROLL
    for (int r = 0; r < R; ++r) {
      LAB_UNROLL
      for (int tile = 0; tile < C::kTiles; ++tile) {
        LAB_UNROLL
        for (int i = 0; i < 4; ++i) acc[r][tile][i] = 0.f;
      }
    }
    for (int begin = 0; begin < segments; begin += panel) {
      if (staged != begin) stage(begin);
      const int end = min(segments, begin + panel);
      for (int first = begin; first < end; first += C::kWarps * U) {
        LAB_UNROLL
        for (int u = 0; u < U; ++u) {
          const int segment = first + u * C::kWarps + warp;
          if (segment < end) add(u, segment - begin);
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
        if (b >= rows) continue;
        LAB_UNROLL
        for (int r = 0; r < R; ++r) {
          partial[warp][b][r * 16 + g + i / 2 * 8] = acc[r][tile][i] * row_scale[r][i / 2];
        }
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
      const int row = r / C::kTileOutputs * 16 + r % C::kTileOutputs;
      float sum = 0.f, second = 0.f;
      LAB_UNROLL
      for (int s = 0; s < C::kWarps; ++s) {
        sum += partial[s][b][row];
        if constexpr (C::kParts == 2) second += partial[s][b][row + 8];
      }
      use(output + r, b, sum, second);
    }
    turn ^= 1;
  }

 private:
  // The row of w that row g (side = 0) or g + 8 (side = 1) of tile r stands for. Rows past the end repeat the
  // last one; their sums are never stored.
  LAB_DEVICE int row_of(int first, int r, int side) const {
    if constexpr (C::kParts == 2) return side * n + min(first + 8 * r + g, n - 1);
    return min(first + 16 * r + g + 8 * side, n - 1);
  }
  LAB_DEVICE void aim(int to) {
    fetch_output = to;
    fetch_segment = to < n ? 0 : segments;
    LAB_UNROLL
    for (int r = 0; r < R; ++r) {
      LAB_UNROLL
      for (int side = 0; side < 2; ++side) {
        const size_t row = row_of(min(to, n - 1), r, side);
        codes_of[r][side] = w.codes + segment_place(row, segments, L::kSegmentBytes) + t * 16;
        scales_of[r][side] = w.scales + segment_place(row, segments / L::kSpan, Scales::kBytes);
      }
    }
  }
  // Together with the first codes of these rows. If they were loaded when those are multiplied, the next codes would
  // be waited for until these have arrived: a warp waits for all loads that share one of its six scoreboards.
  LAB_DEVICE void load_row_scales() {
    LAB_UNROLL
    for (int r = 0; r < R; ++r) {
      LAB_UNROLL
      for (int side = 0; side < 2; ++side) {
        next_scale[r][side] = 1.f;
        if constexpr (F::kGroup == 0) {
          next_scale[r][side] =
              load_now(reinterpret_cast<const float*>(w.scales) + row_of(fetch_output, r, side));
        }
      }
    }
  }
  LAB_DEVICE void take_row_scales() {
    LAB_UNROLL
    for (int r = 0; r < R; ++r) {
      LAB_UNROLL
      for (int side = 0; side < 2; ++side) row_scale[r][side] = next_scale[r][side];
    }
  }
  LAB_DEVICE void advance() {
    if (fetch_segment == 0) load_row_scales();
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
    for (int r = 0; r < R; ++r) {
      LAB_UNROLL
      for (int side = 0; side < 2; ++side) {
        const uint8_t* from = codes_of[r][side] + size_t(segment) * (kBlockRows * L::kSegmentBytes);
        words[u][r][side] = load_unit<F>(from, t);
        if constexpr (F::kGroup != 0) {
          const int span = unsigned(fetch_segment + warp) / L::kSpan + u * (C::kWarps / L::kSpan);
          scales[u][r][side].load_from(scales_of[r][side] + span * (kBlockRows * Scales::kBytes), place);
        }
      }
    }
  }

  // acc += the rows of one segment of w times that segment of all rows of x.
  LAB_DEVICE void add(int u, int segment) {
    // The right operands first, all at once: each is needed for every tile of w, and a load from shared memory
    // takes 30 cycles. Rows of x past the last repeat it; their sums are never stored.
    uint32_t of_x[C::kTiles][L::kRuns][2][2];
    LAB_UNROLL
    for (int tile = 0; tile < C::kTiles; ++tile) {
      const T* row = shared.x + min(tile * 8 + g, rows - 1) * stride + segment * L::kColumns + 4 * t;
      LAB_UNROLL
      for (int run = 0; run < L::kRuns; ++run) {
        LAB_UNROLL
        for (int part = 0; part < 2; ++part) {
          const auto pair = bit_cast<Vec<uint32_t, 2>>(load<4>(row + run * kRunColumns + part * 16));
          of_x[tile][run][part][0] = pair.v[0], of_x[tile][run][part][1] = pair.v[1];
        }
      }
    }
    LAB_UNROLL
    for (int r = 0; r < R; ++r) {
      if constexpr (F::kGroup == 0) {
        LAB_UNROLL
        for (int run = 0; run < L::kRuns; ++run) add_run(acc[r], u, r, run, of_x);
      } else if constexpr (L::kPart == 16) {
        LAB_UNROLL
        for (int run = 0; run < L::kRuns; ++run) add_two_groups(u, r, run, of_x);
      } else {
        LAB_UNROLL
        for (int group = 0; group < L::kGroups; ++group) {
          float sums[C::kTiles][4] = {};
          LAB_UNROLL
          for (int i = 0; i < L::kRunsPerGroup; ++i) add_run(sums, u, r, group * L::kRunsPerGroup + i, of_x);
          add_group(sums, u, r, group, of_x);
        }
      }
    }
  }

  // sums += one run of tile r of w times that run of x, without the scale. The multiplications of a run begin
  // with zeros, so that runs need not wait for each other. (8B's gate and up, int8, one row of x: 44 us, and 44
  // in one chain through the whole row.)
  LAB_DEVICE void add_run(float (&sums)[C::kTiles][4], int u, int r, int run,
                          const uint32_t (&of_x)[C::kTiles][L::kRuns][2][2]) {
    uint32_t pairs[2][4];
    unpack_run<F, T>(pairs, words[u][r], scales[u][r], run);
    float of_run[C::kTiles][4] = {};
    LAB_UNROLL
    for (int part = 0; part < 2; ++part) {
      const int p = 2 * part;
      const uint32_t a[4] = {pairs[0][p], pairs[1][p], pairs[0][p + 1], pairs[1][p + 1]};
      LAB_UNROLL
      for (int tile = 0; tile < C::kTiles; ++tile) mma_m16n8k16(of_run[tile], a, of_x[tile][run][part], T{});
    }
    LAB_UNROLL
    for (int tile = 0; tile < C::kTiles; ++tile) {
      LAB_UNROLL
      for (int i = 0; i < 4; ++i) sums[tile][i] += of_run[tile][i];
    }
  }

  // The same for a run of two groups, scales included: a group is what one multiplication takes.
  LAB_DEVICE void add_two_groups(int u, int r, int run, const uint32_t (&of_x)[C::kTiles][L::kRuns][2][2]) {
    uint32_t pairs[2][4];
    unpack_run<F, T>(pairs, words[u][r], scales[u][r], run);
    LAB_UNROLL
    for (int part = 0; part < 2; ++part) {
      const int p = 2 * part;
      const uint32_t a[4] = {pairs[0][p], pairs[1][p], pairs[0][p + 1], pairs[1][p + 1]};
      float sums[C::kTiles][4] = {};
      LAB_UNROLL
      for (int tile = 0; tile < C::kTiles; ++tile) mma_m16n8k16(sums[tile], a, of_x[tile][run][part], T{});
      add_group(sums, u, r, 2 * run + part, of_x);
    }
  }

  // acc[r] += the scale of a group times the group's sums, and its minimum times the sum of x over the group.
  LAB_DEVICE void add_group(const float (&sums)[C::kTiles][4], int u, int r, int group,
                            const uint32_t (&of_x)[C::kTiles][L::kRuns][2][2]) {
    static_assert(!F::kMinimum || L::kRunsPerGroup > 0, "a minimum is for whole runs");
    float x_sums[C::kTiles][4] = {};
    if constexpr (F::kMinimum) {
      const uint32_t one = pair_of(from_float<T>(1.f)), ones[4] = {one, one, one, one};
      LAB_UNROLL
      for (int i = 0; i < L::kRunsPerGroup; ++i) {
        LAB_UNROLL
        for (int part = 0; part < 2; ++part) {
          LAB_UNROLL
          for (int tile = 0; tile < C::kTiles; ++tile) {
            mma_m16n8k16(x_sums[tile], ones, of_x[tile][group * L::kRunsPerGroup + i][part], T{});
          }
        }
      }
    }
    LAB_UNROLL
    for (int side = 0; side < 2; ++side) {
      const float scale = scales[u][r][side].scale(group, place);
      float minimum = 0.f;
      if constexpr (F::kMinimum) minimum = scales[u][r][side].second(group, place);
      LAB_UNROLL
      for (int tile = 0; tile < C::kTiles; ++tile) {
        LAB_UNROLL
        for (int i = 2 * side; i < 2 * side + 2; ++i) {
          acc[r][tile][i] = fmadd(scale, sums[tile][i], acc[r][tile][i]);
          if constexpr (F::kMinimum) acc[r][tile][i] = fmadd(minimum, x_sums[tile][i], acc[r][tile][i]);
        }
      }
    }
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
  return min(ceil_div(outputs, C::kOutputs), C::kResident * multiprocessors());
}

constexpr int kFewRows = 16;  // of x, that these kernels take

// Calls f with the shape of a launch: f(PackedShape<...>{}).
template <typename F, int Parts, typename Use>
inline void by_packed_shape(int rows, Use&& use) {
  // A block that has more rows of x keeps all of them, where they fit, and has a multiprocessor of its own:
  // to copy them anew for each set of outputs would take longer than the loads of w.
  using Many = PackedShape<2, 2, 8, 2, Parts, 144>;
  if constexpr (kHost) return use(Many{});  // one shape for both, because each costs compile time
  if (rows > 8) return use(Many{});
  // One block of 16 warps, or two of 8. (8B's qkv, o, gate and up, down at one row, H100: fp8 9.3, 6.8, 38.9, 20.6 us
  // with 16 and 10.6, 6.6, 40.0, 21.1 with 8; int4-g128 7.0, 5.1, 27.7, 12.3 and 6.9, 4.7, 22.4, 12.9.)
  use(PackedShape<1, 1, F::kBits == 8 ? 16 : 8, 4, Parts, 64>{});
}

}  // namespace lab
