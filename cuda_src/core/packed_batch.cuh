// Matrix product of 17 to 64 rows of x with packed rows of w (formats/) on tensor cores, and what it has in common
// with the product by Hopper's warpgroups (packed_wgmma.cuh).
//
// As in packed_rows.cuh, codes go from DRAM into registers and become the tensor core's left operand there, and
// sums of one group of columns are multiplied by its scale in float32. But here a warp owns 32 rows of w, and
// the 8 warps of a block go through the same columns together, 128 at a time: so what is read of x, which all
// of them need, is shared by 256 rows of w. It comes to shared memory by a cp.async ring. The blocks of a
// cluster share k, where a matrix is too narrow to give every multiprocessor a block.
#pragma once
#include "packed_rows.cuh"

namespace lab {

// C: the shape of a launch.
template <typename T, typename C>
struct alignas(16) PackedBatchSmem {
  union {
    T x[C::kStages][C::kStage];
    float sums[C::kBatch][C::kSums];  // when the last chunk has been multiplied
  };
};

// Parts: rows of w for one output (gate and up: 2), n rows apart.
template <int Parts_>
struct PackedBatchShape {
  static constexpr int kTiles = 8, kBatch = 8 * kTiles;            // tiles of 8 rows of x
  static constexpr int R = 2, kWarps = 8, kThreads = 32 * kWarps;  // R: tiles of 16 rows of w of a warp
  static constexpr int kResident = 1;   // blocks that a multiprocessor runs at once
  static constexpr int kMostRanks = 4;  // blocks of a cluster
  static constexpr int kParts = Parts_, kTileOutputs = 16 / Parts_, kWarpOutputs = R * kTileOutputs;
  static constexpr int kOutputs = kWarps * kWarpOutputs;
  static constexpr int kChunk = 128;  // columns; one segment of 4 or 6 bits, two of 8
  static constexpr int kStages = 4;   // chunks of x in the ring
  template <typename T>
  using Smem = PackedBatchSmem<T, PackedBatchShape>;
  static constexpr int kStride = kChunk + 16;        // so that four rows of x lie in different banks
  static constexpr int kStage = kBatch * kStride;    // elements of a chunk of x
  static constexpr int kSums = 16 * R * kWarps + 4;  // floats between two columns of sums: no bank conflicts
};

// A block that owns C::kOutputs outputs, all warps of which go through k together: what it multiplies, and its sums
// at the end.
template <typename T_, typename F, typename C_>
struct PackedBlock {
  using T = T_;
  using C = C_;
  using L = Layout<F>;
  using Scales = typename L::Scales;
  static constexpr int kThreads = C::kThreads, kResident = C::kResident, kOutputs = C::kOutputs, R = C::R;
  static constexpr int kSegments = C::kChunk / L::kColumns;  // of a chunk

  typename C::template Smem<T>& shared;
  const T *x, *tiled;
  PackedWeights w;
  int rows, n, k, segments;
  int lane, g, t, warp;    // g, t: row and quarter of the lane in a tensor core's tile
  int rank_, ranks_;       // of this block in its cluster; blocks of a cluster
  int output, begin, end;  // the cluster's first output; this block's chunks of k
  const uint8_t *codes_of[R][2], *scales_of[R][2];  // of rows g and g + 8 of each tile
  float acc[R][C::kTiles][4], row_scale[R][2];      // row_scale: of rows that share one scale; else 1

  explicit LAB_DEVICE PackedBlock(const PackedProduct<T>& p)
      : shared(smem<typename C::template Smem<T>>()), x(p.x), tiled(p.tiled), w(p.w), rows(p.rows), n(p.n),
        k(p.k), rank_(0), ranks_(1) {
    lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    segments = L::segments(k);
#if LAB_SM90
    rank_ = cluster_rank(), ranks_ = cluster_size();
#endif
    output = blockIdx.x / ranks_ * kOutputs;
    const int chunks = (segments + kSegments - 1) / kSegments;
    begin = chunks * rank_ / ranks_, end = chunks * (rank_ + 1) / ranks_;
  }

  LAB_DEVICE bool more() const { return output < n; }
  LAB_DEVICE void next() { output = n; }  // a block has one set of outputs

  // Calls f(output, b, sum, second) for each output of this thread: the sums of the cluster's blocks in a fixed
  // order; second is that of the output's second part. All threads must call it.
  template <typename Use>
  LAB_DEVICE void each_output(Use use) {
    for (int i = threadIdx.x + rank_ * kThreads; i < kOutputs * rows; i += kThreads * ranks_) {
      const int r = i % kOutputs, b = i / kOutputs;
      if (output + r >= n) continue;
      const int row = r / C::kTileOutputs * 16 + r % C::kTileOutputs;
      use(output + r, b, sum(b, row), C::kParts == 2 ? sum(b, row + 8) : 0.f);
    }
    if (ranks_ > 1) sync();  // the other blocks no longer read this one's sums
  }

 protected:
  LAB_DEVICE void clear() {
    LAB_UNROLL
    for (int r = 0; r < R; ++r) {
      LAB_UNROLL
      for (int tile = 0; tile < C::kTiles; ++tile) {
        LAB_UNROLL
        for (int i = 0; i < 4; ++i) acc[r][tile][i] = 0.f;
      }
    }
  }
  // Writes the sums to shared memory, over x; each_output() reads them.
  LAB_DEVICE void share_sums() {
    cp_async_wait<0>();
    __syncthreads();
    LAB_UNROLL
    for (int r = 0; r < R; ++r) {
      LAB_UNROLL
      for (int tile = 0; tile < C::kTiles; ++tile) {
        LAB_UNROLL
        for (int i = 0; i < 4; ++i) {
          shared.sums[tile * 8 + 2 * t + i % 2][warp * 16 * R + r * 16 + g + i / 2 * 8] =
              acc[r][tile][i] * row_scale[r][i / 2];
        }
      }
    }
    sync();
  }

  LAB_DEVICE float sum(int b, int row) const {
#if LAB_SM90
    if (ranks_ > 1) {
      // All loads first: one from another multiprocessor takes as long as one from L2.
      float of[C::kMostRanks], found = 0.f;
      LAB_UNROLL
      for (int peer = 0; peer < C::kMostRanks; ++peer) {
        of[peer] = peer < ranks_ ? *cluster_peer(&shared.sums[b][row], peer) : 0.f;
      }
      LAB_UNROLL
      for (int peer = 0; peer < C::kMostRanks; ++peer) found += of[peer];
      return found;
    }
#endif
    return shared.sums[b][row];
  }
  LAB_DEVICE void sync() const {
#if LAB_SM90
    if (ranks_ > 1) return cluster_sync();
#endif
    __syncthreads();
  }

  // The row of w that row g (side = 0) or g + 8 (side = 1) of tile r stands for. Rows past the end repeat the
  // last one; their sums are never stored.
  LAB_DEVICE int row_of(int r, int side) const {
    const int first = output + warp * C::kWarpOutputs + r * C::kTileOutputs;
    return C::kParts == 2 ? side * n + min(first + g, n - 1) : min(first + g + 8 * side, n - 1);
  }
  LAB_DEVICE void aim() {
    LAB_UNROLL
    for (int r = 0; r < R; ++r) {
      LAB_UNROLL
      for (int side = 0; side < 2; ++side) {
        const size_t row = row_of(r, side);
        codes_of[r][side] = w.codes + segment_place(row, segments, L::kSegmentBytes) + t * 16;
        scales_of[r][side] = w.scales + segment_place(row, segments / L::kSpan, Scales::kBytes);
        row_scale[r][side] = 1.f;
        if constexpr (F::kGroup == 0) {
          row_scale[r][side] = load_now(reinterpret_cast<const float*>(w.scales) + row);
        }
      }
    }
  }
};

template <typename T_, typename F, typename C_>
struct PackedBatch : PackedBlock<T_, F, C_> {
  using Base = PackedBlock<T_, F, C_>;
  using Base::acc, Base::begin, Base::codes_of, Base::end, Base::g, Base::k, Base::kSegments;
  using Base::Base;
  using Base::kThreads, Base::R, Base::rows, Base::scales_of, Base::segments, Base::shared, Base::t, Base::x;
  using typename Base::C, typename Base::L, typename Base::Scales, typename Base::T;

  // Chunks of codes in registers; one of them is multiplied. Three of longer codes would not fit.
  static constexpr int U = F::kBits == 4 ? 3 : 2;
  UnitWords<F> words[U][kSegments][R][2];
  Scales scales[U][kSegments][R][2];

  // Issues the first loads, which are of weights and so depend on no earlier kernel, waits for the preceding
  // kernel, and issues the first copies of x.
  LAB_DEVICE void start() {
    this->aim();
    LAB_UNROLL
    for (int u = 0; u < U; ++u) fetch(u, begin + u);
    if (end - begin <= U) pdl_launch_dependents();  // no more loads of weights follow
    pdl_wait();
    for (int i = 0; i < C::kStages - 1; ++i) copy_x(begin + i);
  }

  // The sums of the outputs; all threads must call it. each_output() then reads them.
  LAB_DEVICE void multiply() {
    this->clear();
    for (int first = begin; first < end; first += U) {
      LAB_UNROLL
      for (int u = 0; u < U; ++u) {
        const int chunk = first + u;
        if (chunk < end) {
          cp_async_wait<C::kStages - 2>();
          __syncthreads();  // x of this chunk is there for all, and nobody reads the chunk before it
          copy_x(chunk + C::kStages - 1);
          LAB_UNROLL
          for (int s = 0; s < kSegments; ++s) add(u, chunk, s);
        }
        fetch(u, chunk + U);
        // The dependent kernel may launch once the last loads of weights have been issued.
        if (chunk + U + 1 == end) pdl_launch_dependents();
      }
    }
    this->share_sums();
  }

 private:
  LAB_DEVICE void fetch(int u, int chunk) {
    if (chunk >= end) return;
    LAB_UNROLL
    for (int s = 0; s < kSegments; ++s) {
      const int segment = chunk * kSegments + s;
      if (segment >= segments) return;
      LAB_UNROLL
      for (int r = 0; r < R; ++r) {
        LAB_UNROLL
        for (int side = 0; side < 2; ++side) {
          words[u][s][r][side] =
              load_unit<F>(codes_of[r][side] + size_t(segment) * (kBlockRows * L::kSegmentBytes), t);
          if constexpr (F::kGroup != 0) {
            scales[u][s][r][side].load_from(
                scales_of[r][side] + size_t(segment / L::kSpan) * (kBlockRows * Scales::kBytes),
                segment % L::kSpan);
          }
        }
      }
    }
  }

  // Copies a chunk of all rows of x to its place in the ring, with zeros past k.
  LAB_DEVICE void copy_x(int chunk) {
    if (chunk < end) {
      T* to = shared.x[(chunk - begin) % C::kStages];
      for (int i = threadIdx.x; i < rows * (C::kChunk / 8); i += kThreads) {
        const int b = i / (C::kChunk / 8), col = i % (C::kChunk / 8) * 8, from = chunk * C::kChunk + col;
        const T* row = x + size_t(b) * k;
        if (k % 8 == 0) {
          cp_async16(to + b * C::kStride + col, from < k ? row + from : x, from < k);
        } else {
          LAB_UNROLL
          for (int e = 0; e < 8; ++e)
            to[b * C::kStride + col + e] = from + e < k ? row[from + e] : from_float<T>(0.f);
        }
      }
    }
    cp_async_commit();
  }

  // acc += a segment of the warp's rows of w times those columns of all rows of x.
  LAB_DEVICE void add(int u, int chunk, int s) {
    const int segment = chunk * kSegments + s;
    if (segment >= segments) return;
    const T* columns = shared.x[(chunk - begin) % C::kStages] + s * L::kColumns;
    if constexpr (F::kGroup == 0) {
      LAB_UNROLL
      for (int step = 0; step < 2 * L::kRuns; ++step) add_step(acc, nullptr, u, s, step, columns);
    } else {
      LAB_UNROLL
      for (int group = 0; group < L::kGroups; ++group) add_group(u, s, group, segment % L::kSpan, columns);
    }
  }

  // acc += the scale of a group times the group's sums, and its minimum times the sum of x over the group.
  LAB_DEVICE void add_group(int u, int s, int group, int place, const T* columns) {
    constexpr int kSteps = L::kPart / 16;  // of 16 columns, which is what one multiplication takes
    // Tiles of x whose sums a thread holds at once. A long group has all, so that its numbers are unpacked once
    // and thrown away step by step; a short one keeps its numbers, and needs no registers for sums.
    constexpr int kHeld = kSteps > 2 ? C::kTiles : 1;
    LAB_UNROLL
    for (int held = 0; held < C::kTiles; held += kHeld) {
      if (held * 8 >= rows) continue;
      float sums[R][kHeld][4] = {}, x_sums[kHeld][4] = {};
      LAB_UNROLL
      for (int i = 0; i < kSteps; ++i) add_step(sums, x_sums, u, s, group * kSteps + i, columns, held);
      LAB_UNROLL
      for (int r = 0; r < R; ++r) {
        LAB_UNROLL
        for (int side = 0; side < 2; ++side) {
          const float scale = scales[u][s][r][side].scale(group, place);
          float minimum = 0.f;
          if constexpr (F::kMinimum) minimum = scales[u][s][r][side].second(group, place);
          LAB_UNROLL
          for (int tile = 0; tile < kHeld; ++tile) {
            auto& to = acc[r][held + tile];
            LAB_UNROLL
            for (int i = 2 * side; i < 2 * side + 2; ++i) {
              to[i] = fmadd(scale, sums[r][tile][i], to[i]);
              if constexpr (F::kMinimum) to[i] = fmadd(minimum, x_sums[tile][i], to[i]);
            }
          }
        }
      }
    }
  }

  // sums += step `step` of a segment, 16 columns, of w times that of x, for the tiles of x from `held` on; without
  // scales. x_sums += x over these columns, where a format has a minimum.
  template <int Held>
  LAB_DEVICE void add_step(float (&sums)[R][Held][4], float (*x_sums)[4], int u, int s, int step,
                           const T* columns, int held = 0) {
    const int run = step / 2, part = step % 2;
    uint32_t a[R][4];
    LAB_UNROLL
    for (int r = 0; r < R; ++r) {
      // The compiler unpacks a run once for both of its steps, and a short group once for all tiles.
      uint32_t pairs[2][4];
      unpack_run<F, T>(pairs, words[u][s][r], scales[u][s][r], run);
      a[r][0] = pairs[0][2 * part], a[r][1] = pairs[1][2 * part];
      a[r][2] = pairs[0][2 * part + 1], a[r][3] = pairs[1][2 * part + 1];
    }
    LAB_UNROLL
    for (int tile = 0; tile < Held; ++tile) {
      if ((held + tile) * 8 >= rows) continue;
      // Rows of x past the last repeat it; their sums are never stored.
      const int b = min((held + tile) * 8 + g, rows - 1);
      const auto x = bit_cast<Vec<uint32_t, 2>>(
          load<4>(columns + b * C::kStride + run * kRunColumns + part * 16 + 4 * t));
      LAB_UNROLL
      for (int r = 0; r < R; ++r) mma_m16n8k16(sums[r][tile], a[r], {x.v[0], x.v[1]}, T{});
      if constexpr (F::kMinimum) {
        const uint32_t one = pair_of(from_float<T>(1.f)), ones[4] = {one, one, one, one};
        mma_m16n8k16(x_sums[tile], ones, {x.v[0], x.v[1]}, T{});
      }
    }
  }
};

constexpr int kMostPackedRows = 64;  // of x, in one launch

// Blocks of a cluster: as many as run at once, up to C::kMostRanks, each with two chunks of k or more. They lie in one
// of the groups into which a GPU divides its multiprocessors: on an H100 8 groups of 14 to 18. Clusters that find no
// place begin when others have ended.
template <typename C>
inline unsigned batch_cluster(int outputs, int k) {
  const int blocks = ceil_div(outputs, C::kOutputs), chunks = ceil_div(k, C::kChunk);
  const int groups = max(multiprocessors() / 16, 1);
  int ranks = 1;
  for (int more = 2; has_clusters() && more <= C::kMostRanks && chunks >= 2 * more; ++more) {
    if (blocks <= groups * (14 / more)) ranks = more;
  }
  return unsigned(ranks);
}

}  // namespace lab
