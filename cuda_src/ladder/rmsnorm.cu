// The ladder of rmsnorm: y[b, :] = T(x[b, :] * rsqrt(mean(x[b, :]^2) + eps)) * w, from one thread per row to
// reading the row only once.
//
//   Each rung changes one thing of the rung before it. What it should gain, and why: lab/rungs/.
//   x, y [rows, cols] contiguous; only the op's own kernel takes a residual, or the heads of q and k.
//   twin  triton_kernels/ladder/rmsnorm.py          the op's own kernel  cuda_src/rmsnorm.cu
#include "../common.cuh"
#include "../sizes.h"
#include "launchers.h"

using namespace lab;

namespace {

constexpr int kThreads = 256;

template <typename T>
struct Problem {
  const T *x, *w;
  T* y;
  int rows, cols;
  float eps;

  LAB_DEVICE float scale(float squares) const { return rsqrtf(squares / cols + eps); }
};

template <typename T>
LAB_DEVICE T normed(T x, float scale, T w) {
  return from_float<T>(to_float(from_float<T>(to_float(x) * scale)) * to_float(w));
}

// 1. Naive: one thread per row reads it twice, alone. 64 rows are two warps on a card of 132 multiprocessors,
// and the lanes of a warp read addresses a whole row apart.
template <typename T>
__global__ void rmsnorm_naive_kernel(Problem<T> p) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  const T* x = p.x + size_t(row) * p.cols;
  float squares = 0.f;
  for (int c = 0; c < p.cols; ++c) squares = fmadd(to_float(x[c]), to_float(x[c]), squares);
  const float scale = p.scale(squares);
  for (int c = 0; c < p.cols; ++c) p.y[size_t(row) * p.cols + c] = normed(x[c], scale, p.w[c]);
}

// For rungs 2 to 4: a block per row. They differ in how the threads' sums are added: Sum()(value, shared
// memory).
template <typename T, typename Sum>
__global__ void rmsnorm_block_kernel(Problem<T> p) {
  const T* x = p.x + size_t(blockIdx.x) * p.cols;
  float squares = 0.f;
  for (int c = threadIdx.x; c < p.cols; c += kThreads)
    squares = fmadd(to_float(x[c]), to_float(x[c]), squares);
  const float scale = p.scale(Sum()(squares, &smem<float>()));
  for (int c = threadIdx.x; c < p.cols; c += kThreads) {
    p.y[size_t(blockIdx.x) * p.cols + c] = normed(x[c], scale, p.w[c]);
  }
}

// 2. Shared memory: a block per row, neighbouring threads on neighbouring elements. The sums are added in
// shared memory by a tree over pairs that are 1, 2, 4 ... apart. In the step with distance s the working
// threads' floats are 2 s apart: up to 32 of them are in one bank.
struct PairwiseSum {
  LAB_DEVICE float operator()(float v, float* shared) const {
    shared[threadIdx.x] = v;
    for (int s = 1; s < kThreads; s *= 2) {
      __syncthreads();
      const int i = 2 * s * threadIdx.x;
      if (i + s < kThreads) shared[i] += shared[i + s];
    }
    __syncthreads();
    return shared[0];
  }
};

// 3. No bank conflicts: the same tree, but the pairs of a step are as far apart as there are threads left.
// Neighbouring threads use neighbouring floats, and so different banks.
struct HalvingSum {
  LAB_DEVICE float operator()(float v, float* shared) const {
    shared[threadIdx.x] = v;
    for (int s = kThreads / 2; s > 0; s /= 2) {
      __syncthreads();
      if (int(threadIdx.x) < s) shared[threadIdx.x] += shared[threadIdx.x + s];
    }
    __syncthreads();
    return shared[0];
  }
};

// 4. Warp reduction: shuffles add the lanes of a warp without memory or barrier; one exchange through shared
// memory adds the 8 warps.
struct ShuffleSum {
  LAB_DEVICE float operator()(float v, float* shared) const { return block_sum<kThreads>(v, shared); }
};

// 5. Vectorised: 16 bytes a thread and load, in both passes.
template <typename T>
__global__ void rmsnorm_vector_kernel(Problem<T> p) {
  constexpr int N = Vec<T>::size;
  const size_t row = size_t(blockIdx.x) * p.cols;
  float squares = 0.f;
  for (int c = threadIdx.x * N; c < p.cols; c += kThreads * N) {
    const Vec<T> v = load(p.x + row + c);
    LAB_UNROLL
    for (int e = 0; e < N; ++e) squares = fmadd(to_float(v.v[e]), to_float(v.v[e]), squares);
  }
  const float scale = p.scale(block_sum<kThreads>(squares, &smem<float>()));
  for (int c = threadIdx.x * N; c < p.cols; c += kThreads * N) {
    Vec<T> v = load(p.x + row + c);
    const Vec<T> w = load(p.w + c);
    LAB_UNROLL
    for (int e = 0; e < N; ++e) v.v[e] = normed(v.v[e], scale, w.v[e]);
    store(p.y + row + c, v);
  }
}

// 6. One read: the row stays in registers between the passes, and all its loads are in flight at once.
constexpr int kKeep = 4;  // vectors a thread holds

template <typename T>
__global__ void rmsnorm_register_kernel(Problem<T> p) {
  constexpr int N = Vec<T>::size;
  const size_t row = size_t(blockIdx.x) * p.cols;
  Vec<T> v[kKeep];
  float squares = 0.f;
  LAB_UNROLL
  for (int i = 0; i < kKeep; ++i) {
    const int c = (i * kThreads + threadIdx.x) * N;
    v[i] = c < p.cols ? load(p.x + row + c) : Vec<T>{};
  }
  LAB_UNROLL
  for (int i = 0; i < kKeep; ++i) {
    LAB_UNROLL
    for (int e = 0; e < N; ++e) squares = fmadd(to_float(v[i].v[e]), to_float(v[i].v[e]), squares);
  }
  const float scale = p.scale(block_sum<kThreads>(squares, &smem<float>()));
  LAB_UNROLL
  for (int i = 0; i < kKeep; ++i) {
    const int c = (i * kThreads + threadIdx.x) * N;
    if (c >= p.cols) continue;
    const Vec<T> w = load(p.w + c);
    LAB_UNROLL
    for (int e = 0; e < N; ++e) v[i].v[e] = normed(v[i].v[e], scale, w.v[e]);
    store(p.y + row + c, v[i]);
  }
}

}  // namespace

void rmsnorm_ladder(int rung, const RmsnormArgs& a) {
  if (a.rows == 0) return;
  by_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    const Problem<T> p{as<const T>(a.x), as<const T>(a.w), as<T>(a.y), a.rows, a.cols, a.eps};
    const auto start = [&](const char* name, auto kernel) {
      launch({dim3(a.rows), dim3(kThreads), kThreads * sizeof(float), a.stream}, name, kernel, p);
    };
    switch (rung) {
      case 1:
        return launch({dim3(ceil_div(a.rows, 32)), dim3(32), 0, a.stream}, "rmsnorm_naive_kernel",
                      rmsnorm_naive_kernel<T>, p);
      case 2: return start("rmsnorm_block_kernel", rmsnorm_block_kernel<T, PairwiseSum>);
      case 3: return start("rmsnorm_block_kernel", rmsnorm_block_kernel<T, HalvingSum>);
      case 4: return start("rmsnorm_block_kernel", rmsnorm_block_kernel<T, ShuffleSum>);
      case 5: return start("rmsnorm_vector_kernel", rmsnorm_vector_kernel<T>);
      case 6: return start("rmsnorm_register_kernel", rmsnorm_register_kernel<T>);
    }
    throw std::invalid_argument("rmsnorm_ladder: no rung " + std::to_string(rung));
  });
}
