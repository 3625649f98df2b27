// Words that ranks send to each other. A word has 32 bits of data and a 32-bit tag, and is stored and loaded in
// one access, so the tag that a reader expects tells it that the data have arrived: no fence, no barrier, no
// host. lab/ops/exchange.py says where a word lies and why it is not overwritten too early.
#pragma once
#include "../common.cuh"
#include "../launchers/arguments.h"
#include "tagged_row.cuh"

namespace lab {

constexpr int kExchangeWords = 256;   // that a block exchanges at a time; WORDS of lab/ops/exchange.py
constexpr int kExchangeBlocks = 128;  // the most of a launch; BLOCKS there
constexpr int kExchangeThreads = kExchangeWords / 2;

// The inboxes of all ranks, for the words with one tag.
struct PeerSlots {
  const Ptr* inboxes;
  size_t capacity;
  int rank, ranks;
  uint32_t tag;

  PeerSlots() = default;
  LAB_DEVICE PeerSlots(const PeerWords& peers, uint32_t tag)
      : inboxes(reinterpret_cast<const Ptr*>(peers.inboxes)), capacity(peers.capacity), rank(peers.rank),
        ranks(peers.ranks), tag(tag) {}

  // The words in rank `to`'s inbox that rank `from` writes.
  LAB_DEVICE uint64_t* slot(int to, int from) const {
    return reinterpret_cast<uint64_t*>(inboxes[to]) + ((tag & 1) * ranks + from) * capacity;
  }
  // Calls f(rank) for all other ranks; each rank begins with another one.
  template <typename F>
  LAB_DEVICE void each_other(F f) const {
    for (int other = 1; other < ranks; ++other) f(rank + other < ranks ? rank + other : rank + other - ranks);
  }

  // The sum over all ranks, in their order, of a float32 that belongs to word i.
  LAB_DEVICE float total(int i, float mine) const {
    const uint64_t word = tagged(bit_cast<uint32_t>(mine), tag);
    each_other([&](int to) { store_peer_word(slot(to, rank) + i, word); });
    float sum = 0.f;
    for (int from = 0; from < ranks; ++from) {
      uint64_t theirs = word;
      if (from != rank) {
        const uint64_t* at = slot(rank, from) + i;
        for (uint32_t polls = 0; uint32_t((theirs = load_peer_word(at)) >> 32) != tag; ++polls) {
          peer_pause(polls, from);
        }
      }
      sum += bit_cast<float>(uint32_t(theirs));
    }
    return sum;
  }
};

// One block's part in an exchange: the words whose launches `block` counts.
struct BlockExchange : PeerSlots {
  uint32_t* launches;

  BlockExchange() = default;
  LAB_DEVICE explicit BlockExchange(const PeerWords& peers) : BlockExchange(peers, blockIdx.x) {}
  LAB_DEVICE BlockExchange(const PeerWords& peers, int block)
      : BlockExchange(peers, reinterpret_cast<uint32_t*>(peers.launches) + block) {}

  // Sends the data of words i (even) and i + 1 to rank `to`; to all other ranks.
  LAB_DEVICE void send_to(int to, int i, const Vec<uint32_t, 2>& data) const {
    store_peer_words(slot(to, rank) + i, tagged(data.v[0], tag), tagged(data.v[1], tag));
  }
  LAB_DEVICE void send(int i, const Vec<uint32_t, 2>& data) const {
    each_other([&](int to) { send_to(to, i, data); });
  }

  // The data of words i and i + 1 of rank `from`; waits until both have arrived.
  LAB_DEVICE Vec<uint32_t, 2> receive(int from, int i) const {
    const uint64_t* at = slot(rank, from) + i;
    uint64_t words[2];
    for (uint32_t polls = 0;; ++polls) {
      load_peer_words(words, at);
      if (uint32_t(words[0] >> 32) == tag && uint32_t(words[1] >> 32) == tag) break;
      peer_pause(polls, from);
    }
    return {{uint32_t(words[0]), uint32_t(words[1])}};
  }

  // T(before + the sum over ranks of words i and i + 1) for each element of the two words; `mine` are this
  // rank's. Summed in the order of ranks, so that all ranks get the same bits.
  template <typename T, int N>
  LAB_DEVICE Vec<T, N> add_of_ranks(const Vec<T, N>& before, const Vec<T, N>& mine, int i) const {
    float sum[N] = {};
    for (int from = 0; from < ranks; ++from) {
      const Vec<T, N> theirs = from == rank ? mine : bit_cast<Vec<T, N>>(receive(from, i));
      LAB_UNROLL
      for (int e = 0; e < N; ++e) sum[e] += to_float(theirs.v[e]);
    }
    Vec<T, N> after;
    LAB_UNROLL
    for (int e = 0; e < N; ++e) after.v[e] = from_float<T>(to_float(before.v[e]) + sum[e]);
    return after;
  }

  // Counts this launch. All threads of the block call it, after their last send and receive.
  LAB_DEVICE void finish() const {
    __syncthreads();  // all threads have read the count
    if (threadIdx.x == 0) *launches = tag;
  }

 private:
  LAB_DEVICE BlockExchange(const PeerWords& peers, uint32_t* launches)
      : PeerSlots(peers, *launches + 1), launches(launches) {}
};

// How to launch a kernel that exchanges this many words. A block waits for that of the same number on the other
// ranks, so there are few enough for all to run at the same time. (On a CPU they do in a cooperative launch,
// which takes 8; more run in their order, unless a random schedule is asked for.)
inline Config exchange_config(int words, Ptr stream) {
  const int wanted = (words + kExchangeWords - 1) / kExchangeWords;
  const int blocks = wanted < kExchangeBlocks ? wanted : kExchangeBlocks;
  Config config{dim3(blocks), dim3(kExchangeThreads)};
  config.stream = stream;
  config.pdl = true;
  config.cooperative = kHost && blocks <= 8;
  return config;
}

}  // namespace lab
