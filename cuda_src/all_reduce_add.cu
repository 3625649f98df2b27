// all_reduce_add: residual[i] = T(residual[i] + the sum over ranks of their partial[i]), summed in the order of
// ranks
//
//   partial, residual [words] pieces of 32 bits: one float32 or two 16-bit elements
//   mapping   two words a thread, at most 128 blocks; word i belongs to the same block in every launch
//   traffic   partial and residual read once, residual written; over the link 8 bytes a word to each rank, or
//             in two shots twice as much a word to one rank on average
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
    store(residual + i / 2 * N, exchange.add_of_ranks(before, mine, i));
  }
  exchange.finish();
}

// The same in two shots, for many bytes among more than two ranks: a word crosses the link twice, and each rank
// sends and receives 2 (ranks - 1) / ranks of the words instead of ranks - 1 times all of them.
template <typename T>
__global__ void __launch_bounds__(kExchangeThreads)
    all_reduce_add_two_shot_kernel(const T* partial, T* residual, PeerWords peers, int words) {
  constexpr int N = 8 / int(sizeof(T));
  using Elements = Vec<T, N>;

  // 1. Locate: this thread's pairs of words, and which rank adds the words that a block takes in a pass.
  const int first = (blockIdx.x * kExchangeThreads + threadIdx.x) * 2;
  constexpr int kStep = kExchangeBlocks * kExchangeWords;
  const auto owner = [&](int i) { return i / kExchangeWords % peers.ranks; };
  pdl_wait();
  pdl_launch_dependents();
  const BlockExchange exchange(peers);

  // 2. Send: this rank's values, each to the rank that adds them.
  for (int i = first; i < words; i += kStep) {
    if (owner(i) == exchange.rank) continue;
    exchange.send_to(owner(i), i, bit_cast<Vec<uint32_t, 2>>(load<N>(partial + i / 2 * N)));
  }

  // 3. Receive and add: this rank's share, in the order of ranks. All others get the new residual.
  for (int i = first; i < words; i += kStep) {
    if (owner(i) != exchange.rank) continue;
    const Elements before = load<N>(residual + i / 2 * N), mine = load<N>(partial + i / 2 * N);
    const Elements after = exchange.add_of_ranks(before, mine, i);
    exchange.send(i, bit_cast<Vec<uint32_t, 2>>(after));
    store(residual + i / 2 * N, after);
  }

  // 4. Gather: what the other ranks have added.
  for (int i = first; i < words; i += kStep) {
    if (owner(i) == exchange.rank) continue;
    store(residual + i / 2 * N, bit_cast<Elements>(exchange.receive(owner(i), i)));
  }
  exchange.finish();
}

void all_reduce_add(const AllReduceAddArgs& a) {
  if (a.words == 0) return;
  by_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto start = [&](const char* name, auto kernel) {
      launch(exchange_config(a.words, a.stream), name, kernel, as<const T>(a.partial), as<T>(a.residual),
             a.peers, a.words);
    };
    if (a.two_shot) {
      start("all_reduce_add_two_shot_kernel", all_reduce_add_two_shot_kernel<T>);
    } else {
      start("all_reduce_add_kernel", all_reduce_add_kernel<T>);
    }
  });
}
