// all_argmax: ids[r] = the index in the whole vocabulary of the largest logit that any rank has
//
//   logits [rows, n], this rank's share   ids [rows]: of the largest of them, or -1
//   mapping   one block, a thread for each row: two words, the logit and its index
//   traffic   one logit and one index of each row; over the link 16 bytes a row to each rank
//   contract  lab/ops/all_argmax.py          twin  triton_kernels/all_argmax.py
#include "common.cuh"
#include "core/exchange.cuh"
#include "launchers/all_argmax.h"

using namespace lab;

__global__ void __launch_bounds__(kExchangeThreads)
    all_argmax_kernel(const float* logits, int* ids, int rows, int n, int first, PeerWords peers) {
  // 1. Locate: thread -> row.
  const int r = threadIdx.x;
  pdl_wait();
  pdl_launch_dependents();
  const BlockExchange exchange(peers);
  if (r < rows) {
    // 2. Send: the largest logit of this rank's share, and its index in the vocabulary.
    const int id = ids[r];
    const float value = logits[size_t(r) * n + (id < 0 ? 0 : id)];
    const Vec<uint32_t, 2> mine{{bit_cast<uint32_t>(value), uint32_t(id < 0 ? -1 : first + id)}};
    exchange.send(2 * r, mine);

    // 3. Receive and compare: in the order of ranks, so that the lowest index wins a tie.
    float best = 0.f;
    int winner = 0;
    for (int from = 0; from < exchange.ranks; ++from) {
      const Vec<uint32_t, 2> theirs = from == exchange.rank ? mine : exchange.receive(from, 2 * r);
      const float logit = bit_cast<float>(theirs.v[0]);
      const int index = int(theirs.v[1]);
      if (index < 0) {
        winner = -1;  // NaN: the row has no token
      } else if (winner >= 0 && (from == 0 || logit > best)) {
        best = logit;
        winner = index;
      }
    }
    ids[r] = winner;
  }
  exchange.finish();
}

void all_argmax(const AllArgmaxArgs& a) {
  if (a.rows == 0) return;
  launch(exchange_config(2 * a.rows, a.stream), "all_argmax_kernel", all_argmax_kernel,
         as<const float>(a.logits), as<int>(a.ids), a.rows, a.n, a.first, a.peers);
}
