// linear: y[b, n] = sum over k of x[b, k] * w[n, k] (+ bias[n]), float32 accumulation, rounded once
//
//   x [rows, k]   w [n, k]   bias [n] (optional)   y [rows, n] in the dtype of x or float32     row-major, rows <= 64
//   mapping   up to 8 rows, and float32: a warp streams 4 rows of w; its lanes share k; for narrow w, 4 warps share k
//             more rows in float16 or bfloat16: tensor cores; a block owns 16 to 64 rows of w, its warps share k
//   traffic   w once (the only traffic that counts), x once per block from L2, y once
//   contract  lab/ops/linear.py          twin  triton_kernels/linear.py
#include "common.cuh"
#include "launchers.h"
#include "sizes.h"
#include "unpack.cuh"

using namespace lab;

template <typename T>
LAB_DEVICE void store_output(void* y, size_t i, float sum, const T* bias, int row, bool out_f32) {
  if (bias) sum += to_float(bias[row]);
  if (out_f32) {
    static_cast<float*>(y)[i] = sum;
  } else {
    static_cast<T*>(y)[i] = from_float<T>(sum);
  }
}

// ---- few rows of x: CUDA cores, weights from DRAM straight into registers --------------------------------------------

// The shape of a launch. N: elements per access. B: rows of x at a time. R: rows of w per lane group. L: lanes in a group
// that share k. S: lane groups that share k as well. U: accesses to each row of w in flight; R * U * 16 bytes a thread.
template <int N_, int B_, int R_, int L_, int S_, int U_, int Threads>
struct Stream {
  static constexpr int N = N_, B = B_, R = R_, L = L_, S = S_, U = U_, kThreads = Threads;
  static constexpr int kGroups = kThreads / L;
  static constexpr int kRowsPerBlock = kGroups / S * R;
  static constexpr int kStep = S * L * N;         // elements of k that one access of all cooperating lanes covers
  // Partial sums per output: the vector unit of a CPU wants independent lanes, a thread of a GPU is one lane.
  static constexpr int kLanes = L == 1 ? N : 1;
};

template <typename C>
struct StreamSmem {
  float partial[C::kGroups][C::R * C::B];
};

// Sums Count values (a power of two up to 32) over the warp; v[0] of lane i becomes sum i % Count. While there are several,
// each half of the lanes keeps one half of them: Count - 1 shuffles, and log2(32 / Count) more, where summing each alone
// takes 5 * Count. Recursive, because only a constant index keeps an array in registers.
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
__global__ void __launch_bounds__(C::kThreads, 1)
    linear_stream_kernel(const T* x, const T* w, const T* bias, void* y, int rows, int n, int k, bool out_f32) {
  // 1. Locate: R rows of w per lane group, a slice of k per lane; rows past the end repeat the last one, unstored.
  constexpr int N = C::N, B = C::B, R = C::R;
  const int lane = threadIdx.x % C::L, group = threadIdx.x / C::L, slice = group % C::S;
  const int row = blockIdx.x * C::kRowsPerBlock + group / C::S * R;
  const int first = (slice * C::L + lane) * N;
  const T* w_rows[R];
  LAB_UNROLL
  for (int r = 0; r < R; ++r) w_rows[r] = w + size_t(min(row + r, n - 1)) * k;

  for (int b0 = 0; b0 < rows; b0 += B) {
    // 2. Stream: U * R independent 16-byte loads are in flight; each is replaced as soon as it is used. The first leave
    // before the wait, for weights depend on no earlier kernel. x is small and comes from L1.
    Packed<T, N> weights[C::U][R];
    const auto fetch = [&](Packed<T, N>(&into)[R], int col) {
      if (col >= k) return;
      LAB_UNROLL
      for (int r = 0; r < R; ++r) into[r] = load_packed_stream<N>(w_rows[r] + col);
    };
    LAB_UNROLL
    for (int u = 0; u < C::U; ++u) fetch(weights[u], first + u * C::kStep);
    pdl_wait();

    const T* x_rows[B];
    LAB_UNROLL
    for (int b = 0; b < B; ++b) x_rows[b] = x + size_t(min(b0 + b, rows - 1)) * k;
    float acc[R][B][C::kLanes] = {};
    for (int panel = first; panel < k; panel += C::U * C::kStep) {
      LAB_UNROLL
      for (int u = 0; u < C::U; ++u) {
        const int col = panel + u * C::kStep;
        if (col < k) {
          float wf[R][N];
          LAB_UNROLL
          for (int r = 0; r < R; ++r) unpack<T>(wf[r], weights[u][r]);
          LAB_UNROLL
          for (int b = 0; b < B; ++b) {
            float xf[N];
            unpack<T>(xf, load_packed<N>(x_rows[b] + col));
            LAB_UNROLL
            for (int r = 0; r < R; ++r) {
              LAB_UNROLL
              for (int e = 0; e < N; ++e) acc[r][b][e % C::kLanes] = fmadd(wf[r][e], xf[e], acc[r][b][e % C::kLanes]);
            }
          }
        }
        fetch(weights[u], col + C::U * C::kStep);
      }
    }
    pdl_launch_dependents();

    // 3. Reduce: over the lanes of a group, then over the groups that shared the row, in a fixed order. Sum i belongs to
    // row i % R of w and row i / R of x; lane i of a warp has it, or a CPU thread all of them.
    constexpr int kMine = C::L == 1 ? R * B : 1;
    float sums[R * B];
    LAB_UNROLL
    for (int i = 0; i < R * B; ++i) {
      sums[i] = 0.f;
      LAB_UNROLL
      for (int e = 0; e < C::kLanes; ++e) sums[i] += acc[i % R][i / R][e];
    }
    if constexpr (C::L == 32) scatter_sum<R * B>(sums, lane);
    if constexpr (C::S > 1) {
      auto& shared = smem<StreamSmem<C>>();
      if (b0 > 0) __syncthreads();                // the previous rows' sums have been read
      if (lane < R * B) shared.partial[group][lane] = sums[0];
      __syncthreads();
      if (slice == 0 && lane < R * B) {
        LAB_UNROLL
        for (int s = 1; s < C::S; ++s) sums[0] += shared.partial[group + s][lane];
      }
    }

    // 4. Store: neighbouring lanes store neighbouring outputs, R of them per row of x.
    LAB_UNROLL
    for (int j = 0; j < kMine; ++j) {
      const int i = lane + j, out_row = row + i % R, b = b0 + i / R;
      if (slice == 0 && i < R * B && out_row < n && b < rows) {
        store_output(y, size_t(b) * n + out_row, sums[j], bias, out_row, out_f32);
      }
    }
  }
}

// ---- many rows of x: tensor cores, both operands through shared memory -----------------------------------------------

// The 16-row operand of the multiply is w, and x the 8-column one ("swap AB"), so that few rows of x waste little.
// M: tiles of 16 rows of w. B: tiles of 8 rows of x. Warps share k, each with a cp.async pipeline of its own and no
// barrier before the end. A stage holds 64 elements (128 bytes) of each row.
template <int M_, int B_, int Warps, int Stages>
struct Mma {
  static constexpr int M = M_, B = B_, kWarps = Warps, kStages = Stages;
  static constexpr int kRows = M * 16, kBatch = B * 8, kDepth = 64;
};

template <typename T, typename C>
struct MmaSmem {
  union {
    T tile[C::kWarps][C::kStages][C::kRows + C::kBatch][C::kDepth];  // rows of w, then rows of x
    float partial[C::kWarps][C::kBatch][C::kRows + 4];               // 4 more: a warp's stores meet no bank twice
  };
};

// Place of the 16-byte chunk c of a row: odd rows swap their halves, so that the 8 lanes of a phase, which read 64 bytes
// of two neighbouring rows, meet every bank once.
LAB_DEVICE int swizzle(int row, int c) { return c ^ (row % 2 * 4); }

template <typename T, typename C, bool kAligned>
__global__ void __launch_bounds__(C::kWarps * 32)
    linear_mma_kernel(const T* x, const T* w, const T* bias, void* y, int rows, int n, int k, bool out_f32) {
  // 1. Locate: the block owns kRows rows of w; warp i takes the 64-element chunks i, i + kWarps, ... of k.
  constexpr int N = Vec<T>::size, kDepth = C::kDepth;
  auto& shared = smem<MmaSmem<T, C>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int row0 = blockIdx.x * C::kRows;
  const int chunks = (k + kDepth - 1) / kDepth;
  float acc[C::M][C::B][4] = {};

  // 2. Stream: kStages - 1 stages are in flight while one is multiplied; whatever lies outside w or x becomes zero. A lane
  // copies chunk c of every fourth row, so its place in the swizzle never changes.
  const int c = lane % 8, copy_row = lane / 8;
  const auto copy = [&](T(*tile)[kDepth], const T* from, int count, int limit, int chunk) {
    const int col = chunk * kDepth + c * N;
    const T* source = from + size_t(copy_row) * k + col;
    T* target = &tile[copy_row][swizzle(copy_row, c) * N];
    const int valid_rows = col < k ? limit - copy_row : 0;
    LAB_UNROLL
    for (int i = 0; i < count; i += 4, source += 4 * size_t(k), target += 4 * kDepth) {
      const bool valid = i < valid_rows;
      if constexpr (kAligned) {
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
  };
  const auto copy_w = [&](int i) {
    const int chunk = warp + i * C::kWarps;
    if (chunk < chunks) copy(shared.tile[warp][i % C::kStages], w + size_t(row0) * k, C::kRows, n - row0, chunk);
  };
  const auto copy_x = [&](int i) {
    const int chunk = warp + i * C::kWarps;
    if (chunk < chunks) copy(shared.tile[warp][i % C::kStages] + C::kRows, x, C::kBatch, rows, chunk);
  };
  for (int i = 0; i < C::kStages - 1; ++i) copy_w(i);  // before the wait: weights depend on no earlier kernel
  pdl_wait();
  for (int i = 0; i < C::kStages - 1; ++i) {
    copy_x(i);
    cp_async_commit();
  }
  for (int i = 0; warp + i * C::kWarps < chunks; ++i) {
    cp_async_wait<C::kStages - 2>();
    __syncwarp();                                 // stage i has landed for all lanes, and all are done with stage i - 1
    copy_w(i + C::kStages - 1);
    copy_x(i + C::kStages - 1);
    cp_async_commit();
    const auto* tile = shared.tile[warp][i % C::kStages];
    // A lane takes 8 neighbouring elements of k from each row, enough for two multiplies: which column of the multiply an
    // element plays is free, as long as w and x agree.
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
  pdl_launch_dependents();

  // 3. Reduce: the warps' sums meet in shared memory, where the tiles were.
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

  // 4. Store: neighbouring threads store neighbouring outputs; the warps' sums are added in a fixed order.
  for (int i = threadIdx.x; i < C::kRows * C::kBatch; i += C::kWarps * 32) {
    const int r = i % C::kRows, b = i / C::kRows;
    if (row0 + r >= n || b >= rows) continue;
    float sum = 0.f;
    LAB_UNROLL
    for (int s = 0; s < C::kWarps; ++s) sum += shared.partial[s][b][r];
    store_output(y, size_t(b) * n + row0 + r, sum, bias, row0 + r, out_f32);
  }
}

// ---- launch ----------------------------------------------------------------------------------------------------------

namespace {

struct Arguments {
  Ptr x, w, bias, y;
  int rows, n, k;
  bool out_f32;
  Ptr stream;
};

template <typename T, typename C>
void launch_stream(const Arguments& a) {
  launch({dim3(ceil_div(a.n, C::kRowsPerBlock)), dim3(C::kThreads), C::S > 1 ? sizeof(StreamSmem<C>) : 0, a.stream},
         "linear_stream_kernel", linear_stream_kernel<T, C>, as<const T>(a.x), as<const T>(a.w), as<const T>(a.bias),
         as<void>(a.y), a.rows, a.n, a.k, a.out_f32);
}

template <typename T, int N, int B>
void few_rows(const Arguments& a) {
  if constexpr (kHost) {                          // a CPU thread per 4 rows: nothing to reduce across threads
    if (cpu_shapes()) return launch_stream<T, Stream<N, B, 4, 1, 1, 1, 8>>(a);
  }
  if (N > 1 && a.n < 4 * 16 * 132) {              // less than 16 warps for each of 132 multiprocessors: 4 share each row
    if constexpr (N > 1) launch_stream<T, Stream<N, B, 4, 32, 4, 2, 128>>(a);
  } else {
    launch_stream<T, Stream<N, B, 4, 32, 1, 2, 128>>(a);
  }
}

template <typename T, typename C, bool kAligned>
void launch_mma(const Arguments& a) {
  launch({dim3(ceil_div(a.n, C::kRows)), dim3(C::kWarps * 32), sizeof(MmaSmem<T, C>), a.stream}, "linear_mma_kernel",
         linear_mma_kernel<T, C, kAligned>, as<const T>(a.x), as<const T>(a.w), as<const T>(a.bias), as<void>(a.y),
         a.rows, a.n, a.k, a.out_f32);
}

template <typename T>
void many_rows(const Arguments& a) {
  // More rows of w per block read x less often from L2; fewer give more blocks. Shared memory: 64, 96, 144, 96 KiB.
  const bool aligned = a.k % Vec<T>::size == 0;
  if (a.rows <= 16) return aligned ? launch_mma<T, Mma<1, 2, 4, 4>, true>(a) : launch_mma<T, Mma<1, 2, 4, 4>, false>(a);
  if (a.rows <= 32 && aligned) return launch_mma<T, Mma<2, 4, 4, 3>, true>(a);
  if (!aligned) return launch_mma<T, Mma<2, 8, 4, 3>, false>(a);
  if (a.n < 64 * 2 * 132) return launch_mma<T, Mma<2, 8, 4, 3>, true>(a);
  launch_mma<T, Mma<4, 8, 2, 3>, true>(a);
}

}  // namespace

void linear(Ptr x, Ptr w, Ptr bias, Ptr y, int rows, int n, int k, int dtype, int out_dtype, Ptr stream_) {
  if (rows == 0 || n == 0) return;
  const Arguments a{x, w, bias, y, rows, n, k, out_dtype == int(DType::f32), stream_};
  by_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (sizeof(T) == 2) {
      if (rows > 8) return many_rows<T>(a);
    }
    by_width<T>([&](auto width) {
      constexpr int N = decltype(width)::value;
      if (rows == 1) return few_rows<T, N, 1>(a);
      if (rows == 2) return few_rows<T, N, 2>(a);
      if (rows <= 4) return few_rows<T, N, 4>(a);
      few_rows<T, N, 8>(a);                         // float32 of more rows: again for each 8, with w from L2
    }, k);
  });
}
