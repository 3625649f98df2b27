// Kernels with a planted bug each, and their clean versions. `planted CASE` runs one: exit code 0 when the
// result is right, 1 when it is wrong, 2 when the launch failed (its message goes to stderr), 3 when a clean
// kernel run after that did not work. Comments `line:` mark the places that a report must name.
#include <cmath>
#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "common.cuh"
#include "core/wgmma.cuh"

using namespace lab;

namespace {

enum class Bug {
  none,
  no_barrier,       // a tile is read before all have written it
  no_wait,          // cp.async is never waited for
  short_wait,       // one group fewer than needed
  no_last_barrier,  // the next tile overwrites one that is still being read
  lower_neighbour,  // no barrier either, but whoever runs in order finds what it needs
  exits_early,      // half of the block returns before a barrier
  waits_elsewhere,  // half of the block waits at another barrier
  two_places,       // both branches of an if have a barrier
  small_overrun,    // one float past the end of shared memory
  slack_overrun,    // the same, where the size is no multiple of the alignment
  read_overrun,     // far past the end, reading
  wild_pointer,     // an index into global memory gone wrong
  deep_recursion,
  division_by_zero,
  too_little_smem,   // the launch gives less than the kernel's struct
  outside_copy,      // cp.async to beyond shared memory
  lane_exits,        // a lane leaves before a shuffle
  no_fence,          // a partial result is published without a fence
  plain_store,       // blocks store to one place
  wrong_count,       // an mbarrier expects more arrivals than come
  no_init,           // an mbarrier is not initialised
  read_before_copy,  // a bulk copy is read without waiting on its mbarrier
  early_copy,        // the next tile is sent for while wgmma still reads the one it replaces
};

constexpr int kThreads = 128;

// Whose values a thread reads.
template <Bug bug>
LAB_HOST_DEVICE int partner(int tid) {
  return bug == Bug::lower_neighbour ? (tid > 0 ? tid - 1 : 0) : (tid + 37) % kThreads;
}

struct TileShared { alignas(16) float tile[2][kThreads][4]; };

// Each thread adds up values that another thread brought: plain stores, single buffer.
template <Bug bug>
__global__ void store_kernel(const float* x, float* out, int tiles) {
  auto& s = smem<TileShared>();
  int tid = threadIdx.x;
  float sum = 0;
  for (int t = 0; t < tiles; ++t) {
    s.tile[0][tid][0] = x[t * kThreads + tid];  // line: store
    if constexpr (bug == Bug::exits_early) {
      if (tid >= 64) return;
    }
    if constexpr (bug == Bug::waits_elsewhere) {
      if (tid >= 64) named_barrier(3, 128);  // line: elsewhere
    }
    if constexpr (bug == Bug::two_places) {
      if (tid % 2 == 0) {
        __syncthreads();
      } else {
        __syncthreads();
      }
    } else if constexpr (bug != Bug::no_barrier && bug != Bug::lower_neighbour) {
      __syncthreads();  // line: barrier
    }
    sum += s.tile[0][partner<bug>(tid)][0];  // line: load
    if constexpr (bug != Bug::no_last_barrier) __syncthreads();
  }
  out[tid] = sum;
}

// The same with cp.async and two buffers.
template <Bug bug>
__global__ void copy_kernel(const float* x, float* out, int tiles) {
  auto& s = smem<TileShared>();
  int tid = threadIdx.x;
  auto fetch = [&](int t) {
    float* to = &s.tile[0][0][0] + ((bug == Bug::outside_copy ? 2 : t % 2) * kThreads + tid) * 4;
    cp_async16(to, x + (t * kThreads + tid) * 4);
    cp_async_commit();
  };
  fetch(0);
  float sum = 0;
  for (int t = 0; t < tiles; ++t) {
    if (t + 1 < tiles) fetch(t + 1);
    if constexpr (bug == Bug::short_wait) {
      cp_async_wait<1>();  // the last round has one group in flight, and needs it
    } else if constexpr (bug != Bug::no_wait) {
      if (t + 1 < tiles) {
        cp_async_wait<1>();
      } else {
        cp_async_wait<0>();
      }
    }
    if constexpr (bug != Bug::no_barrier) __syncthreads();
    for (int i = 0; i < 4; ++i) sum += s.tile[t % 2][partner<bug>(tid)][i];
    if constexpr (bug != Bug::no_last_barrier) __syncthreads();
  }
  out[tid] = sum;
}

int recursion(int n, volatile int* sink) {
  volatile int frame[64];
  for (int i = 0; i < 64; ++i) frame[i] = n;
  *sink = frame[n % 64];
  return n == 0 ? 0 : recursion(n - 1, sink) + frame[(n + 1) % 64];
}

template <Bug bug>
__global__ void fault_kernel(const float* x, float* out, int tiles) {
  auto& s = smem<TileShared>();
  volatile float* tile = &s.tile[0][0][0];
  constexpr int size = 2 * kThreads * 4;
  if (bug == Bug::small_overrun && threadIdx.x == 5) tile[size] = 1;  // line: overrun
  if (bug == Bug::slack_overrun && threadIdx.x == 5) tile[size + 1] = 1;
  if (bug == Bug::read_overrun && threadIdx.x == 5) out[0] = tile[size + 2000];
  if (bug == Bug::wild_pointer && threadIdx.x == 5) out[0] = x[size_t(1) << 40];
  if (bug == Bug::deep_recursion && threadIdx.x == 5)
    out[0] = float(recursion(100000, reinterpret_cast<int*>(out)));
  if (bug == Bug::division_by_zero && threadIdx.x == 5) out[0] = float(100 / (tiles - 5));
  if (bug == Bug::lane_exits) {
    if (threadIdx.x == 5) return;
    out[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
  }
}

// Every block publishes a partial sum; the last to finish adds them up.
template <Bug bug>
__global__ void ticket_kernel(const float* x, float* partial, unsigned* ticket, float* out) {
  struct Shared {
    float scratch[2];
    bool last;
  };
  auto& s = smem<Shared>();
  float sum = block_sum<64>(x[blockIdx.x * 64 + threadIdx.x], s.scratch);
  if (threadIdx.x == 0) {
    if constexpr (bug == Bug::plain_store) out[1] = sum;  // line: plain store
    partial[blockIdx.x] = sum;                            // line: publish
    if constexpr (bug != Bug::no_fence) __threadfence();
    s.last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!s.last) return;
  if constexpr (bug != Bug::no_fence) __threadfence();
  sum = block_sum<64>(threadIdx.x < gridDim.x ? partial[threadIdx.x] : 0.0f, s.scratch);  // line: collect
  if (threadIdx.x == 0) out[0] = sum;
}

template <Bug bug>
__global__ void bulk_kernel(const float* x, float* out) {
  struct Shared {
    alignas(128) float tile[kThreads];
    mbarrier full;
  };
  auto& s = smem<Shared>();
  if (threadIdx.x == 0) {
    if constexpr (bug != Bug::no_init) mbarrier_init(&s.full, bug == Bug::wrong_count ? 2 : 1);
    mbarrier_fence_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(&s.full, sizeof s.tile);
    bulk_copy_g2s(s.tile, x, sizeof s.tile, &s.full);  // line: bulk copy
  }
  if constexpr (bug != Bug::read_before_copy) mbarrier_wait(&s.full, 0);  // line: mbarrier
  out[threadIdx.x] = s.tile[(threadIdx.x + 37) % kThreads];               // line: bulk read
}

// ---- running them -----------------------------------------------------------------------------------------

constexpr int kTiles = 5;

struct Buffer {
  std::vector<float> memory;
  float* data;
  explicit Buffer(size_t n) : memory(n + 32) {
    data = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 127) / 128 * 128);
  }
};

Config config_of(unsigned blocks, unsigned threads, size_t smem_bytes) {
  Config config;
  config.grid = dim3(blocks);
  config.block = dim3(threads);
  config.smem_bytes = smem_bytes;
  return config;
}

template <Bug bug, typename Kernel>
bool run_tiles(const char* name, Kernel kernel, int width, int tiles = kTiles,
               size_t smem_bytes = sizeof(TileShared)) {
  Buffer x(tiles * kThreads * width), out(kThreads);
  for (int i = 0; i < tiles * kThreads * width; ++i) x.data[i] = float(i % 17 + 1);
  launch(config_of(1, kThreads, smem_bytes), name, kernel, x.data, out.data, tiles);
  for (int tid = 0; tid < kThreads; ++tid) {
    float sum = 0;
    for (int t = 0; t < tiles; ++t) {
      for (int i = 0; i < width; ++i) sum += x.data[(t * kThreads + partner<bug>(tid)) * width + i];
    }
    if (!(out.data[tid] == sum)) return false;
  }
  return true;
}

constexpr int kRows = 64, kColumns = 16, kDepth = 3 * 64;

// out = a b^T by a warpgroup: tiles of 64 columns pass one after the other through one place.
template <Bug bug>
__global__ void product_kernel(const bf16* a, const bf16* b, float* out) {
  struct Shared { bf16 a[kRows][64], b[kColumns][64]; };
  auto& s = smem<Shared>();
  const int thread = threadIdx.x, lane = thread % 32, chunk = thread % 8;
  float d[kColumns / 8][4] = {};
  const auto send = [&](int k0) {
    const auto bring = [&](bf16(*tile)[64], const bf16* from, int row) {
      if (k0 < kDepth) cp_async16(&tile[row][(chunk ^ (row % 8)) * 8], from + row * kDepth + k0 + chunk * 8);
    };
    for (int row = thread / 8; row < kRows; row += 16) bring(s.a, a, row);
    for (int row = thread / 8; row < kColumns; row += 16) bring(s.b, b, row);
    cp_async_commit();
  };
  send(0);
  for (int k0 = 0; k0 < kDepth; k0 += 64) {
    cp_async_wait<0>();
    wgmma_publish();
    if (bug != Bug::no_barrier) __syncthreads();
    wgmma_begin();
    for (int col = 0; col < 64; col += 16) wgmma(d, &s.a[0][col], &s.b[0][col]);
    wgmma_commit();
    if (bug == Bug::early_copy) send(k0 + 64);
    if (bug != Bug::no_wait) wgmma_wait<0>();
    if (bug != Bug::no_last_barrier) __syncthreads();
    if (bug != Bug::early_copy) send(k0 + 64);
  }
  for (int j = 0; j < kColumns / 8; ++j) {
    for (int i = 0; i < 4; ++i) {
      out[(thread / 32 * 16 + lane / 4 + i / 2 * 8) * kColumns + j * 8 + lane % 4 * 2 + i % 2] = d[j][i];
    }
  }
}

template <Bug bug>
bool run_product() {
  std::vector<bf16> a(kRows * kDepth), b(kColumns * kDepth);
  Buffer out(kRows * kColumns);
  for (size_t i = 0; i < a.size(); ++i) a[i] = bf16(float(i % 7));
  for (size_t i = 0; i < b.size(); ++i) b[i] = bf16(float(i % 5));
  launch(config_of(1, 128, (kRows + kColumns) * 128), "product_kernel", product_kernel<bug>, a.data(),
         b.data(), out.data);
  for (int i = 0; i < kRows * kColumns; ++i) {
    float sum = 0;
    for (int k = 0; k < kDepth; ++k)
      sum += float(a[i / kColumns * kDepth + k]) * float(b[i % kColumns * kDepth + k]);
    if (!(out.data[i] == sum)) return false;
  }
  return true;
}

template <Bug bug>
bool run_store() {
  return run_tiles<bug>("store_kernel", store_kernel<bug>, 1, bug == Bug::lower_neighbour ? 1 : kTiles);
}

template <Bug bug>
bool run_copy() {
  return run_tiles<bug>("copy_kernel", copy_kernel<bug>, 4);
}

template <Bug bug>
bool run_fault() {
  size_t smem_bytes = sizeof(TileShared);
  if (bug == Bug::too_little_smem) smem_bytes = 1000;
  if (bug == Bug::slack_overrun) smem_bytes += 4;
  run_tiles<bug>("fault_kernel", fault_kernel<bug>, 4, kTiles, smem_bytes);
  return true;  // its output means nothing
}

template <Bug bug>
bool run_ticket() {
  const int blocks = 20;
  Buffer x(blocks * 64), partial(64), out(2);
  unsigned ticket = 0;
  float sum = 0;
  for (int i = 0; i < blocks * 64; ++i) sum += x.data[i] = float(i % 17);
  launch(config_of(blocks, 64, 16), "ticket_kernel", ticket_kernel<bug>, x.data, partial.data, &ticket,
         out.data);
  return out.data[0] == sum;
}

template <Bug bug>
bool run_bulk() {
  Buffer x(kThreads), out(kThreads);
  for (int i = 0; i < kThreads; ++i) x.data[i] = float(i + 1);
  launch(config_of(1, kThreads, 640), "bulk_kernel", bulk_kernel<bug>, x.data, out.data);
  for (int i = 0; i < kThreads; ++i) {
    if (!(out.data[i] == x.data[(i + 37) % kThreads])) return false;
  }
  return true;
}

const std::map<std::string, bool (*)()> cases = {
    {"store.none", run_store<Bug::none>},
    {"store.no_barrier", run_store<Bug::no_barrier>},
    {"store.no_last_barrier", run_store<Bug::no_last_barrier>},
    {"store.lower_neighbour", run_store<Bug::lower_neighbour>},
    {"store.exits_early", run_store<Bug::exits_early>},
    {"store.waits_elsewhere", run_store<Bug::waits_elsewhere>},
    {"store.two_places", run_store<Bug::two_places>},
    {"copy.none", run_copy<Bug::none>},
    {"copy.no_barrier", run_copy<Bug::no_barrier>},
    {"copy.no_wait", run_copy<Bug::no_wait>},
    {"copy.short_wait", run_copy<Bug::short_wait>},
    {"copy.no_last_barrier", run_copy<Bug::no_last_barrier>},
    {"copy.outside_copy", run_copy<Bug::outside_copy>},
    {"fault.none", run_fault<Bug::none>},
    {"fault.small_overrun", run_fault<Bug::small_overrun>},
    {"fault.slack_overrun", run_fault<Bug::slack_overrun>},
    {"fault.read_overrun", run_fault<Bug::read_overrun>},
    {"fault.wild_pointer", run_fault<Bug::wild_pointer>},
    {"fault.deep_recursion", run_fault<Bug::deep_recursion>},
    {"fault.division_by_zero", run_fault<Bug::division_by_zero>},
    {"fault.too_little_smem", run_fault<Bug::too_little_smem>},
    {"fault.lane_exits", run_fault<Bug::lane_exits>},
    {"ticket.none", run_ticket<Bug::none>},
    {"ticket.no_fence", run_ticket<Bug::no_fence>},
    {"ticket.plain_store", run_ticket<Bug::plain_store>},
    {"product.none", run_product<Bug::none>},
    {"product.no_barrier", run_product<Bug::no_barrier>},
    {"product.no_wait", run_product<Bug::no_wait>},
    {"product.no_last_barrier", run_product<Bug::no_last_barrier>},
    {"product.early_copy", run_product<Bug::early_copy>},
    {"bulk.none", run_bulk<Bug::none>},
    {"bulk.wrong_count", run_bulk<Bug::wrong_count>},
    {"bulk.no_init", run_bulk<Bug::no_init>},
    {"bulk.read_before_copy", run_bulk<Bug::read_before_copy>},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || cases.count(argv[1]) == 0) {
    for (const auto& entry : cases) puts(entry.first.c_str());
    return argc == 1 ? 0 : 4;
  }
  try {
    return cases.at(argv[1])() ? 0 : 1;
  } catch (const std::runtime_error& error) { fprintf(stderr, "%s\n", error.what()); }
  for (const char* clean : {"store.none", "copy.none", "ticket.none", "bulk.none"}) {
    try {
      if (!cases.at(clean)()) return 3;
    } catch (const std::exception& error) {
      fprintf(stderr, "after the failure: %s\n", error.what());
      return 3;
    }
  }
  return 2;
}
