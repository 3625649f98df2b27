// all_reduce_add_rmsnorm: residual[r,:] = T(residual[r,:] + the sum over ranks of their partial[r,:]), summed in
// the order of ranks, then y[r,:] = T(residual[r,:] * rsqrt(mean(residual[r,:]^2) + eps)) * w
//
//   partial, residual, y [rows, words] pieces of 32 bits: one float32 or two 16-bit elements   w [words]
//   mapping   one block per row, two words a thread and pass; the row stays in registers
//   traffic   partial and residual read once, residual and y written, w once per row; over the link 8 bytes a
//             word to each rank
//   contract  lab/ops/all_reduce_add_rmsnorm.py          twin  triton_kernels/all_reduce_add_rmsnorm.py
#include "common.cuh"
#include "core/exchange.cuh"
#include "launchers/all_reduce_add_rmsnorm.h"

using namespace lab;

struct AllReduceAddRmsnormSmem { float scratch[32]; };

template <typename T, int Threads, int Passes>
__global__ void __launch_bounds__(Threads, 1)
    all_reduce_add_rmsnorm_kernel(const T* partial, T* residual, const T* w, T* y, PeerWords peers, int words,
                                  int cols, float eps) {
  constexpr int N = 8 / int(sizeof(T));  // elements of two words
  using Elements = Vec<T, N>;

  // 1. Locate: block r owns row r, and each of its threads the pairs of words that begin at word(p). In a slot
  // of the inbox a row begins with words of which no other row's block counts the launches. The weight depends
  // on no earlier kernel, so its loads are issued before the wait.
  const int row = blockIdx.x, counts = (words + kExchangeWords - 1) / kExchangeWords;
  const int slot = row * counts * kExchangeWords;
  const auto word = [&](int p) { return (p * Threads + int(threadIdx.x)) * 2; };
  partial += size_t(row) * cols;
  residual += size_t(row) * cols;
  y += size_t(row) * cols;
  Elements weight[Passes], mine[Passes], before[Passes];
  LAB_UNROLL
  for (int p = 0; p < Passes; ++p) {
    if (word(p) < words) weight[p] = load<N>(w + word(p) / 2 * N);
  }
  pdl_wait();
  pdl_launch_dependents();

  // 2. Send: this rank's values, to all others at once.
  BlockExchange exchange[Passes];
  LAB_UNROLL
  for (int p = 0; p < Passes; ++p) {
    if (word(p) >= words) continue;
    exchange[p] = BlockExchange(peers, row * counts + word(p) / kExchangeWords);
    mine[p] = load<N>(partial + word(p) / 2 * N);
    exchange[p].send(slot + word(p), bit_cast<Vec<uint32_t, 2>>(mine[p]));
  }

  // 3. Receive and add: in the order of ranks, so that all ranks get the same bits. The residual is loaded
  // before the wait, and gets the sum, rounded to T.
  LAB_UNROLL
  for (int p = 0; p < Passes; ++p) {
    if (word(p) < words) before[p] = load<N>(residual + word(p) / 2 * N);
  }
  float squares = 0.f;
  LAB_UNROLL
  for (int p = 0; p < Passes; ++p) {
    if (word(p) >= words) continue;
    before[p] = exchange[p].add_of_ranks(before[p], mine[p], slot + word(p));
    LAB_UNROLL
    for (int e = 0; e < N; ++e) {
      squares = fmadd(to_float(before[p].v[e]), to_float(before[p].v[e]), squares);
    }
    store(residual + word(p) / 2 * N, before[p]);
  }

  // 4. Reduce: the sum of squares in float32, over the warp and then over the block.
  const float total = block_sum<Threads>(squares, smem<AllReduceAddRmsnormSmem>().scratch);
  const float scale = rsqrtf(total / cols + eps);

  // 5. Scale and store: rounded to T before the weight, as in Hugging Face Llama. All threads have read the
  // counts of launches, so those grow.
  LAB_UNROLL
  for (int p = 0; p < Passes; ++p) {
    if (word(p) >= words) continue;
    LAB_UNROLL
    for (int e = 0; e < N; ++e) {
      mine[p].v[e] = normed_element<T>(to_float(before[p].v[e]), scale, to_float(weight[p].v[e]));
    }
    store(y + word(p) / 2 * N, mine[p]);
    if (word(p) % kExchangeWords == 0) *exchange[p].launches = exchange[p].tag;
  }
}

void all_reduce_add_rmsnorm(const AllReduceAddRmsnormArgs& a) {
  if (a.rows == 0) return;
  by_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto start = [&](auto threads, auto passes) {
      constexpr int Threads = decltype(threads)::value, Passes = decltype(passes)::value;
      Config config = exchange_config(a.rows * kExchangeWords, a.stream);  // a block for each row
      config.block = dim3(Threads);
      config.smem_bytes = sizeof(AllReduceAddRmsnormSmem);
      launch(config, "all_reduce_add_rmsnorm_kernel", all_reduce_add_rmsnorm_kernel<T, Threads, Passes>,
             as<const T>(a.partial), as<T>(a.residual), as<const T>(a.w), as<T>(a.y), a.peers, a.words,
             a.cols, a.eps);
    };
    const auto one = std::integral_constant<int, 1>{};
    const auto wide = std::integral_constant<int, 1024>{};
    if (a.words <= 512) {
      start(std::integral_constant<int, 256>{}, one);
    } else if (a.words <= 2048) {
      start(wide, one);
    } else if (a.words <= 4096) {
      start(wide, std::integral_constant<int, 2>{});
    } else {
      start(wide, std::integral_constant<int, 4>{});
    }
  });
}
