// Matrix product of up to 64 rows of x with many rows of w on tensor cores; both operands pass through shared
// memory. The core of linear and of the fused ops for more than 2 rows of float16 or bfloat16.
//
// The multiply instruction has one operand of 16 or 64 rows and a narrower one. w is the wide operand and x
// the narrow one ("swap AB"), so that few rows of x waste little of it. Teams of threads share k: each has a
// cp.async pipeline of its own, and they meet at no barrier of the block before the end. A team is a warp
// (mma.sync), or on Hopper a warpgroup, which multiplies directly from shared memory (wgmma); with warpgroups
// the blocks of a cluster may share k as well. An output is the dot product of a row of x with one row of w,
// or with Parts rows of w that lie n rows apart (gate and up).
#pragma once
#include "../common.cuh"
#include "../settings.h"
#include "../sizes.h"
#include "wgmma.cuh"

namespace lab {

// The shape of a launch; by_mma_shape, below, lists the shapes that are compiled. M: tiles of 16 rows of w in
// a block. B: tiles of 8 rows of x. A stage holds 64 elements (128 bytes) of each row, so a block takes (16 M
// + 8 B) * 128 * Stages * Teams bytes of shared memory. Aligned: every row begins at a multiple of 16 bytes.
// Wgmma: teams are warpgroups, and M is 4.
template <int M_, int B_, int Teams, int Stages, bool Aligned, int Parts = 1, bool Wgmma = false>
struct Mma {
  static constexpr int M = M_, B = B_, kTeams = Teams, kStages = Stages, kParts = Parts;
  static constexpr int kTeam = Wgmma ? 128 : 32, kThreads = Teams * kTeam;
  static constexpr bool kAligned = Aligned, kWgmma = Wgmma;
  static constexpr int kRows = M * 16, kBatch = B * 8, kDepth = 64;
  static constexpr int kOutputs = kRows / Parts;  // outputs of a block for each row of x
  static constexpr int kSums = Wgmma ? 1 : M;     // tiles of 16 rows whose sums a thread holds a part of
  static_assert(!Wgmma || M == 4, "a warpgroup multiplies 64 rows of w");
};

template <typename T, typename C>
struct MmaSmem {
  union {
    T tile[C::kTeams][C::kStages][C::kRows + C::kBatch][C::kDepth];  // the rows of w, then the rows of x
    // Padded by 4: no bank conflicts when a warp stores.
    float partial[C::kTeams][C::kBatch][C::kRows + 4];
  };
};

template <typename T, typename C>
struct MmaRows {
  static constexpr int N = Vec<T>::size, kDepth = C::kDepth, kAhead = C::kStages - 1;
  // Outputs of a thread, without a cluster.
  static constexpr int kMine = C::kOutputs * C::kBatch / C::kThreads;
  static_assert(kMine * C::kThreads == C::kOutputs * C::kBatch, "threads share the outputs evenly");
  MmaSmem<T, C>& shared;
  const T *w, *x;
  int n, k, rows, lane, warp, team, output0, chunks, rank_, ranks_;
  float acc[C::kSums][C::B][4] = {};

  // w has Parts * n rows of k elements. The blocks of a cluster (without one, this block) own kOutputs
  // outputs, from output0 on. The teams of these blocks take turns at the 64-element chunks of k: each takes
  // every (ranks * kTeams)th.
  LAB_DEVICE MmaRows(MmaSmem<T, C>& shared_, const T* x_, const T* w_, int rows_, int n_, int k_)
      : shared(shared_), w(w_), x(x_), n(n_), k(k_), rows(rows_) {
    lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    team = threadIdx.x / C::kTeam;
    if constexpr (C::kWgmma) {
#if LAB_WGMMA
      rank_ = cluster_rank();
      ranks_ = cluster_size();
#else
      // Never launched where wgmma is not compiled: has_wgmma() is false.
      __trap();
#endif
    }
    output0 = blockIdx.x / ranks() * C::kOutputs;
    chunks = (k + kDepth - 1) / kDepth;
  }

  // Issues the copies of the first stages of w. w depends on no earlier kernel, so call this before
  // pdl_wait(), and start_x() after it.
  LAB_DEVICE void start_w() {
    for (int i = 0; i < kAhead; ++i) copy_w(i);
  }
  LAB_DEVICE void start_x() {
    for (int i = 0; i < kAhead; ++i) {
      copy_x(i);
      cp_async_commit();
    }
  }

  // acc += w x^T over this team's share of k. kAhead stages are in flight while one is multiplied.
  LAB_DEVICE void multiply() {
    for (int i = 0; chunk(i) < chunks; ++i) {
      const auto* tile = shared.tile[team][i % C::kStages];
      cp_async_wait<kAhead - 1>();
      // Stage i is visible to the team, and none still reads stage i - 1.
      meet();
      if constexpr (C::kWgmma) {
        start_wgmma(tile);  // runs while the next copies are issued
        issue(i + kAhead);
        finish_wgmma();
      } else {
        issue(i + kAhead);
        multiply(tile);
      }
    }
  }

  // Writes the sums of the teams to shared memory, over the tiles; when it returns, product() may be called.
  LAB_DEVICE void reduce() {
    const int g = lane / 4, t = lane % 4;
    cp_async_wait<0>();
    __syncthreads();
    LAB_UNROLL
    for (int m = 0; m < C::kSums; ++m) {
      const int row = C::kWgmma ? warp % 4 * 16 : m * 16;
      LAB_UNROLL
      for (int b = 0; b < C::B; ++b) {
        LAB_UNROLL
        for (int i = 0; i < 4; ++i)
          shared.partial[team][b * 8 + 2 * t + i % 2][row + g + i / 2 * 8] = acc[m][b][i];
      }
    }
    sync();
  }

  // Dot product of row r of the block's rows of w with row b of x: the sums of all teams and blocks, added in
  // a fixed order.
  LAB_DEVICE float product(int r, int b) const {
    float sum = 0.f;
#if LAB_WGMMA
    if (ranks() > 1) {
      for (int peer = 0; peer < ranks(); ++peer) {
        LAB_UNROLL
        for (int s = 0; s < C::kTeams; ++s) sum += *cluster_peer(&shared.partial[s][b][r], peer);
      }
      return sum;
    }
#endif
    LAB_UNROLL
    for (int s = 0; s < C::kTeams; ++s) sum += shared.partial[s][b][r];
    return sum;
  }

  // Calls f(j, r, output, b) for each of this thread's kMine places j that holds an output. The parts of the
  // output are the dot products of rows r, r + kOutputs.
  template <typename F>
  LAB_DEVICE void each_output(F f) const {
    LAB_UNROLL
    for (int j = 0; j < kMine; ++j) {
      const int i = place(j), r = i % C::kOutputs, b = i / C::kOutputs;
      if (output0 + r < n && b < rows) f(j, r, output0 + r, b);
    }
  }

  // Calls f(j, b, lanes) for each of this thread's kMine places j, whether it holds an output or not. `lanes`
  // neighbouring threads have outputs of the same row b of x.
  template <typename F>
  LAB_DEVICE void each_row(F f) const {
    constexpr int kLanes = C::kOutputs < 32 ? C::kOutputs : 32;
    LAB_UNROLL
    for (int j = 0; j < kMine; ++j) f(j, place(j) / C::kOutputs, kLanes);
  }

  // Call it last: it waits until the other blocks of the cluster no longer read this block's sums.
  LAB_DEVICE void finish() const {
    if (ranks() > 1) sync();
  }

 private:
  // Rank of this block in its cluster, and the number of blocks in the cluster; constants where there are no
  // clusters.
  LAB_DEVICE int rank() const { return C::kWgmma ? rank_ : 0; }
  LAB_DEVICE int ranks() const { return C::kWgmma ? ranks_ : 1; }
  // Index of this thread's output j among the outputs of the block or cluster, which are in the order of the
  // rows of x.
  LAB_DEVICE int place(int j) const { return threadIdx.x + (j * ranks() + rank()) * C::kThreads; }
  LAB_DEVICE int chunk(int i) const { return rank() * C::kTeams + team + i * ranks() * C::kTeams; }

  // Barrier of the team. When it returns, what its threads have copied can be multiplied, and what was
  // multiplied before can be overwritten.
  LAB_DEVICE void meet() const {
#if LAB_WGMMA
    if constexpr (C::kWgmma) {
      wgmma_publish();
      return named_barrier(1 + team, C::kTeam);
    }
#endif
    __syncwarp();
  }
  LAB_DEVICE void sync() const {
#if LAB_WGMMA
    if (ranks() > 1) return cluster_sync();
#endif
    __syncthreads();
  }

  // Place of the 16-byte chunk c of a row. For wgmma it is the 128-byte swizzle. For mma.sync the two 64-byte
  // parts of odd rows are exchanged: 8 lanes at a time read 64 bytes of two neighbouring rows, and so touch
  // every bank once.
  LAB_DEVICE static int swizzle(int row, int c) { return C::kWgmma ? c ^ row % 8 : c ^ (row % 2 * 4); }

  LAB_DEVICE void start_wgmma(const T (*tile)[kDepth]) {
#if LAB_WGMMA
    wgmma_begin();
    LAB_UNROLL
    for (int col = 0; col < kDepth; col += 16) wgmma(acc[0], &tile[0][col], &tile[C::kRows][col]);
    wgmma_commit();
#endif
  }
  LAB_DEVICE void finish_wgmma() {
#if LAB_WGMMA
    wgmma_wait<0>();
#endif
  }
  LAB_DEVICE void multiply(const T (*tile)[kDepth]) {
    // A lane takes 8 neighbouring elements of k from each row, enough for two multiplies. Any assignment of
    // elements to the columns of the multiply is right, as long as w and x use the same.
    const int g = lane / 4, t = lane % 4;
    const auto fragment = [&](int row, int half) {
      return bit_cast<uint4>(load(&tile[row][swizzle(row, half * 4 + t) * N]));
    };
    LAB_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint4 low[C::M], high[C::M];
      LAB_UNROLL
      for (int m = 0; m < C::M; ++m) {
        low[m] = fragment(m * 16 + g, half);
        high[m] = fragment(m * 16 + 8 + g, half);
      }
      LAB_UNROLL
      for (int b = 0; b < C::B; ++b) {
        const uint4 v = fragment(C::kRows + b * 8 + g, half);
        LAB_UNROLL
        for (int m = 0; m < C::M; ++m) {
          mma_m16n8k16(acc[m][b], {low[m].x, high[m].x, low[m].y, high[m].y}, {v.x, v.y}, T{});
          mma_m16n8k16(acc[m][b], {low[m].z, high[m].z, low[m].w, high[m].w}, {v.z, v.w}, T{});
        }
      }
    }
  }

  // A thread copies chunk c of every (kTeam / 8)th row, so that its place in the swizzle never changes. What
  // lies outside the matrix becomes zero.
  LAB_DEVICE void copy(T (*tile)[kDepth], const T* from, int count, int limit, int chunk) {
    constexpr int kStep = C::kTeam / 8;
    const int c = threadIdx.x % 8, row = threadIdx.x % C::kTeam / 8, col = chunk * kDepth + c * N;
    const T* source = from + size_t(row) * k + col;
    T* target = &tile[row][swizzle(row, c) * N];
    const int valid_rows = col < k ? limit - row : 0;
    LAB_UNROLL
    for (int i = 0; i < count; i += kStep, source += kStep * size_t(k), target += kStep * kDepth) {
      const bool valid = i < valid_rows;
      if constexpr (C::kAligned) {
        cp_async16(target, source, valid);
      } else {
        Vec<T> v{};
        LAB_UNROLL
        for (int e = 0; e < N; ++e) {
          if (valid && col + e < k) v.v[e] = source[e];
        }
        store(target, v);
      }
    }
  }
  LAB_DEVICE void issue(int i) {
    copy_w(i);
    copy_x(i);
    cp_async_commit();
    // The dependent kernel may launch once this team has issued its last copy: see RowStream::release().
    if (chunk(i + 1) >= chunks) pdl_launch_dependents();
  }
  LAB_DEVICE void copy_w(int i) {
    if (chunk(i) >= chunks) return;
    LAB_UNROLL
    for (int part = 0; part < C::kParts; ++part) {
      copy(shared.tile[team][i % C::kStages] + part * C::kOutputs, w + (size_t(part) * n + output0) * k,
           C::kOutputs, n - output0, chunk(i));
    }
  }
  LAB_DEVICE void copy_x(int i) {
    if (chunk(i) < chunks) copy(shared.tile[team][i % C::kStages] + C::kRows, x, C::kBatch, rows, chunk(i));
  }
};

// by_mma_shape calls f with the shape of a launch, a type in a tag, and the number of blocks in a cluster:
// `using C = typename decltype(shape)::type;`. mma_config makes the launch configuration from them.
template <typename C>
struct MmaShape {
  using type = C;
};
template <typename C>
inline Config mma_config(int n, unsigned cluster, size_t smem_bytes, Ptr stream) {
  return {dim3(ceil_div(n, C::kOutputs) * cluster), dim3(C::kThreads), smem_bytes, stream, true, cluster};
}

// clang-format off
// The shapes. A name says the most rows of x of a launch; the comment says why the shape is as it is. With
// more rows of w in a block, x is read less often from L2; with fewer there are more blocks.
//                              M  B  teams  stages

// For rows of any length: elements are copied one by one.
template <int Parts>
struct Unaligned : Mma<         2, 8, 4,     3, /*Aligned=*/false, Parts> {};  // 144 KiB

// 16 rows of w in a block give the most blocks, which narrow matrices need.
template <int Parts>
struct UpTo16Narrow : Mma<      1, 2, 4,     4, /*Aligned=*/true, Parts> {};  // 64 KiB
// The same for long rows, where 24 KiB in flight are too few. H100, 8B at batch 16: o takes 11.8 us instead
// of 13.2.
template <int Parts>
struct UpTo16NarrowLong : Mma<  1, 2, 4,     7, /*Aligned=*/true, Parts> {};  // 112 KiB
// For matrices that give each multiprocessor of an H100 two blocks even with 32 rows in a block.
template <int Parts>
struct UpTo16Wide : Mma<        2, 2, 4,     3, /*Aligned=*/true, Parts> {};  // 72 KiB
template <int Parts>
struct UpTo32 : Mma<            2, 4, 4,     3, /*Aligned=*/true, Parts> {};  // 96 KiB
template <int Parts>
struct UpTo64Narrow : Mma<      2, 8, 4,     3, /*Aligned=*/true, Parts> {};  // 144 KiB
template <int Parts>
struct UpTo64Wide : Mma<        4, 8, 2,     3, /*Aligned=*/true, Parts> {};  // 96 KiB

// wgmma. H100, 8B at batch 64, with mma.sync and with wgmma: gate and up 96.0 and 85.6 us, qkv 27.2 and 20.6,
// down 46.1 and 44.7, o 14.8 and 15.5. If there are many blocks they are small, so that two fit on a
// multiprocessor; otherwise they are large.
template <int Parts>
struct WgmmaUpTo32Small : Mma<  4, 4, 2,     4, /*Aligned=*/true, Parts, /*Wgmma=*/true> {};  // 96 KiB
template <int Parts>
struct WgmmaUpTo32Large : Mma<  4, 4, 2,     6, /*Aligned=*/true, Parts, /*Wgmma=*/true> {};  // 144 KiB
template <int Parts>
struct WgmmaUpTo64Small : Mma<  4, 8, 2,     3, /*Aligned=*/true, Parts, /*Wgmma=*/true> {};  // 96 KiB
template <int Parts>
struct WgmmaUpTo64Large : Mma<  4, 8, 2,     5, /*Aligned=*/true, Parts, /*Wgmma=*/true> {};  // 160 KiB
// clang-format on

// The host build takes the second of two shapes that differ in the number of stages alone.
template <typename OnGpu, typename OnCpu>
using MoreStages = MmaShape<std::conditional_t<kHost, OnCpu, OnGpu>>;

template <typename T, int Parts, typename F>
inline void by_mma_shape(int rows, int n, int k, const Settings& tuned, F&& f) {
  const auto clusters_of = [&](unsigned cluster, auto shape) {
    if constexpr (kHasGpuShapes) {
      f(shape, cluster);
    } else {
      throw std::logic_error(kNoGpuShapes);
    }
  };
  const auto alone = [&](auto shape) { clusters_of(1, shape); };
  const bool aligned = k % Vec<T>::size == 0;
  if (!aligned) return alone(MmaShape<Unaligned<Parts>>{});

  // wgmma needs many rows of x, and enough blocks or long rows. For a small matrix with long rows, two blocks
  // share k.
  const int blocks = ceil_div(n * Parts, 64);
  if (rows > 16 && has_wgmma() && (3 * blocks > 2 * multiprocessors() || k >= 8192)) {
    const bool many = blocks > multiprocessors();
    const unsigned cluster = 2 * blocks <= multiprocessors() && k >= 8192 ? 2 : 1;
    const auto clustered = [&](auto shape) { clusters_of(cluster, shape); };
    if (rows <= 32 && many) return clustered(MmaShape<WgmmaUpTo32Small<Parts>>{});
    if (rows <= 32) return clustered(MoreStages<WgmmaUpTo32Large<Parts>, WgmmaUpTo32Small<Parts>>{});
    if (many) return clustered(MmaShape<WgmmaUpTo64Small<Parts>>{});
    return clustered(MoreStages<WgmmaUpTo64Large<Parts>, WgmmaUpTo64Small<Parts>>{});
  }

  if (rows <= 16) {
    const bool wide = tuned.tiles ? tuned.tiles > 1 : n * Parts >= 32 * 2 * 132;
    const bool is_long = tuned.stages ? tuned.stages == 7 : k >= 1536;
    if (wide) return alone(MmaShape<UpTo16Wide<Parts>>{});
    if (is_long) return alone(MoreStages<UpTo16NarrowLong<Parts>, UpTo16Narrow<Parts>>{});
    return alone(MmaShape<UpTo16Narrow<Parts>>{});
  }
  if (rows <= 32) return alone(MmaShape<UpTo32<Parts>>{});
  if (n * Parts < 64 * 240) return alone(MmaShape<UpTo64Narrow<Parts>>{});
  alone(MmaShape<UpTo64Wide<Parts>>{});
}

}  // namespace lab
