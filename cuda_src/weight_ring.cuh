// All matrices of a decode step as one stream through a ring of tiles in shared memory: one thread of the block sends
// for them (bulk copies), in the order in which the other warps will multiply them. It waits for nothing but room, so
// DRAM stays busy while the block waits for other blocks: 12 tiles of 16 KiB on each of an H100's 132 multiprocessors
// are 26 MB, 8 us of its bandwidth.
//
// Each block owns a share of every matrix's rows. A tile is a few rows of it, as wide as the warps that share a row.
#pragma once
#include "common.cuh"
#include "sizes.h"
#include "stream_rows.cuh"
#include "unpack.cuh"

namespace lab {

#if LAB_SM90

// w [parts * n, k]: an output is the product with one row, or with two that lie n rows apart (gate and up).
template <typename T>
struct Matrix {
  const T* w;
  int n, k, parts;
};

constexpr int kRingWarps = 8, kRingThreads = kRingWarps * 32;   // that multiply; one warp more sends
constexpr int kRingRows = 4;                      // rows of a tile that a warp multiplies at once
constexpr int kTileBytes = kRingWarps * 32 * 16 * kRingRows;    // 16 bytes of each of these rows for every thread
constexpr int kMostTiles = 16;
constexpr int kBatchRows = 256;                   // rows whose sums meet in shared memory before they are stored

// How a matrix is cut: warps that share a row, columns and rows of a tile; and the outputs of this block.
template <typename T>
struct TileShape {
  static constexpr int N = Vec<T>::size;
  int share, width, rows, first, last, batch;
  LAB_DEVICE explicit TileShape(const Matrix<T>& m) {
    share = 1;
    while (share < kRingWarps && share * 32 * N < m.k) share *= 2;
    width = share * 32 * N, rows = kRingWarps / share * kRingRows, batch = kBatchRows / m.parts;
    first = int(int64_t(m.n) * blockIdx.x / gridDim.x), last = int(int64_t(m.n) * (blockIdx.x + 1) / gridDim.x);
  }
};

struct RingSmem {
  mbarrier full[kMostTiles], empty[kMostTiles];
  float partial[kBatchRows][kRingWarps];
};

// Barrier of the warps that multiply.
LAB_DEVICE void ring_sync() { named_barrier(1, kRingThreads); }

template <typename T>
struct WeightRing {
  static constexpr int N = Vec<T>::size;
  RingSmem& shared;
  T* tiles;
  int count, stage = 0;                           // tiles of the ring, the next one
  unsigned parity = 0;                            // of the next tile's phase: flips with each round

  LAB_DEVICE WeightRing(RingSmem& shared_, unsigned char* tiles_, int count_)
      : shared(shared_), tiles(reinterpret_cast<T*>(tiles_)), count(count_) {}

  // For one thread, before a barrier of the block.
  LAB_DEVICE void init() {
    for (int i = 0; i < count; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], kRingWarps);
    }
    mbarrier_fence_init();
  }

  // Sends for this block's share of a matrix, tile by tile as room comes free. For the one thread that sends.
  LAB_DEVICE void send(const Matrix<T>& m) {
    const TileShape<T> shape(m);
    for (int o = shape.first; o < shape.last; o += shape.batch) {
      const int outputs = min(shape.batch, shape.last - o);
      for (int part = 0; part < m.parts; ++part) {
        for (int r = 0; r < outputs; r += shape.rows) {
          const T* from = m.w + (size_t(part) * m.n + o + r) * m.k;
          const int rows = min(shape.rows, outputs - r);
          for (int col = 0; col < m.k; col += shape.width) {
            const unsigned bytes = min(shape.width, m.k - col) * unsigned(sizeof(T));
            T* to = tile();
            mbarrier_wait(&shared.empty[stage], parity ^ 1);
            mbarrier_arrive_expect_tx(&shared.full[stage], rows * bytes);
            if (m.k <= shape.width) {             // whole rows, which are neighbours
              bulk_copy_g2s(to, from, rows * bytes, &shared.full[stage]);
            } else {
              for (int i = 0; i < rows; ++i) {
                bulk_copy_g2s(to + i * shape.width, from + size_t(i) * m.k + col, bytes, &shared.full[stage]);
              }
            }
            advance();
          }
        }
      }
    }
  }

  // The products of this block's share with x [k], in shared memory; calls store(output, sum of the first part's row,
  // sum of the second's) for each, on one thread. All warps that multiply call it. Sums have a fixed order.
  template <typename F>
  LAB_DEVICE void multiply(const Matrix<T>& m, const T* x, F store) {
    const TileShape<T> shape(m);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slice = warp % shape.share;
    const int row0 = warp / shape.share * kRingRows, first = (slice * 32 + lane) * N;
    const int stride = min(shape.width, m.k);     // of a tile's rows
    for (int o = shape.first; o < shape.last; o += shape.batch) {
      const int outputs = min(shape.batch, shape.last - o);
      for (int part = 0; part < m.parts; ++part) {
        for (int r = 0; r < outputs; r += shape.rows) {
          float acc[kRingRows] = {};
          for (int col = first; col - first < m.k; col += shape.width) {
            mbarrier_wait(&shared.full[stage], parity);
            if (col < m.k && r + row0 < outputs) add_products(acc, tile() + row0 * stride + first, stride, x + col);
            __syncwarp();
            if (lane == 0) mbarrier_arrive(&shared.empty[stage]);
            advance();
          }
          scatter_sum<kRingRows>(acc, lane);
          const int row = r + row0 + lane;
          if (lane < kRingRows && row < outputs) shared.partial[part * shape.batch + row][slice] = acc[0];
        }
      }
      ring_sync();
      for (int i = threadIdx.x; i < outputs; i += kRingThreads) {
        store(o + i, total(i, shape.share), m.parts > 1 ? total(shape.batch + i, shape.share) : 0.f);
      }
      ring_sync();
    }
  }

 private:
  LAB_DEVICE T* tile() const { return tiles + stage * (kTileBytes / int(sizeof(T))); }
  LAB_DEVICE void advance() {
    if (++stage == count) stage = 0, parity ^= 1;
  }
  // Rows past the block's last hold what was there before: their sums are never stored.
  LAB_DEVICE static void add_products(float (&acc)[kRingRows], const T* w, int stride, const T* x) {
    float xf[N], wf[N];
    unpack<T>(xf, load_packed<N>(x));
    LAB_UNROLL
    for (int r = 0; r < kRingRows; ++r) {
      unpack<T>(wf, load_packed<N>(w + r * stride));
      LAB_UNROLL
      for (int e = 0; e < N; ++e) acc[r] = fmadd(wf[e], xf[e], acc[r]);
    }
  }
  LAB_DEVICE float total(int row, int share) const {
    float sum = 0.f;
    for (int s = 0; s < share; ++s) sum += shared.partial[row][s];
    return sum;
  }
};

#endif  // LAB_SM90

}  // namespace lab
