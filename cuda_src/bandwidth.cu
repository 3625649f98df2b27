// bandwidth: only reads, copies or writes a buffer. Its speed is the ceiling with which every other kernel is
// compared.
//
//   mapping   a block takes tiles of kUnroll * blockDim vectors of 16 bytes, grid-stride; every thread has
//             several independent accesses in flight, which on an H100 (4 blocks of 512 threads per SM)
//             hides the latency of DRAM
//   traffic   read: bytes. copy: bytes read + bytes written. write: bytes. Times `passes`
//   link      how long a word takes to another GPU
//   used by   lab/harness/ceiling.py and exchange_bench.py          twin  triton_kernels/bandwidth.py
#include "common.cuh"
#include "core/exchange.cuh"
#include "launchers/bandwidth.h"

namespace lab {
namespace {

constexpr int kUnroll = 8;
enum Mode { kRead = 0, kCopy = 1, kWrite = 2 };

template <int M>
LAB_DEVICE Vec<uint32_t> take(const uint32_t* src, int64_t at) {
  if constexpr (M == kWrite) {
    // Varied data: writing zeros is cheaper.
    return {{uint32_t(at), uint32_t(at) * 2654435761u, ~uint32_t(at), 0x9e3779b9u}};
  } else {
    return load_stream(src + at * 4);
  }
}

// With passes = 2 a kernel takes twice as long as it should. A test of the harness uses that.
template <int M>
__global__ void bandwidth_kernel(const uint32_t* src, uint32_t* dst, int64_t vectors, int passes) {
  const int64_t tile = int64_t(kUnroll) * blockDim.x;
  uint32_t folded = 0;
  const auto put = [&](int64_t at, const Vec<uint32_t>& v) {
    if constexpr (M == kRead) {
      folded ^= v.v[0] ^ v.v[1] ^ v.v[2] ^ v.v[3];
    } else {
      store(dst + at * 4, v);
    }
  };
  for (int pass = 0; pass < passes; ++pass) {
    // 1. Locate: block b takes the tiles b, b + gridDim, ...; neighbouring threads take neighbouring vectors.
    for (int64_t first = blockIdx.x * tile; first < vectors; first += gridDim.x * tile) {
      const int64_t mine = first + threadIdx.x;
      if (first + tile <= vectors) {
        // 2. Load: a whole tile needs no bounds checks, so all its loads are issued before the first is used.
        Vec<uint32_t> v[kUnroll];
        LAB_UNROLL
        for (int i = 0; i < kUnroll; ++i) v[i] = take<M>(src, mine + i * int64_t(blockDim.x));
        // 3. Use: combine into a register, or store.
        LAB_UNROLL
        for (int i = 0; i < kUnroll; ++i) put(mine + i * int64_t(blockDim.x), v[i]);
      } else {  // the tail
        for (int64_t at = mine; at < vectors; at += blockDim.x) put(at, take<M>(src, at));
      }
    }
  }
  // Keeps the compiler from removing the loads; on random data one thread in 2^32 stores.
  if (M == kRead && folded == 0x5bd1e995u) dst[0] = folded;
}

// A word goes from rank 0 to rank 1 and back, `rounds` times.
__global__ void link_latency_kernel(PeerWords peers, int rounds) {
  BlockExchange exchange(peers);
  if (threadIdx.x == 0) {
    const int other = 1 - exchange.rank;
    for (int round = 0; round < rounds; ++round) {
      if (round) ++exchange.tag;
      if (exchange.rank == 1) exchange.receive(other, 0);
      exchange.send(0, {{uint32_t(round), 0}});
      if (exchange.rank == 0) exchange.receive(other, 0);
    }
  }
  exchange.finish();
}

}  // namespace
}  // namespace lab

void link_latency(const LinkLatencyArgs& a) {
  using namespace lab;
  if (a.peers.ranks != 2 || a.rounds < 1) throw std::invalid_argument("link_latency: two ranks, rounds >= 1");
  launch(exchange_config(2, a.stream), "link_latency_kernel", link_latency_kernel, a.peers, a.rounds);
}

void bandwidth(const BandwidthArgs& a) {
  using namespace lab;
  const auto run = [&](const char* name, auto* kernel) {
    launch(Config{dim3(a.blocks), dim3(a.threads), 0, a.stream}, name, kernel, as<const uint32_t>(a.src),
           as<uint32_t>(a.dst), a.bytes / 16, a.passes);
  };
  switch (a.mode) {
    case kRead: return run("bandwidth_read", &bandwidth_kernel<kRead>);
    case kCopy: return run("bandwidth_copy", &bandwidth_kernel<kCopy>);
    case kWrite: return run("bandwidth_write", &bandwidth_kernel<kWrite>);
    default: throw std::invalid_argument("bandwidth: mode is 0 (read), 1 (copy) or 2 (write)");
  }
}
