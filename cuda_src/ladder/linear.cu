// The ladder of linear: y[b, n] = sum over k of x[b, k] * w[n, k] (+ bias[n]), from one thread per output to
// tensor cores.
//
//   Each rung changes one thing of the rung before it. What it should gain, and why: lab/rungs/.
//   All rungs but the last two read w once for every row of x; the ladder is measured with one row, tensor
//   cores with 8, and the rungs 2, 3, 6 and 7 with matrices of more or fewer rows, where they matter.
//   twin  triton_kernels/ladder/linear.py          the op's own kernel  cuda_src/linear.cu
#include "../common.cuh"
#include "../sizes.h"
#include "launchers.h"

using namespace lab;

namespace {

template <typename T>
struct Problem {
  const T *x, *w, *bias;
  void* y;
  int rows, n, k;
  bool out_f32;

  LAB_DEVICE void put(int b, int row, float sum) const {
    if (bias) sum += to_float(bias[row]);
    const size_t i = size_t(b) * n + row;
    if (out_f32) {
      static_cast<float*>(y)[i] = sum;
    } else {
      static_cast<T*>(y)[i] = from_float<T>(sum);
    }
  }
};

// 1. Naive: one thread per output goes through its row of w alone. The 32 lanes of a warp read addresses a
// whole row apart, so one load of the warp touches 32 lines of memory and uses 2 bytes of each.
template <typename T>
__global__ void linear_naive_kernel(Problem<T> p) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x, b = blockIdx.y;
  if (row >= p.n) return;
  float sum = 0.f;
  for (int c = 0; c < p.k; ++c) {
    sum = fmadd(to_float(p.w[size_t(row) * p.k + c]), to_float(p.x[size_t(b) * p.k + c]), sum);
  }
  p.put(b, row, sum);
}

// 2. Shared memory: a warp first copies a tile of 32 rows into shared memory, where neighbouring lanes read
// neighbouring elements; then each thread goes through its row there. Rows are 64 elements apart, a multiple
// of the 32 banks of 4 bytes: all lanes read from the same bank, one after the other.
constexpr int kTileRows = 32, kTileCols = 64;

template <typename T, int Pad>
struct Tile {
  T w[kTileRows][kTileCols + Pad];
};

template <typename T, int Pad>
__global__ void linear_tile_kernel(Problem<T> p) {
  auto& tile = smem<Tile<T, Pad>>().w;
  const int row0 = blockIdx.x * kTileRows, b = blockIdx.y;
  float sum = 0.f;
  for (int c0 = 0; c0 < p.k; c0 += kTileCols) {
    __syncthreads();  // all threads are done with the preceding tile
    LAB_UNROLL
    for (int i = 0; i < kTileCols; ++i) {  // an element a thread and step, 32 neighbours at a time
      const int r = i * kTileRows / kTileCols, c = (i * kTileRows + threadIdx.x) % kTileCols;
      const bool inside = row0 + r < p.n && c0 + c < p.k;
      tile[r][c] = inside ? p.w[size_t(row0 + r) * p.k + c0 + c] : from_float<T>(0.f);
    }
    __syncthreads();
    for (int c = 0; c < kTileCols && c0 + c < p.k; ++c) {
      sum = fmadd(to_float(tile[threadIdx.x][c]), to_float(p.x[size_t(b) * p.k + c0 + c]), sum);
    }
  }
  if (row0 + int(threadIdx.x) < p.n) p.put(b, row0 + threadIdx.x, sum);
}

// 3. Padded: the kernel of rung 2 with rows that are one bank (4 bytes) longer. Lane r now starts at bank r,
// so that the 32 lanes read from 32 different banks.
template <typename T>
constexpr int kOneBank = 4 / int(sizeof(T));

// 4. Warp reduction: a warp per output. Its lanes read neighbouring elements directly into registers, each
// sums its own, and five shuffles add the lanes. No shared memory, no barrier.
constexpr int kWarps = 4;

template <typename T>
__global__ void linear_warp_kernel(Problem<T> p) {
  const int lane = threadIdx.x % 32, row = blockIdx.x * kWarps + threadIdx.x / 32, b = blockIdx.y;
  if (row >= p.n) return;
  float sum = 0.f;
  for (int c = lane; c < p.k; c += 32) {
    sum = fmadd(to_float(p.w[size_t(row) * p.k + c]), to_float(p.x[size_t(b) * p.k + c]), sum);
  }
  sum = group_sum<32>(sum);
  if (lane == 0) p.put(b, row, sum);
}

// 5. Vectorised: each lane loads 16 bytes at once, so a warp's load is 512 bytes and there are 8 times fewer
// of them.
template <typename T>
LAB_DEVICE float dot(const Vec<T>& w, const Vec<T>& x, float sum) {
  LAB_UNROLL
  for (int e = 0; e < Vec<T>::size; ++e) sum = fmadd(to_float(w.v[e]), to_float(x.v[e]), sum);
  return sum;
}

template <typename T>
__global__ void linear_vector_kernel(Problem<T> p) {
  constexpr int N = Vec<T>::size;
  const int lane = threadIdx.x % 32, row = blockIdx.x * kWarps + threadIdx.x / 32, b = blockIdx.y;
  if (row >= p.n) return;
  float sum = 0.f;
  for (int c = lane * N; c < p.k; c += 32 * N) {
    sum = dot(load_stream(p.w + size_t(row) * p.k + c), load(p.x + size_t(b) * p.k + c), sum);
  }
  sum = group_sum<32>(sum);
  if (lane == 0) p.put(b, row, sum);
}

// 6. Pipeline: cp.async keeps kStages - 1 loads of each lane in flight while one is used, however the
// compiler unrolls the loop. x takes the same way: a plain load of it in the loop would wait for L2 each time,
// and the copies of w with it. A lane reads only what it copied itself, so it waits for its own copies only,
// without a barrier.
constexpr int kStages = 8;

template <typename T>
struct Ring {
  T w[kStages][kWarps * 32][Vec<T>::size], x[kStages][kWarps * 32][Vec<T>::size];
  float scratch[kWarps];
};

// The sum over columns first, first + step, ...
template <typename T>
LAB_DEVICE float streamed(Ring<T>& ring, const T* w, const T* x, int k, int first, int step) {
  const auto copy = [&](int i) {
    if (const int c = first + i * step; c < k) {
      cp_async16(ring.w[i % kStages][threadIdx.x], w + c);
      cp_async16(ring.x[i % kStages][threadIdx.x], x + c);
    }
    cp_async_commit();
  };
  for (int i = 0; i < kStages - 1; ++i) copy(i);
  float sum = 0.f;
  for (int i = 0; first + i * step < k; ++i) {
    cp_async_wait<kStages - 2>();
    sum = dot(load(ring.w[i % kStages][threadIdx.x]), load(ring.x[i % kStages][threadIdx.x]), sum);
    copy(i + kStages - 1);
  }
  return sum;
}

template <typename T>
__global__ void linear_pipeline_kernel(Problem<T> p) {
  constexpr int N = Vec<T>::size;
  const int lane = threadIdx.x % 32, row = blockIdx.x * kWarps + threadIdx.x / 32, b = blockIdx.y;
  if (row >= p.n) return;
  const float sum = group_sum<32>(
      streamed(smem<Ring<T>>(), p.w + size_t(row) * p.k, p.x + size_t(b) * p.k, p.k, lane * N, 32 * N));
  if (lane == 0) p.put(b, row, sum);
}

// 7. Split-K: the four warps of a block share one row, a quarter of k each; their sums are added in shared
// memory, in a fixed order. Four times as many warps keep the memory busy.
template <typename T>
__global__ void linear_split_kernel(Problem<T> p) {
  constexpr int N = Vec<T>::size, kThreads = kWarps * 32;
  auto& ring = smem<Ring<T>>();
  const int row = blockIdx.x, b = blockIdx.y;
  const float mine =
      streamed(ring, p.w + size_t(row) * p.k, p.x + size_t(b) * p.k, p.k, threadIdx.x * N, kThreads * N);
  const float sum = block_sum<kThreads>(mine, ring.scratch);
  if (threadIdx.x == 0) p.put(b, row, sum);
}

// 8. Tensor cores: a warp multiplies 16 rows of w with 8 rows of x at a time, so w is read once for up to 8
// sequences, and thousands of multiplies are one instruction. Lane (g, t) loads 8 neighbouring elements of a
// row, enough for two multiplies. Any assignment of elements to columns of the multiply is right, as long as
// w and x use the same. Warps split k as in rung 7.
constexpr int kMmaRows = 16, kMmaBatch = 8;

struct MmaSums { float warp[kWarps][kMmaBatch][kMmaRows]; };

template <typename T>
__global__ void linear_mma_kernel(Problem<T> p) {
  constexpr int N = Vec<T>::size, kStep = 4 * N;
  auto& sums = smem<MmaSums>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int row0 = blockIdx.x * kMmaRows, b0 = blockIdx.y * kMmaBatch;
  const auto fragment = [&](const T* matrix, int row, int rows, int c) {  // zeros outside the matrix
    return row < rows && c < p.k ? bit_cast<uint4>(load(matrix + size_t(row) * p.k + c))
                                 : bit_cast<uint4>(Vec<T>{});
  };
  float acc[4] = {};
  for (int c0 = warp * kStep; c0 < p.k; c0 += kWarps * kStep) {
    const int c = c0 + t * N;
    const uint4 low = fragment(p.w, row0 + g, p.n, c), high = fragment(p.w, row0 + 8 + g, p.n, c);
    const uint4 x = fragment(p.x, b0 + g, p.rows, c);
    mma_m16n8k16(acc, {low.x, high.x, low.y, high.y}, {x.x, x.y}, T{});
    mma_m16n8k16(acc, {low.z, high.z, low.w, high.w}, {x.z, x.w}, T{});
  }
  LAB_UNROLL
  for (int i = 0; i < 4; ++i) sums.warp[warp][2 * t + i % 2][g + i / 2 * 8] = acc[i];
  __syncthreads();
  const int r = threadIdx.x % kMmaRows, b = threadIdx.x / kMmaRows;  // 128 threads, 128 outputs
  float sum = 0.f;
  LAB_UNROLL
  for (int s = 0; s < kWarps; ++s) sum += sums.warp[s][b][r];
  if (row0 + r < p.n && b0 + b < p.rows) p.put(b0 + b, row0 + r, sum);
}

}  // namespace

void linear_ladder(int rung, const LinearArgs& a) {
  by_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool out_f32 = a.out_dtype == int(DType::f32);
    const Problem<T> p{
        as<const T>(a.x), as<const T>(a.w.data), as<const T>(a.bias), as<void>(a.y), a.rows, a.n, a.k,
        out_f32};
    const auto start = [&](const char* name, auto kernel, int outputs_per_block, int threads,
                           size_t smem_bytes) {
      launch({dim3(ceil_div(a.n, outputs_per_block), a.rows), dim3(threads), smem_bytes, a.stream}, name,
             kernel, p);
    };
    constexpr int kThreads = kWarps * 32, kPad = kOneBank<T>;
    switch (rung) {
      case 1: return start("linear_naive_kernel", linear_naive_kernel<T>, 32, 32, 0);
      case 2: return start("linear_tile_kernel", linear_tile_kernel<T, 0>, 32, 32, sizeof(Tile<T, 0>));
      case 3: return start("linear_tile_kernel", linear_tile_kernel<T, kPad>, 32, 32, sizeof(Tile<T, kPad>));
      case 4: return start("linear_warp_kernel", linear_warp_kernel<T>, kWarps, kThreads, 0);
      case 5: return start("linear_vector_kernel", linear_vector_kernel<T>, kWarps, kThreads, 0);
      case 6:
        return start("linear_pipeline_kernel", linear_pipeline_kernel<T>, kWarps, kThreads, sizeof(Ring<T>));
      case 7: return start("linear_split_kernel", linear_split_kernel<T>, 1, kThreads, sizeof(Ring<T>));
      case 8:
        if constexpr (sizeof(T) == 2) {
          return launch({dim3(ceil_div(a.n, kMmaRows), ceil_div(a.rows, kMmaBatch)), dim3(kThreads),
                         sizeof(MmaSums), a.stream},
                        "linear_mma_kernel", linear_mma_kernel<T>, p);
        }
    }
    throw std::invalid_argument("linear_ladder: no rung " + std::to_string(rung) + " for this dtype");
  });
}
