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
template <int N_, int B_, int R_, int L_, int S_, int U_>
struct Stream {
  static constexpr int N = N_, B = B_, R = R_, L = L_, S = S_, U = U_;
  static constexpr int kThreads = kHost ? 8 : 128;
  static constexpr int kGroups = kThreads / L;
  static constexpr int kRowsPerBlock = kGroups / S * R;
  static constexpr int kStep = S * L * N;         // elements of k that one access of all cooperating lanes covers
  // Partial sums per output: a CPU's vector unit needs independent lanes, a GPU thread is one lane.
  static constexpr int kLanes = kHost ? N : 1;
};

template <typename C>
struct StreamSmem {
  float partial[C::kGroups][C::R * C::B];
};

template <int N, typename T>
LAB_DEVICE Vec<T, N> load_weights(const T* p) {
  if constexpr (N * sizeof(T) == 16) {
    return load_stream(p);
  } else {
    return load<N>(p);
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
    Vec<T, N> weights[C::U][R];
    const auto fetch = [&](Vec<T, N>(&into)[R], int col) {
      if (col >= k) return;
      LAB_UNROLL
      for (int r = 0; r < R; ++r) into[r] = load_weights<N>(w_rows[r] + col);
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
          LAB_UNROLL
          for (int b = 0; b < B; ++b) {
            const Vec<T, N> xv = load<N>(x_rows[b] + col);
            LAB_UNROLL
            for (int r = 0; r < R; ++r) {
              LAB_UNROLL
              for (int e = 0; e < N; ++e) {
                float& a = acc[r][b][e % C::kLanes];
                a = fmadd(to_float(weights[u][r].v[e]), to_float(xv.v[e]), a);
              }
            }
          }
        }
        fetch(weights[u], col + C::U * C::kStep);
      }
    }
    pdl_launch_dependents();

    // 3. Reduce: over the lanes of a group, then over the groups that shared the row, in a fixed order.
    float sums[R * B];
    LAB_UNROLL
    for (int i = 0; i < R * B; ++i) {
      sums[i] = 0.f;
      LAB_UNROLL
      for (int e = 0; e < C::kLanes; ++e) sums[i] += acc[i % R][i / R][e];
    }
    if constexpr (C::L > 1) group_sum<C::L>(sums);
    if constexpr (C::S > 1) {
      auto& shared = smem<StreamSmem<C>>();
      if (b0 > 0) __syncthreads();                // the previous rows' sums have been read
      LAB_UNROLL
      for (int i = 0; i < R * B; ++i) {
        if (lane == i % C::L) shared.partial[group][i] = sums[i];
      }
      __syncthreads();
      LAB_UNROLL
      for (int i = 0; i < R * B; ++i) {
        if (slice != 0 || lane != i % C::L) continue;
        LAB_UNROLL
        for (int s = 1; s < C::S; ++s) sums[i] += shared.partial[group + s][i];
      }
    }

    // 4. Store: lane i stores sum i, so R neighbouring outputs leave together.
    LAB_UNROLL
    for (int i = 0; i < R * B; ++i) {
      const int out_row = row + i % R, b = b0 + i / R;
      if (slice == 0 && lane == i % C::L && out_row < n && b < rows) {
        store_output(y, size_t(b) * n + out_row, sums[i], bias, out_row, out_f32);
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

  // 2. Stream: kStages - 1 stages are in flight while one is multiplied; whatever lies outside w or x becomes zero.
  const auto copy = [&](T(*tile)[kDepth], const T* from, int count, int limit, int chunk) {
    const int c = lane % 8, col = chunk * kDepth + c * N;
    LAB_UNROLL
    for (int i = 0; i < count / 4; ++i) {
      const int row = i * 4 + lane / 8;
      const bool valid = row < limit && col < k;
      const T* source = from + (valid ? size_t(row) * k + col : 0);
      T* target = &tile[row][swizzle(row, c) * N];
      if constexpr (kAligned) {
        cp_async16(target, source, valid);
      } else {
        Vec<T> v{};
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
  if constexpr (kHost) {
    launch_stream<T, Stream<N, B, 4, 1, 1, 1>>(a);         // a CPU thread per 4 rows: nothing to reduce across threads
  } else if (N == 1 || a.n >= 4 * 16 * 132) {
    launch_stream<T, Stream<N, B, 4, 32, 1, 2>>(a);        // at least 16 warps on each of 132 multiprocessors
  } else if constexpr (N > 1) {
    launch_stream<T, Stream<N, B, 4, 32, 4, 2>>(a);        // few rows: 4 warps share each, to have as many loads in flight
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
