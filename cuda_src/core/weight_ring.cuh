// One ring of tiles in shared memory, through which a block reads all matrices that a decode step multiplies,
// in order, and the context's K and V between them. (Norms' weights, biases and the token's row of the
// embedding do not pass through it.) One thread of the block issues bulk copies into the tiles, in the order
// in which the other warps use them. That thread waits only for a free tile and for copies in flight, never
// for another block, so DRAM stays busy while its block waits: 12 tiles of 16 KiB (11 for an 8B's longer
// rows) on each of an H100's 132 multiprocessors are 26 MB, which is 8 us of its bandwidth. Only a few tiles
// are in flight at a time, no more than DRAM's full bandwidth needs: all other loads and stores, L2 hits too,
// queue behind the copies in flight. With 12 tiles in flight they wait 5 us, measured on an H100.
//
// Each block owns a share of every matrix's rows; a tile is a few of these rows. Tensor cores multiply them
// with x because a block that had to wait must catch up on the tiles that have arrived meanwhile. (On CUDA
// cores a tile took 700 cycles; DRAM delivers one in 1,300.)
#pragma once
#include "../common.cuh"
#include "step_trace.cuh"
#include "unpack.cuh"

namespace lab {

// w [parts * n, k]. An output is the dot product of x with one row, or with two rows that lie n rows apart
// (gate and up).
template <typename T>
struct Matrix {
  const T* w;
  int n, k, parts;
};

// The warps that multiply; one more warp issues the copies.
constexpr int kRingWarps = 8, kRingThreads = kRingWarps * 32;
constexpr int kTileBytes = 16 * 1024;
constexpr int kMostTiles = 14;    // as many as fit in 227 KiB
constexpr int kMostInFlight = 4;  // the most tiles in flight in the midst of a matrix
// Rows whose sums are in shared memory before they are stored.
constexpr int kBatchRows = 128;

struct RingSmem : StepTrace {
  mbarrier full[kMostTiles], empty[kMostTiles];
  alignas(16) float partial[kBatchRows][kRingWarps];
};

// ring_sync(): barrier of the warps that multiply. sum_of_warps(): the sum of one value of each of these
// warps, in a fixed order.
LAB_DEVICE void ring_sync() { named_barrier(1, kRingThreads); }
LAB_DEVICE float sum_of_warps(const float* v) {  // v is 16-byte aligned
  const Vec<float> low = load(v), high = load(v + 4);
  return ((low.v[0] + low.v[1]) + (low.v[2] + low.v[3])) +
         ((high.v[0] + high.v[1]) + (high.v[2] + high.v[3]));
}

// Rows and columns of a tile. A bulk copy should have 4 KiB or more, because issuing one takes about 100
// cycles.
struct TileShape {
  int row_bits, cols, stride;           // stride: elements between rows in shared memory
  LAB_DEVICE explicit TileShape(int k)  // uses shifts: a division takes 30 instructions
      : row_bits(k <= 1024 ? 3 : 2), cols(kTileBytes / 2 >> row_bits), stride(min(k, cols)) {}
  LAB_DEVICE int rows() const { return 1 << row_bits; }
};

// The outputs [first, last).
struct Share {
  int first, last;
  LAB_DEVICE bool empty() const { return first >= last; }
};

// TileBytes: a tile's place in shared memory. Edge: a block's share of a matrix begins and ends at multiples of
// so many outputs; 2 of them are one word of a row that passes between blocks.
template <typename T, int TileBytes = kTileBytes, int Edge = 2>
struct WeightRing {
  static_assert(sizeof(T) == 2, "tensor cores multiply 16-bit elements");
  RingSmem& shared;
  T* tiles;
  // This block's share of the rows of any matrix, as fractions times 2^32.
  const uint64_t begins, ends;
  // Tiles of the ring; the most in flight while the block may be waiting for others.
  const int count, few;
  int stage = 0;  // index of the next tile
  // Parity of the next tile's barrier phase: flips with each round of the ring.
  unsigned parity = 0;
  // For the thread that issues copies: tiles in flight, the oldest of them.
  int under_way = 0, oldest = 0;
  unsigned oldest_parity = 0;

  LAB_DEVICE WeightRing(RingSmem& shared_, unsigned char* tiles_, int count_, int few_)
      : shared(shared_), tiles(reinterpret_cast<T*>(tiles_)), begins(part(blockIdx.x)),
        ends(part(blockIdx.x + 1)), count(count_), few(few_) {}

  // One thread calls it, before a barrier of the block.
  LAB_DEVICE void init() {
    for (int i = 0; i < count; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], kRingThreads);
    }
    mbarrier_fence_init();
  }

  // For the thread that issues copies. begin() waits until the next tile is free and fewer than
  // `most_under_way` tiles are in flight, and tells the tile's barrier how many bytes to expect. copy() then
  // issues one copy into the tile.
  LAB_DEVICE void begin(unsigned bytes, int most_under_way) {
    for (; under_way >= most_under_way; --under_way) {
      mbarrier_wait(&shared.full[oldest], oldest_parity);
      if (++oldest == count) oldest = 0, oldest_parity ^= 1;
    }
    ++under_way;
    mbarrier_wait(&shared.empty[stage], parity ^ 1);
    mbarrier_arrive_expect_tx(&shared.full[stage], bytes);
    shared.tile_issued();
  }
  LAB_DEVICE void copy(T* to, const T* from, unsigned bytes) {
    bulk_copy_g2s(to, from, bytes, &shared.full[stage]);
  }

  // For the other threads. wait() waits until the tile has arrived; then each thread marks it as free with
  // release(). (If one lane did this for its whole warp it would be no faster, and compute-sanitizer would
  // not see that it stands for the others.)
  LAB_DEVICE void wait() {
    const auto began = shared.now();
    mbarrier_wait(&shared.full[stage], parity);
    shared.tile_arrived(began);
  }
  LAB_DEVICE void release() {
    mbarrier_arrive(&shared.empty[stage]);
    shared.tile_used();
    advance();
  }

  LAB_DEVICE T* tile() const { return tiles + stage * (TileBytes / int(sizeof(T))); }
  LAB_DEVICE void advance() {
    if (++stage == count) stage = 0, parity ^= 1;
  }

  // This block's share of n outputs. (A division here costs 270 cycles,
  // twice a phase.)
  LAB_DEVICE Share share(int n) const { return {edge(n, begins), edge(n, ends)}; }

  // Issues the copies of this block's share of a matrix.
  LAB_DEVICE void issue(const Matrix<T>& m) {
    const TileShape shape(m.k);
    int issued = 0;
    each_group(
        m, share(m.n),
        [&](int output, int part, int, int rows) {
          const T* from = m.w + (size_t(part) * m.n + output) * m.k;
          for (int col = 0; col < m.k; col += shape.cols) {
            const unsigned bytes = min(shape.cols, m.k - col) * unsigned(sizeof(T));
            begin(rows * bytes, issued++ < count ? few : kMostInFlight);
            if (m.k <= shape.cols) {  // whole rows, which are contiguous
              copy(tile(), from, rows * bytes);
            } else {
              for (int r = 0; r < rows; ++r)
                copy(tile() + r * shape.stride, from + size_t(r) * m.k + col, bytes);
            }
            advance();
          }
        },
        [](int, int) {}, [](int, int) {});
  }

  // Multiplies this block's share of a matrix with x [k], which is in shared memory, and passes the sums to
  // the epilogue. For each output n one thread calls three functions of it, in this order: load(n), early,
  // which returns what the sum is added to (`base` is what load() returned for the thread's first output);
  // finish(n, base, sum of the first part's row, sum of the second part's row), which returns the result;
  // store(n, this result, the result that the next output's thread has). All warps that multiply must call
  // multiply(). Sums have a fixed order.
  template <typename Base, typename Epilogue>
  LAB_DEVICE void multiply(const Matrix<T>& m, const Share& share, const T* x, Base base,
                           Epilogue& epilogue) {
    const TileShape shape(m.k);
    const Lanes lanes(shape);
    const int i = threadIdx.x;
    uint4 column[kSteps] = {};
    if (m.k <= shape.cols) load_column(column, lanes, x, 0, m.k);  // the same for all tiles
    each_group(
        m, share,
        [&](int, int part, int row, int) {
          float sums[kSteps][4] = {};  // independent sums: a multiply waits for the sum it adds to
          for (int col = 0; col < m.k; col += shape.cols) {
            if (m.k > shape.cols) load_column(column, lanes, x, col, m.k);
            wait();
            add_products(sums, lanes, column, m.k - col);
            release();
          }
          float (*place)[kRingWarps] = shared.partial + part * (kBatchRows / 2) + row;
          const float even = (sums[0][0] + sums[1][0]) + (sums[2][0] + sums[3][0]);
          const float odd = (sums[0][1] + sums[1][1]) + (sums[2][1] + sums[3][1]);
          if (shape.row_bits == 3) {
            if (lane() < 4) place[lane() * 2][warp()] = even, place[lane() * 2 + 1][warp()] = odd;
          } else {
            const float half = lane() & 4 ? odd : even, whole = half + __shfl_xor_sync(0xffffffffu, half, 4);
            if (lane() < 4) place[lane()][warp()] = whole;
          }
        },
        [&](int first, int outputs) {
          if (first > share.first && i < outputs) base = epilogue.load(first + i);
        },
        [&](int first, int outputs) { store_sums(m.parts, first, outputs, base, epilogue); });
  }

  // The end of a batch of outputs: passes the sums in `partial` to the epilogue.
  template <typename Base, typename Epilogue>
  LAB_DEVICE void store_sums(int parts, int first, int outputs, const Base& base, Epilogue& epilogue) {
    const int i = threadIdx.x;
    ring_sync();
    float mine = 0.f;
    if (i < outputs) {
      const float second = parts > 1 ? total(kBatchRows / 2 + i) : 0.f;
      mine = epilogue.finish(first + i, base, total(i), second);
    }
    const float next = __shfl_down_sync(0xffffffffu, mine, 1);
    if (i < outputs) epilogue.store(first + i, mine, next);
    ring_sync();  // no thread still reads `partial`
  }

 private:
  LAB_DEVICE static uint64_t part(unsigned blocks) {
    return ((uint64_t(blocks) << 32) + gridDim.x - 1) / gridDim.x;
  }
  LAB_DEVICE static int edge(int n, uint64_t part) {
    return min(n, int(uint64_t((n + Edge - 1) / Edge) * part >> 32) * Edge);
  }
  LAB_DEVICE static int lane() { return threadIdx.x % 32; }
  LAB_DEVICE static int warp() { return threadIdx.x / 32; }

  // The order of the weights in the ring: batches of outputs; in a batch its parts; in a part the rows, a
  // tile at a time.
  template <typename Group, typename Begin, typename End>
  LAB_DEVICE static void each_group(const Matrix<T>& m, const Share& share, Group group, Begin begin,
                                    End end) {
    const int batch = kBatchRows >> (m.parts - 1), tile_rows = TileShape(m.k).rows();
    for (int output = share.first; output < share.last; output += batch) {
      const int outputs = min(batch, share.last - output);
      begin(output, outputs);
      for (int part = 0; part < m.parts; ++part) {
        for (int row = 0; row < outputs; row += tile_rows) {
          group(output + row, part, row, min(tile_rows, outputs - row));
        }
      }
      end(output, outputs);
    }
  }

  // How a warp multiplies a tile. The columns of B (16 x 8) are rows of w; A (16 x 16) has x in its first 8
  // rows, and zeros below. Any assignment of elements to k is right as long as A and B use the same, so a
  // lane loads 8 contiguous elements: 4 for each of two multiplies. Of sums[step], which are one lane's, [0]
  // and [1] belong to row lane / 4 of A and to the columns 2 * (lane % 4) and 2 * (lane % 4) + 1 of B; [2]
  // and [3] belong to the rows of zeros.
  //
  // In a tile of 8 rows of w, column r of B is row r, and the 8 rows of A are all the same. In a tile of 4
  // rows, the columns 2 r and 2 r + 1 are both row r, but 32 elements apart: even columns have one group of
  // 32 elements of w, odd columns the next 32. Likewise even rows of A have x of the first group, odd rows x
  // of the next. So a sum is of use only if its row and its column are both even or both odd; multiply() adds
  // one of each kind and ignores the other sums.
  //
  // Rows past the block's last one hold older data: their sums are never stored.
  static constexpr int kSteps = 4;
  struct Lanes {
    // A lane's first column; the distance to its next ones; the offset of its row in a tile.
    int step, col, row;
    LAB_DEVICE explicit Lanes(const TileShape& shape) {
      const int half_bits = 3 - shape.row_bits, g = lane() / 4;
      step = 32 << half_bits;
      col = warp() * kSteps * step + (g & half_bits) * 32 + lane() % 4 * 8;
      row = (g >> half_bits) * shape.stride;
    }
  };
  LAB_DEVICE static void load_column(uint4 (&column)[kSteps], const Lanes& lanes, const T* x, int col,
                                     int k) {
    LAB_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      const int at = col + lanes.col + s * lanes.step;
      column[s] = at < k ? words(x + at) : uint4{};
    }
  }
  LAB_DEVICE void add_products(float (&sums)[kSteps][4], const Lanes& lanes, const uint4 (&column)[kSteps],
                               int left) const {
    uint4 rows[kSteps] = {};
    LAB_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      const int at = lanes.col + s * lanes.step;
      if (at < left) rows[s] = words(tile() + lanes.row + at);
    }
    LAB_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      mma_m16n8k16(sums[s], {column[s].x, 0, column[s].y, 0}, {rows[s].x, rows[s].y}, T{});
      mma_m16n8k16(sums[s], {column[s].z, 0, column[s].w, 0}, {rows[s].z, rows[s].w}, T{});
    }
  }
  LAB_DEVICE static uint4 words(const T* p) { return bit_cast<uint4>(load(p)); }
  LAB_DEVICE float total(int row) const { return sum_of_warps(shared.partial[row]); }
};

}  // namespace lab
