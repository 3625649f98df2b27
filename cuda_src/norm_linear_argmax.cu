// norm_linear_argmax: ids[b] = argmax over n of logits[b, n], logits[b, n] = sum over k of xn[b, k] * w[n, k],
// xn = rmsnorm(x, norm_w)
//
//   x [rows, k]   norm_w [k]   w [n, k]   logits [rows, n] float32   ids [rows] int32     rows <= 64
//   scratch [rows, 2 * 4096 + 4] int32: of each block the value (float32 bits) and the index of its best, then a ticket
//   normed [rows, k]: workspace of the tensor-core path
//   mapping   up to 2 rows, and float32: as norm_linear; a block keeps its best, the last to finish compares them
//             more rows in float16 or bfloat16: the kernels of rmsnorm, linear and sample, one after the other
//   traffic   w once (the only traffic that counts), logits written once
//   contract  lab/ops/norm_linear_argmax.py          twin  triton_kernels/norm_linear_argmax.py
#include "candidate.cuh"
#include "common.cuh"
#include "launchers.h"
#include "norm_rows.cuh"

using namespace lab;

constexpr int kMaxBlocks = 4096;                  // MAX_BLOCKS of the contract
constexpr int kScratch = 2 * kMaxBlocks + 4;      // SCRATCH of the contract

template <typename T, typename C>
struct ArgmaxSmem {
  uint64_t best[C::kGroups][C::R * C::B];
  int last;
  NormSmem<T, C> norm;                            // its end grows with k
};

template <typename T, typename C>
__global__ void __launch_bounds__(C::kThreads, C::kResident)
    norm_linear_argmax_kernel(const T* x, const T* norm_w, const T* w, float* logits, int* scratch, int* ids, int rows,
                              int n, int k, float eps) {
  // 1. Locate: R rows of w per lane group, a slice of k per lane.
  auto& shared = smem<ArgmaxSmem<T, C>>();
  RowStream<T, C> stream(shared.norm.stream, w, n, k);

  for (int b0 = 0; b0 < rows; b0 += C::B) {
    // 2. Norm: the first weights are in flight meanwhile. Rounded to T before and after norm_w.
    start_normed(stream, shared.norm, x, norm_w, b0, rows, eps);
    uint64_t best[C::kMine] = {};

    for (; stream.more(); stream.next()) {
      // 3. Stream: weights from DRAM into registers, x from shared memory.
      float acc[C::R][C::B][C::kLanes] = {}, sums[C::R * C::B];
      stream.multiply(acc, 0, k, [&](int b, int col) { return load_packed<C::N>(shared.norm.x + b * k + col); });

      // 4. Reduce: over the lanes and warps that share k, in a fixed order.
      stream.reduce(sums, acc);

      // 5. Store: the logits; the best so far stays in a register.
      stream.each_output(b0, rows, [&](int j, int output, int b) {
        logits[size_t(b) * n + output] = sums[j];
        const uint64_t mine = candidate(sums[j], output);
        best[j] = mine > best[j] ? mine : best[j];
      });
    }

    // 6. Argmax in the last block: first of each block, then of all; a maximum is the same in every order.
    LAB_UNROLL
    for (int j = 0; j < C::kMine; ++j) {
      if (stream.lane + j < C::R * C::B) shared.best[stream.group][stream.lane + j] = best[j];
    }
    __syncthreads();
    for (int b = threadIdx.x; b < C::B && b0 + b < rows; b += C::kThreads) {
      uint64_t top = 0;
      for (int i = 0; i < C::kGroups * C::R; ++i) {
        const uint64_t other = shared.best[i / C::R][b * C::R + i % C::R];
        top = other > top ? other : top;
      }
      const int pair[2] = {bit_cast<int>(candidate_value(top)), candidate_index(top)};
      store(scratch + size_t(b0 + b) * kScratch + 2 * blockIdx.x, Vec<int, 2>{{pair[0], pair[1]}});
    }
  }
  unsigned* ticket = reinterpret_cast<unsigned*>(scratch + 2 * kMaxBlocks);
  __syncthreads();
  if (threadIdx.x == 0) shared.last = take_ticket(ticket) == gridDim.x - 1;
  __syncthreads();
  if (!shared.last) return;
  for (int b = threadIdx.x / 32; b < rows; b += C::kThreads / 32) {
    uint64_t top = 0;
    for (int block = threadIdx.x % 32; block < int(gridDim.x); block += 32) {
      const Vec<int, 2> pair = load<2>(scratch + size_t(b) * kScratch + 2 * block);
      const uint64_t other = candidate(bit_cast<float>(pair.v[0]), pair.v[1]);
      top = other > top ? other : top;
    }
    top = warp_best(top);
    const bool nan = top >> 32 == 0xffffffffu;
    if (threadIdx.x % 32 == 0) ids[b] = nan ? -1 : candidate_index(top);
  }
  if (threadIdx.x == 0) atomicExch(ticket, 0u);   // for the next launch
}

void norm_linear_argmax(Ptr x, Ptr norm_w, Ptr w, Ptr logits, Ptr scratch, Ptr normed, Ptr out, int rows, int n, int k,
                        float eps, int dtype, Ptr stream_) {
  if (rows == 0 || n == 0) return;
  by_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const Settings tuned = settings::find("norm_linear_argmax", sizeof(T), rows, {n, k});
    if (sizeof(T) == 2 && rows > most_stream_rows()) {
      need_normed("norm_linear_argmax", normed);
      rmsnorm(x, norm_w, 0, normed, rows, 1, k, k, k, eps, dtype, stream_);
      linear(normed, w, 0, logits, rows, n, k, dtype, int(DType::f32), stream_);
      return sample(logits, 0, out, rows, n, 0.f, 0, 1.f, 0, stream_);
    }
    by_normed_shape<T, 1>(rows, n, k, tuned, [&](auto shape) {
      using C = typename decltype(shape)::type;
      const int all = stream_blocks<C>(n, true, tuned), blocks = all < kMaxBlocks ? all : kMaxBlocks;
      const size_t bytes = sizeof(ArgmaxSmem<T, C>) + size_t(C::B) * k * sizeof(T);
      launch({dim3(blocks), dim3(C::kThreads), bytes, stream_, true}, "norm_linear_argmax_kernel",
             norm_linear_argmax_kernel<T, C>, as<const T>(x), as<const T>(norm_w), as<const T>(w), as<float>(logits),
             as<int>(scratch), as<int>(out), rows, n, k, eps);
    });
  });
}
