// Up to 64 rows of x times many rows of w on tensor cores, both operands through shared memory: the core of linear and
// of the fused ops for larger batches of float16 and bfloat16.
//
// The 16-row operand of the multiply is w, and x the 8-column one ("swap AB"), so that few rows of x waste little.
// Warps share k, each with a cp.async pipeline of its own and no barrier before the end. An output is the product of a
// row of x with a row of w, or with Parts rows of w that lie n rows apart (gate and up).
#pragma once
#include "common.cuh"
#include "settings.h"
#include "sizes.h"

namespace lab {

// M: tiles of 16 rows of w. B: tiles of 8 rows of x. A stage holds 64 elements (128 bytes) of each row. Aligned: rows
// begin at multiples of 16 bytes.
template <int M_, int B_, int Warps, int Stages, bool Aligned, int Parts = 1>
struct Mma {
  static constexpr int M = M_, B = B_, kWarps = Warps, kStages = Stages, kParts = Parts, kThreads = Warps * 32;
  static constexpr bool kAligned = Aligned;
  static constexpr int kRows = M * 16, kBatch = B * 8, kDepth = 64;
  static constexpr int kOutputs = kRows / Parts;  // of a block, for each row of x
};

template <typename T, typename C>
struct MmaSmem {
  union {
    T tile[C::kWarps][C::kStages][C::kRows + C::kBatch][C::kDepth];  // rows of w, then rows of x
    float partial[C::kWarps][C::kBatch][C::kRows + 4];               // 4 more: a warp's stores meet no bank twice
  };
};

// Place of the 16-byte chunk c of a row: odd rows swap their halves, so that the 8 lanes of a phase, which read 64
// bytes of two neighbouring rows, meet every bank once.
LAB_DEVICE int swizzle(int row, int c) { return c ^ (row % 2 * 4); }

template <typename T, typename C>
struct MmaRows {
  static constexpr int N = Vec<T>::size, kDepth = C::kDepth, kAhead = C::kStages - 1;
  static constexpr int kMine = C::kOutputs * C::kBatch / C::kThreads;   // outputs of a thread
  static_assert(kMine * C::kThreads == C::kOutputs * C::kBatch, "threads share the outputs evenly");
  MmaSmem<T, C>& shared;
  const T *w, *x;
  int n, k, rows, lane, warp, output0, chunks;
  float acc[C::M][C::B][4] = {};

  // w has Parts * n rows of k; the block owns kOutputs outputs, from output0 on. Warp i takes the 64-element chunks i,
  // i + kWarps, ... of k.
  LAB_DEVICE MmaRows(MmaSmem<T, C>& shared_, const T* x_, const T* w_, int rows_, int n_, int k_)
      : shared(shared_), w(w_), x(x_), n(n_), k(k_), rows(rows_) {
    lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    output0 = blockIdx.x * C::kOutputs;
    chunks = (k + kDepth - 1) / kDepth;
  }

  // The first stages of w, which depends on no earlier kernel: call it before pdl_wait(). Then start_x() after it.
  LAB_DEVICE void start_w() {
    for (int i = 0; i < kAhead; ++i) copy_w(i);
  }
  LAB_DEVICE void start_x() {
    for (int i = 0; i < kAhead; ++i) {
      copy_x(i);
      cp_async_commit();
    }
  }

  // acc += w x^T over this warp's share of k. kAhead stages are in flight while one is multiplied.
  LAB_DEVICE void multiply() {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; warp + i * C::kWarps < chunks; ++i) {
      cp_async_wait<kAhead - 1>();
      __syncwarp();                               // stage i has landed for all lanes, and all are done with stage i - 1
      copy_w(i + kAhead);
      copy_x(i + kAhead);
      cp_async_commit();
      // The next kernel may come once this warp has sent for its last chunk: see RowStream::release.
      if (warp + (i + kAhead + 1) * C::kWarps >= chunks) pdl_launch_dependents();
      const auto* tile = shared.tile[warp][i % C::kStages];
      // A lane takes 8 neighbouring elements of k from each row, enough for two multiplies: which column of the
      // multiply an element plays is free, as long as w and x agree.
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
  }

  // Puts the warps' sums where the tiles were; product() may be called when it returns.
  LAB_DEVICE void reduce() {
    const int g = lane / 4, t = lane % 4;
    cp_async_wait<0>();
    __syncthreads();
    LAB_UNROLL
    for (int m = 0; m < C::M; ++m) {
      LAB_UNROLL
      for (int b = 0; b < C::B; ++b) {
        LAB_UNROLL
        for (int i = 0; i < 4; ++i) shared.partial[warp][b * 8 + 2 * t + i % 2][m * 16 + g + i / 2 * 8] = acc[m][b][i];
      }
    }
    __syncthreads();
  }

  // Row r of the block's rows of w times row b of x: the warps' sums, added in a fixed order.
  LAB_DEVICE float product(int r, int b) const {
    float sum = 0.f;
    LAB_UNROLL
    for (int s = 0; s < C::kWarps; ++s) sum += shared.partial[s][b][r];
    return sum;
  }

  // Calls f(j, r, output, b) for output j of kMine that this thread stores; its parts are products of rows r,
  // r + kOutputs.
  template <typename F>
  LAB_DEVICE void each_output(F f) const {
    LAB_UNROLL
    for (int j = 0; j < kMine; ++j) {
      const int i = threadIdx.x + j * C::kThreads, r = i % C::kOutputs, b = i / C::kOutputs;
      if (output0 + r < n && b < rows) f(j, r, output0 + r, b);
    }
  }

 private:
  // A lane copies chunk c of every fourth row, so its place in the swizzle never changes. Whatever lies outside the
  // matrix becomes zero.
  LAB_DEVICE void copy(T (*tile)[kDepth], const T* from, int count, int limit, int chunk) {
    const int c = lane % 8, row = lane / 8, col = chunk * kDepth + c * N;
    const T* source = from + size_t(row) * k + col;
    T* target = &tile[row][swizzle(row, c) * N];
    const int valid_rows = col < k ? limit - row : 0;
    LAB_UNROLL
    for (int i = 0; i < count; i += 4, source += 4 * size_t(k), target += 4 * kDepth) {
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
  LAB_DEVICE void copy_w(int i) {
    const int chunk = warp + i * C::kWarps;
    if (chunk >= chunks) return;
    LAB_UNROLL
    for (int part = 0; part < C::kParts; ++part) {
      copy(shared.tile[warp][i % C::kStages] + part * C::kOutputs, w + (size_t(part) * n + output0) * k, C::kOutputs,
           n - output0, chunk);
    }
  }
  LAB_DEVICE void copy_x(int i) {
    const int chunk = warp + i * C::kWarps;
    if (chunk < chunks) copy(shared.tile[warp][i % C::kStages] + C::kRows, x, C::kBatch, rows, chunk);
  }
};

// Calls f with the shape of a launch, a type in f's argument: `using C = typename decltype(shape)::type;`
template <typename C>
struct MmaShape {
  using type = C;
};
template <typename T, int Parts, typename F>
inline void by_mma_shape(int rows, int n, int k, const Settings& tuned, F&& f) {
  // More rows of w per block read x less often from L2; fewer give more blocks. Shared memory: 72, 64, 96, 144, 96 KiB.
  const bool aligned = k % Vec<T>::size == 0;
  if (!aligned) return f(MmaShape<Mma<2, 8, 4, 3, false, Parts>>{});
  if (rows <= 16) {
    const int tiles = tuned.tiles ? tuned.tiles : n * Parts >= 32 * 2 * 132 ? 2 : 1;
    if (tiles == 1) return f(MmaShape<Mma<1, 2, 4, 4, true, Parts>>{});
    return f(MmaShape<Mma<2, 2, 4, 3, true, Parts>>{});
  }
  if (rows <= 32) return f(MmaShape<Mma<2, 4, 4, 3, true, Parts>>{});
  const int tiles = tuned.tiles ? tuned.tiles : n * Parts >= 64 * 240 ? 4 : 2;
  if (tiles == 4) return f(MmaShape<Mma<4, 8, 2, 3, true, Parts>>{});
  f(MmaShape<Mma<2, 8, 4, 3, true, Parts>>{});
}

}  // namespace lab
