// Matrix product of few rows of x with many rows of w on CUDA cores. Each thread loads its weights from DRAM
// into its own registers, or with cp.async into its own places in shared memory.
//
// The core of linear and of the fused ops. An output is the dot product of a row of x with one row of w, or
// with Parts rows of w that lie n rows apart (gate and up). A lane group takes R rows of w and its lanes walk
// along k together. A block of a small grid works on several sets of rows one after another, and its loads
// continue from one set into the next without a pause.
#pragma once
#include "../common.cuh"
#include "../settings.h"
#include "../sizes.h"
#include "unpack.cuh"

namespace lab {

// How many blocks of 128 threads a multiprocessor must have registers for. B = 1, and B = 4 (whose U is 2),
// need 128 registers a thread: then four blocks fit. The other shapes need 168: then three fit. (With five
// blocks, of 102 registers a thread, weights in flight are spilled.) With a ring no weights wait in
// registers, so 64 are enough; what four blocks leave of registers and shared memory then holds the first
// blocks of the dependent kernel, which issue the loads of their weights while these blocks still work.
constexpr int stream_resident(bool ring, int b) {
  if (ring) return 6;
  return b == 1 || b == 4 ? 4 : 3;
}

// The shape of a launch; ThreadStream and WarpStream, below, are those that are compiled. N: elements per
// access. B: rows of x at a time. R: rows of w per lane group. L: lanes in a group, which share k: 32, or 1
// on a CPU. S: lane groups that share k as well. U: accesses to each row of w in flight, so that a thread has
// R * U * 16 bytes in flight. Ring: the weights in flight are in shared memory.
template <int N_, int B_, int R_, int L_, int S_, int U_, int Threads, int Parts = 1, bool Ring = false>
struct Stream {
  static constexpr int N = N_, B = B_, R = R_, L = L_, S = S_, U = U_, kThreads = Threads, kParts = Parts;
  static constexpr bool kRing = Ring;
  static constexpr int kResident = stream_resident(Ring, B), kSlots = Ring ? 4 : kResident;
  // Elements of each row prefetched into L2, after those loaded first.
  static constexpr int kPrefetch = 1024;
  static constexpr int kGroups = kThreads / L;
  static constexpr int kOutputs = R / Parts;  // outputs of a lane group for each row of x
  static constexpr int kOutputsPerBlock = kGroups / S * kOutputs;
  static constexpr int kStep = S * L * N;  // elements of k in one access of all cooperating lanes
  // Partial sums that a thread keeps for each dot product: N on a CPU, one for each lane of its vector unit;
  // 1 on a GPU. (The lanes of a group are L.)
  static constexpr int kLanes = L == 1 ? N : 1;
  static constexpr int kMine = L == 1 ? R * B : 1;  // sums that one thread holds after the reduction
  static_assert(L == 1 || (L == 32 && R * B <= 32), "a warp has a lane for each of its sums");
};

template <typename T, typename C>
struct alignas(16) StreamSmem {
  T ring[C::kRing ? C::U : 1][C::R][C::kRing ? C::kThreads : 1][C::N];
  // Two sets of outputs take turns: one barrier each is enough.
  float partial[2][C::kGroups][C::R * C::B];
};

// Sums Count values (a power of two up to 32) over the warp; v[0] of lane i becomes sum number i % Count.
// While there are several sums, each half of the lanes keeps one half of them. This takes Count - 1 shuffles
// plus log2(32 / Count), where summing each value alone takes 5 * Count. Recursive, because an array stays in
// registers only if every index is constant.
template <int Count, int N>
LAB_DEVICE void scatter_sum(float (&v)[N], int lane) {
  if constexpr (Count > 1) {
    constexpr int kHalf = Count / 2;
    const bool upper = lane & kHalf;
    LAB_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      const float kept = upper ? v[i + kHalf] : v[i], sent = upper ? v[i] : v[i + kHalf];
      v[i] = kept + __shfl_xor_sync(0xffffffffu, sent, kHalf);
    }
    scatter_sum<kHalf>(v, lane);
  } else {
    LAB_UNROLL
    for (int distance = N; distance < 32; distance *= 2) v[0] += __shfl_xor_sync(0xffffffffu, v[0], distance);
  }
}

template <typename T, typename C>
struct RowStream {
  static constexpr int N = C::N, B = C::B, R = C::R;
  const T* w;
  int n, k, lane, group, slice, first;  // first: this lane's first column
  int output;                           // first of the outputs that are summed now
  int turn = 0;                         // which of the two places in `partial` they take
  int fetch_output, fetch_col;          // where the next loads read
  const T* rows_of_w[R];
  StreamSmem<T, C>& shared;
  Packed<T, N> tiles[C::kRing ? 1 : C::U][R];

  // w has Parts * n rows of k elements.
  LAB_DEVICE RowStream(StreamSmem<T, C>& shared_, const T* w_, int n_, int k_)
      : w(w_), n(n_), k(k_), shared(shared_) {
    lane = threadIdx.x % C::L;
    group = threadIdx.x / C::L;
    slice = group % C::S;
    first = (slice * C::L + lane) * N;
  }

  // Issues this block's first loads, which are of weights and so depend on no earlier kernel, and waits for
  // the preceding kernel. The part of these rows that does not fit in registers is prefetched into L2, so
  // that DRAM stays busy while the block waits. early: a block that has issued all its loads by then allows
  // the dependent kernel to launch before the wait.
  LAB_DEVICE void start(bool early) {
    output = blockIdx.x * C::kOutputsPerBlock + group / C::S * C::kOutputs;
    aim(output);
    LAB_UNROLL
    for (int u = 0; u < C::U; ++u) fetch(u);
    prefetch(C::U * C::kStep, C::kPrefetch);
    advance();
    if (early) release();
    pdl_wait();
    release();
  }

  // more() is false once the block's outputs are done; it is the same for all threads. next() steps to the
  // block's next set of outputs.
  LAB_DEVICE bool more() const { return output - group / C::S * C::kOutputs < n; }
  LAB_DEVICE void next() { output += stride(); }
  LAB_DEVICE int stride() const { return gridDim.x * C::kOutputsPerBlock; }

  // acc[r][b] += w[row r] . x[row b] over the columns [begin, end), for the present outputs. begin is a
  // multiple of U * kStep; end is one too, or it is k. x(b, col) returns N elements of x, packed. U * R loads
  // are in flight; each is replaced as soon as its data are used, at the end of the rows by a load for the
  // next outputs.
  template <typename X>
  LAB_DEVICE void multiply(float (&acc)[R][B][C::kLanes], int begin, int end, X x) {
    for (int panel = begin + first; panel - first < end; panel += C::U * C::kStep) {
      LAB_UNROLL
      for (int u = 0; u < C::U; ++u) {
        const int col = panel + u * C::kStep;
        // A thread reads only what it copied itself: no barrier.
        if constexpr (C::kRing) cp_async_wait<C::U - 1>();
        if (col < k) {
          float wf[R][N];
          LAB_UNROLL
          for (int r = 0; r < R; ++r) unpack<T>(wf[r], tile(u, r));
          LAB_UNROLL
          for (int b = 0; b < B; ++b) {
            float xf[N];
            unpack<T>(xf, x(b, col));
            LAB_UNROLL
            for (int r = 0; r < R; ++r) {
              LAB_UNROLL
              for (int e = 0; e < N; ++e)
                acc[r][b][e % C::kLanes] = fmadd(wf[r][e], xf[e], acc[r][b][e % C::kLanes]);
            }
          }
        }
        fetch(u);
      }
      advance();
      release();
    }
  }

  // Sums over the lanes of a group, then over the groups that shared the rows, in a fixed order. Sum i
  // belongs to row i % R of w and row i / R of x. Lane i of slice 0 holds it; on a CPU one thread holds all
  // of them.
  LAB_DEVICE void reduce(float (&sums)[R * B], const float (&acc)[R][B][C::kLanes]) {
    LAB_UNROLL
    for (int i = 0; i < R * B; ++i) {
      sums[i] = 0.f;
      LAB_UNROLL
      for (int e = 0; e < C::kLanes; ++e) sums[i] += acc[i % R][i / R][e];
    }
    if constexpr (C::L == 32) scatter_sum<R * B>(sums, lane);
    if constexpr (C::S > 1) {
      auto& partial = shared.partial[turn];
      turn ^= 1;
      if (lane < R * B) partial[group][lane] = sums[0];
      __syncthreads();
      if (slice == 0 && lane < R * B) {
        LAB_UNROLL
        for (int s = 1; s < C::S; ++s) sums[0] += partial[group + s][lane];
      }
    }
  }

  // For two parts: sums[j] is the sum of an output's first part, and second[j] becomes that of its second
  // part. All lanes must call it.
  LAB_DEVICE void second_part(float (&second)[R * B], const float (&sums)[R * B]) const {
    if constexpr (C::L == 32) {
      second[0] = __shfl_down_sync(0xffffffffu, sums[0], C::kOutputs);
    } else {
      for (int j = 0; j + C::kOutputs < R * B; ++j) second[j] = sums[j + C::kOutputs];
    }
  }

  // Calls f(j, output, b) for each output that this thread stores; sums[j] is its sum (that of its first
  // part).
  template <typename F>
  LAB_DEVICE void each_output(int b0, int rows, F f) const {
    LAB_UNROLL
    for (int j = 0; j < C::kMine; ++j) {
      const int i = lane + j, r = i % R, b = b0 + i / R;
      if (slice == 0 && i < R * B && r < C::kOutputs && output + r < n && b < rows) f(j, output + r, b);
    }
  }

 private:
  // Sets the rows that the next loads read. Rows past the end repeat the last one; their sums are never
  // stored.
  LAB_DEVICE void aim(int to) {
    fetch_output = to;
    const bool beyond = to - group / C::S * C::kOutputs >= n;
    fetch_col = beyond ? k : first;
    LAB_UNROLL
    for (int r = 0; r < R; ++r) {
      rows_of_w[r] = w + (size_t(r / C::kOutputs) * n + min(to + r % C::kOutputs, n - 1)) * k;
    }
  }
  LAB_DEVICE void advance() {
    fetch_col += C::U * C::kStep;
    if (fetch_col - first >= k) aim(fetch_output + stride());
  }
  // Allows the dependent kernel to launch once this block has issued its last loads of weights: the dependent
  // kernel's first loads then follow directly behind. Earlier they would compete with this block's own loads;
  // later DRAM would fall idle in between.
  LAB_DEVICE void release() const {
    if (fetch_col >= k) pdl_launch_dependents();
  }
  // Prefetches up to `count` elements of each row into L2, from column `col` on; one lane for each row.
  LAB_DEVICE void prefetch(int col, int count) const {
#if LAB_SM90
    if (N * sizeof(T) != 16 || slice != 0 || col >= k || output >= n) return;
    LAB_UNROLL
    for (int r = 0; r < R; ++r) {
      if (lane == r % C::L) bulk_prefetch_l2(rows_of_w[r] + col, min(count, k - col) * unsigned(sizeof(T)));
    }
#endif
  }
  LAB_DEVICE void fetch(int u) {
    const int col = fetch_col + u * C::kStep;
    if (col < k) {
      LAB_UNROLL
      for (int r = 0; r < R; ++r) {
        if constexpr (C::kRing) {
          cp_async16(shared.ring[u][r][threadIdx.x], rows_of_w[r] + col);
        } else {
          tiles[u][r] = load_packed_stream<N>(rows_of_w[r] + col);
        }
      }
    }
    if constexpr (C::kRing) cp_async_commit();  // even if nothing was issued: the waits count groups
  }
  LAB_DEVICE Packed<T, N> tile(int u, int r) const {
    if constexpr (C::kRing) return load_packed<N>(shared.ring[u][r][threadIdx.x]);
    return tiles[C::kRing ? 0 : u][r];
  }
};

// ---- x in shared memory -----------------------------------------------------------------------------------

template <typename T, typename C>
struct alignas(16) StagedSmem {
  StreamSmem<T, C> stream;
  // Really B rows of staged_columns(k) elements: see staged_smem_bytes().
  alignas(16) T x[Vec<T>::size];
};

// Columns of x that a block holds at a time: all of them, unless B rows of k elements take more than 48 KiB.
template <typename T, typename C>
LAB_HOST_DEVICE int staged_columns(int k) {
  constexpr int kPanel = C::U * C::kStep, kMost = 48 * 1024 / (C::B * int(sizeof(T))) / kPanel * kPanel;
  static_assert(kMost > 0, "a panel of x fits");
  return k < kMost ? k : kMost;
}
template <typename T, typename C>
inline size_t staged_smem_bytes(int k) {
  return sizeof(StagedSmem<T, C>) + size_t(C::B) * staged_columns<T, C>(k) * sizeof(T);
}

// B rows of x, from row b0 on, for RowStream. They pass through shared memory, so that each element is read
// from L2 once per block, and with all loads in flight at once. A CPU's threads read x in place.
template <typename T, typename C>
struct StagedRows {
  static constexpr bool kStaged = C::L > 1;
  StagedSmem<T, C>& shared;
  const T* x;
  int b0, rows, k, columns, staged = -1;  // staged: the first column that is now in shared memory

  LAB_DEVICE StagedRows(const T* x_, int b0_, int rows_, int k_)
      : shared(smem<StagedSmem<T, C>>()), x(x_), b0(b0_), rows(rows_), k(k_),
        columns(staged_columns<T, C>(k_)) {}

  // acc += w x^T over all columns, for the present outputs. All threads must call it.
  LAB_DEVICE void multiply(RowStream<T, C>& stream, float (&acc)[C::R][C::B][C::kLanes]) {
    for (int begin = 0; begin < k; begin += columns) {
      if (kStaged && staged != begin) stage(begin);
      stream.multiply(acc, begin, min(k, begin + columns), [&](int b, int col) {
        return load_packed<C::N>(kStaged ? shared.x + b * columns + col - begin : row(b) + col);
      });
    }
  }

 private:
  LAB_DEVICE const T* row(int b) const { return x + size_t(min(b0 + b, rows - 1)) * k; }
  LAB_DEVICE void stage(int begin) {
    __syncthreads();  // the columns staged before have been multiplied
    LAB_UNROLL
    for (int b = 0; b < C::B; ++b) {
      for (int i = threadIdx.x * C::N; i < columns && begin + i < k; i += C::kThreads * C::N) {
        if constexpr (C::N * sizeof(T) == 16) {
          cp_async16(shared.x + b * columns + i, row(b) + begin + i);
        } else {
          shared.x[b * columns + i] = row(b)[begin + i];
        }
      }
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    staged = begin;
  }
};

// y[i] = sum, rounded to y's dtype: T or float32.
template <typename T>
LAB_DEVICE void store_as(void* y, size_t i, float sum, bool f32) {
  if (f32) {
    static_cast<float*>(y)[i] = sum;
  } else {
    static_cast<T*>(y)[i] = from_float<T>(sum);
  }
}

// ---- shapes of a launch -----------------------------------------------------------------------------------

// The number of blocks for `outputs` outputs. longer: blocks do something once before they multiply (the
// norm). Then there are as many blocks as run at once, four on each multiprocessor, and each works on several
// sets of outputs: the one-time cost is paid seldom, and no last wave leaves multiprocessors without work.
// Otherwise each set of outputs gets a block of its own, if that makes eight waves or more: then at any time
// some block has just issued all its loads. Measured on an H100, 8B at batch 1: gate and up 77 us in 14
// waves, 79 us with all blocks at once; with the norm 90 and 79 us.
template <typename C>
inline int stream_blocks(int outputs, bool longer, const Settings& tuned) {
  const int all = ceil_div(outputs, C::kOutputsPerBlock), slots = C::kSlots * multiprocessors();
  const int few = tuned.resident ? tuned.resident * multiprocessors() : slots;
  return few < all && (tuned.resident || longer || all < 8 * slots) ? few : all;
}

// How many warps share their rows of w: enough that they can issue the loads of whole rows at once (`panel`
// elements for each warp), because a wait in the middle of a row leaves fewer loads in flight; and more if
// there are too few rows to fill the device.
inline int shared_by(int warps, int k, int panel) {
  const int enough = 6 * multiprocessors();
  if (2 * warps < enough || k > 2 * panel) return 4;
  return warps < enough || k > panel ? 2 : 1;
}

// clang-format off
// The shapes.                                     R  L   S      U               threads

// For a CPU: each thread multiplies 4 rows of w by itself, and nothing is summed across threads.
template <int N, int B, int Threads, int Parts>
struct ThreadStream : Stream<N, B,                 4, 1,  1,     1,              Threads, Parts> {};

// For a GPU: the 32 lanes of a warp share 4 rows of w, and S of the block's 4 warps share the same rows. With
// up to 2 rows of x there are enough registers for 4 loads of each row in flight, otherwise 2.
template <int N, int B, int S, int Parts, bool Ring>
struct WarpStream : Stream<N, B,                   4, 32, S,     B <= 2 ? 4 : 2, 128, Parts, Ring> {};
// clang-format on

// Calls f with the shape for `outputs` outputs of Parts rows of w each, k elements long, and for `rows` rows
// of x; at most max_batch of these are taken at a time. The shape is a type, passed in a tag: `using C =
// typename decltype(shape)::type;`. HostThreads: threads in a block on a CPU. Ring: for a single row of x,
// weights in flight are in shared memory. On an H100 that is 1 to 8% faster (8B's o 11.5 us; with registers
// 12.4), but not if a block normalises first (8B's gate and up 78.8 us; with registers 78.3).
template <typename C>
struct StreamShape {
  using type = C;
};
template <typename T, int Parts, int HostThreads, bool Ring, typename F>
inline void by_stream_shape(int rows, int outputs, int k, int max_batch, const Settings& tuned, F&& f) {
  const int batch = rows < max_batch ? rows : max_batch;
  by_width<T>(
      [&](auto width) {
        constexpr int N = decltype(width)::value;
        const auto with_batch = [&](auto b) {
          constexpr int B = decltype(b)::value;
          if constexpr (kHost) {
            if (cpu_shapes()) return f(StreamShape<ThreadStream<N, B, HostThreads, Parts>>{});
          }
          constexpr bool kRing = Ring && B == 1 && N > 1;
          // Not compiled: no launch takes it, see most_stream_rows().
          if constexpr (!kHasGpuShapes || (sizeof(T) == 2 && N > 1 && B > 2)) {
            throw std::logic_error("more than 2 rows of half precision are for tensor cores");
          } else {
            using Alone = WarpStream<N, B, 1, Parts, kRing>;
            if constexpr (N > 1) {
              const int share =
                  tuned.share ? tuned.share : shared_by(ceil_div(outputs * Parts, 4), k, Alone::U * 32 * N);
              if (share == 4) return f(StreamShape<WarpStream<N, B, 4, Parts, kRing>>{});
              if (share == 2) return f(StreamShape<WarpStream<N, B, 2, Parts, kRing>>{});
            }
            f(StreamShape<Alone>{});
          }
        };
        // With more rows of x than B, w is read again, from L2, for every B rows.
        if (batch == 1) return with_batch(std::integral_constant<int, 1>{});
        if constexpr (N > 1) {
          if (batch == 2) return with_batch(std::integral_constant<int, 2>{});
        }
        if constexpr (kHost && N > 1 && sizeof(T) == 2) {
          if (batch > 4) return with_batch(std::integral_constant<int, 8>{});
        }
        with_batch(std::integral_constant<int, 4>{});
      },
      k);
}

}  // namespace lab
