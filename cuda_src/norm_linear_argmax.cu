// norm_linear_argmax: ids[b] = argmax over n of logits[b, n],
// logits[b, n] = sum over k of xn[b, k] * w[n, k], xn = rmsnorm(x, norm_w)
//
//   x [rows, k]   norm_w [k]   w [n, k]   logits [rows, n] float32   ids [rows] int32     rows <= 64
//   scratch [rows, 2 * 4096 + 4] int32: element 8192 of the first row is a ticket; elements 8194 and 8195 of
//   each row are its best candidate so far (core/candidate.cuh)
//   normed [rows, k]: workspace, used on tensor cores
//   mapping   up to 2 rows, and float32: as norm_linear; more rows in half precision: rmsnorm's kernel, then
//             as linear; each block raises each row's best by atomicMax (a maximum is the same in every
//             order); the last block reads them
//             packed w (formats/): rmsnorm's kernel, linear's, and one that reads the logits again
//   traffic   w once (the only traffic that counts), logits written once
//   contract  lab/ops/norm_linear_argmax.py          twin  triton_kernels/norm_linear_argmax.py
#include "common.cuh"
#include "core/candidate.cuh"
#include "core/mma_rows.cuh"
#include "core/norm_rows.cuh"
#include "core/packed_linear.h"
#include "launchers/norm_linear_argmax.h"

using namespace lab;

// SCRATCH of the contract; only the Triton kernel uses all of it.
constexpr int kScratch = 2 * 4096 + 4;

LAB_DEVICE unsigned* ticket_of(int* scratch) { return reinterpret_cast<unsigned*>(scratch + kScratch - 4); }
LAB_DEVICE unsigned long long* best_of(int* scratch, int b) {
  return reinterpret_cast<unsigned long long*>(scratch + size_t(b) * kScratch + kScratch - 2);
}

// The last step of a block, called by all threads after their atomicMax. The block that draws the last ticket
// stores the ids and resets the scratch to zero.
LAB_DEVICE void finish_argmax(int* scratch, int* ids, int rows, int& last) {
  __syncthreads();
  if (threadIdx.x == 0) last = take_ticket(ticket_of(scratch)) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  for (int b = threadIdx.x; b < rows; b += blockDim.x) {
    const uint64_t top = atomicExch(best_of(scratch, b), 0ull);
    const bool nan = top >> 32 == 0xffffffffu;
    ids[b] = nan ? -1 : candidate_index(top);
  }
  if (threadIdx.x == 0) atomicExch(ticket_of(scratch), 0u);
}

template <typename T, typename C>
struct ArgmaxSmem {
  uint64_t best[C::kGroups][C::R * C::B];
  int last;
  NormSmem<T, C> norm;  // its end grows with k
};

template <typename T, typename C>
__global__ void __launch_bounds__(C::kThreads, C::kResident)
    norm_linear_argmax_kernel(const T* x, const T* norm_w, const T* w, float* logits, int* scratch, int* ids,
                              int rows, int n, int k, float eps) {
  // 1. Locate: R rows of w per lane group, a slice of k per lane.
  auto& shared = smem<ArgmaxSmem<T, C>>();
  RowStream<T, C> stream(shared.norm.stream, w, n, k);

  for (int b0 = 0; b0 < rows; b0 += C::B) {
    // 2. Norm: while the loads of the first weights are in flight. Rounded to T before and after norm_w.
    start_normed(stream, shared.norm, x, norm_w, b0, rows, eps);
    uint64_t best[C::kMine] = {};

    for (; stream.more(); stream.next()) {
      // 3. Multiply: weights are loaded from DRAM into registers, x from shared memory.
      float acc[C::R][C::B][C::kLanes] = {}, sums[C::R * C::B];
      stream.multiply(acc, 0, k,
                      [&](int b, int col) { return load_packed<C::N>(shared.norm.x + b * k + col); });

      // 4. Reduce: over the lanes and warps that share k, in a fixed order.
      stream.reduce(sums, acc);

      // 5. Store: the logits; each thread keeps its best candidate in a register.
      stream.each_output(b0, rows, [&](int j, int output, int b) {
        logits[size_t(b) * n + output] = sums[j];
        const uint64_t mine = candidate(sums[j], output);
        best[j] = mine > best[j] ? mine : best[j];
      });
    }

    // 6. Argmax in the last block: each block raises the best in memory by its own best; the last block reads
    // the result.
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
      atomicMax(best_of(scratch, b0 + b), static_cast<unsigned long long>(top));
    }
  }
  finish_argmax(scratch, ids, rows, shared.last);
}

template <typename T, typename C>
struct ArgmaxMmaSmem {
  MmaSmem<T, C> mma;
  int last;
};

template <typename T, typename C>
__global__ void __launch_bounds__(C::kThreads)
    norm_linear_argmax_mma_kernel(const T* xn, const T* w, float* logits, int* scratch, int* ids, int rows,
                                  int n, int k) {
  // 1. Locate: the block owns kRows rows of w; its teams share k.
  auto& shared = smem<ArgmaxMmaSmem<T, C>>();
  MmaRows<T, C> product(shared.mma, xn, w, rows, n, k);

  // 2. Norm: already done by rmsnorm's kernel. The copies of the first stages of w are issued before the wait
  // for it.
  product.start_w();
  pdl_wait();

  // 3. Multiply: w and x pass through shared memory to the tensor cores.
  product.start_x();
  product.multiply();

  // 4. Reduce: the teams' sums are added in shared memory, where the tiles were.
  product.reduce();

  // 5. Store: the logits; each thread keeps its candidates in registers.
  uint64_t best[MmaRows<T, C>::kMine] = {};
  product.each_output([&](int j, int r, int output, int b) {
    const float logit = product.product(r, b);
    logits[size_t(b) * n + output] = logit;
    best[j] = candidate(logit, output);
  });

  // 6. Argmax in the last block: lanes with the same row of x find their best and raise the best in memory by
  // it; the last block reads the result.
  product.each_row([&](int j, int b, int lanes) {
    const unsigned long long top = warp_best(best[j], lanes);
    if (threadIdx.x % lanes == 0 && b < rows) atomicMax(best_of(scratch, b), top);
  });
  product.finish();
  finish_argmax(scratch, ids, rows, shared.last);
}

// The argmax of logits that linear's kernel has stored: block x takes a part of each row of the logits, block
// y one row.
constexpr int kArgmaxThreads = 256, kArgmaxBlocks = 64;
__global__ void __launch_bounds__(kArgmaxThreads)
    argmax_of_logits_kernel(const float* logits, int* scratch, int* ids, int rows, int n) {
  pdl_wait();
  pdl_launch_dependents();
  int& last = smem<int>();
  const int b = blockIdx.x % rows;
  uint64_t best = 0;
  const int stride = gridDim.x / rows * blockDim.x;
  for (int i = blockIdx.x / rows * blockDim.x + threadIdx.x; i < n; i += stride) {
    const uint64_t one = candidate(logits[size_t(b) * n + i], i);
    best = one > best ? one : best;
  }
  best = warp_best(best);
  if (threadIdx.x % 32 == 0) atomicMax(best_of(scratch, b), static_cast<unsigned long long>(best));
  finish_argmax(scratch, ids, rows, last);
}

// With packed weights the product is linear's kernel, so that it exists once.
static void packed_argmax(const NormLinearArgmaxArgs& a) {
  norm_into("norm_linear_argmax", a);
  LinearArgs product{};
  product.x = a.normed, product.tiled = a.tiled, product.w = a.w, product.y = a.logits;
  product.rows = a.rows, product.n = a.n, product.k = a.k;
  product.dtype = a.dtype, product.out_dtype = int(DType::f32);
  product.stream = a.stream;
  packed_linear(product, 0);
  const int blocks = cpu_shapes() ? 1 : kArgmaxBlocks;
  launch({dim3(blocks * a.rows), dim3(cpu_shapes() ? 32 : kArgmaxThreads), sizeof(int), a.stream, true},
         "argmax_of_logits_kernel", argmax_of_logits_kernel, as<const float>(a.logits), as<int>(a.scratch),
         as<int>(a.out), a.rows, a.n);
}

void norm_linear_argmax(const NormLinearArgmaxArgs& a) {
  if (a.rows == 0 || a.n == 0) return;
  if (a.w.format != int(Format::plain)) return packed_argmax(a);
  by_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    const Settings tuned = settings::find("norm_linear_argmax", sizeof(T), a.rows, {a.n, a.k});
    if constexpr (sizeof(T) == 2) {
      if (a.rows > most_stream_rows()) {
        norm_into("norm_linear_argmax", a);
        return by_mma_shape<T, 1>(a.rows, a.n, a.k, tuned, [&](auto shape, unsigned cluster) {
          using C = typename decltype(shape)::type;
          launch(mma_config<C>(a.n, cluster, sizeof(ArgmaxMmaSmem<T, C>), a.stream),
                 "norm_linear_argmax_mma_kernel", norm_linear_argmax_mma_kernel<T, C>, as<const T>(a.normed),
                 as<const T>(a.w.data), as<float>(a.logits), as<int>(a.scratch), as<int>(a.out), a.rows, a.n,
                 a.k);
        });
      }
    }
    by_normed_shape<T, 1>(a.rows, a.n, a.k, tuned, [&](auto shape) {
      using C = typename decltype(shape)::type;
      const size_t bytes = sizeof(ArgmaxSmem<T, C>) + size_t(C::B) * a.k * sizeof(T);
      launch({dim3(stream_blocks<C>(a.n, true, tuned)), dim3(C::kThreads), bytes, a.stream, true},
             "norm_linear_argmax_kernel", norm_linear_argmax_kernel<T, C>, as<const T>(a.x),
             as<const T>(a.norm_w), as<const T>(a.w.data), as<float>(a.logits), as<int>(a.scratch),
             as<int>(a.out), a.rows, a.n, a.k, a.eps);
    });
  });
}
