// all_reduce_add: residual[i] = T(residual[i] + the sum over ranks of their partial[i]), summed in the order of
// ranks
//
//   partial, residual [words] pieces of 32 bits: one float32 or two 16-bit elements
//   mapping   two words a thread, at most 128 blocks; word i belongs to the same block in every launch
//   traffic   partial and residual read once, residual written; over the link 8 bytes a word to each rank
//   contract  lab/ops/all_reduce_add.py          twin  triton_kernels/all_reduce_add.py
#include "common.cuh"
#include "core/exchange.cuh"
#include "launchers/all_reduce_add.h"

using namespace lab;

template <typename T>
__global__ void __launch_bounds__(kExchangeThreads)
    all_reduce_add_kernel(const T* partial, T* residual, PeerWords peers, int words) {
  constexpr int N = 8 / int(sizeof(T));  // elements of two words
  using Elements = Vec<T, N>;

  // 1. Locate: this thread's pairs of words.
  const int first = (blockIdx.x * kExchangeThreads + threadIdx.x) * 2;
  constexpr int kStep = kExchangeBlocks * kExchangeWords;
  pdl_wait();
  pdl_launch_dependents();
  const BlockExchange exchange(peers);

  // 2. Send: this rank's values, to all others at once.
  for (int i = first; i < words; i += kStep) {
    exchange.send(i, bit_cast<Vec<uint32_t, 2>>(load<N>(partial + i / 2 * N)));
  }

  // 3. Receive and add: in the order of ranks, so that all ranks get the same bits. The residual is loaded
  // before the wait.
  for (int i = first; i < words; i += kStep) {
    const Elements before = load<N>(residual + i / 2 * N), mine = load<N>(partial + i / 2 * N);
    float sum[N] = {};
    for (int from = 0; from < exchange.ranks; ++from) {
      const Elements theirs = from == exchange.rank ? mine : bit_cast<Elements>(exchange.receive(from, i));
      LAB_UNROLL
      for (int e = 0; e < N; ++e) sum[e] += to_float(theirs.v[e]);
    }
    Elements after;
    LAB_UNROLL
    for (int e = 0; e < N; ++e) after.v[e] = from_float<T>(to_float(before.v[e]) + sum[e]);
    store(residual + i / 2 * N, after);
  }
  exchange.finish();
}

void all_reduce_add(const AllReduceAddArgs& a) {
  if (a.words == 0) return;
  by_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    launch(exchange_config(a.words, a.stream), "all_reduce_add_kernel", all_reduce_add_kernel<T>,
           as<const T>(a.partial), as<T>(a.residual), a.peers, a.words);
  });
}
