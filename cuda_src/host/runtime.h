// Shared by kernels and scheduler: the running thread, its warp, and the functions in which a thread waits.
//
// Every kernel includes it, so it has only declarations and the few inline functions that must be fast.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vector_types.h"

// The race detector checks kernels, not this layer.
#define LAB_NO_TSAN __attribute__((no_sanitize("thread")))

namespace lab {
namespace host {

// A place in the source of a kernel. `Site site = Site::here()` as a default argument is the place of the
// call.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// What one lane passes to a warp collective, and what it gets back.
struct alignas(64) Slot { unsigned char bytes[64]; };

// A warp collective (shuffle, vote, reduction, mma) that some lanes have reached and others have not yet.
struct Collective {
  uint32_t mask = 0;     // lanes that take part
  uint32_t arrived = 0;  // lanes that have arrived; 0 if this entry is free
  uint32_t phase = 0;    // completions so far
  const char* op = "";
  Site site{"", 0};
  char order[2];  // addresses on which sanitizers see memory ordered, one per parity of phase
};

struct Warp {
  uint32_t lanes = 0;    // lanes that exist: the last warp of a block may be partial
  uint32_t alive = 0;    // lanes that have not returned from the kernel
  uint32_t started = 0;  // lanes that have begun
  uint32_t ready = 0;    // lanes that could run now
  Collective pending[4];
  Slot in[32], out[32];
};

struct AsyncCopy {
  void* dst;
  const void* src;
  uint32_t bytes;  // written; those past `valid` become zero
  uint32_t valid;  // read from src
};

struct AsyncProduct {
  void (*multiply)(const AsyncProduct& product);
  float* d;
  const void *a, *b;  // a: a tile in shared memory, or this thread's registers
  Site site;
  bool add = true;              // false: d is overwritten
  uint32_t of_quad[4][4] = {};  // a in registers: those of the four lanes that share its rows
};

// What a thread has issued and not yet waited for, in the groups that it has committed.
template <typename Item>
class AsyncGroups {
 public:
  void issue(const Item& item) { items_.push_back(item); }
  void commit() { ends_.push_back(uint32_t(items_.size())); }
  // Calls finish(item), oldest first, until at most `in_flight` committed groups are left.
  template <typename F>
  void wait(unsigned in_flight, F finish) {
    if (ends_.size() <= in_flight) return;
    const size_t finishing = ends_.size() - in_flight;
    const uint32_t end = ends_[finishing - 1];
    for (uint32_t i = 0; i < end; ++i) finish(items_[i]);
    items_.erase(items_.begin(), items_.begin() + end);
    ends_.erase(ends_.begin(), ends_.begin() + long(finishing));
    for (uint32_t& other : ends_) other -= end;
  }
  void clear() {
    items_.clear();
    ends_.clear();
  }

 private:
  std::vector<Item> items_;
  std::vector<uint32_t> ends_;  // end of each committed group in items_
};

// What a kernel can query about its block.
struct BlockInfo {
  uint3 index;
  dim3 grid_dim, block_dim;
  unsigned char* smem;
  size_t smem_bytes;
  unsigned cluster_rank, cluster_size;
};

class Fiber;

// One CUDA thread.
struct Thread {
  uint3 index;
  const BlockInfo* block;
  Warp* warp;
  uint16_t linear;  // index in the block, x fastest
  uint8_t lane, warp_index;
  Fiber* fiber = nullptr;
  const char* op = "";  // what it waits for
  Site site{"", 0};
  AsyncGroups<AsyncCopy> copies;       // cp.async
  AsyncGroups<AsyncProduct> products;  // wgmma
};

#ifdef __APPLE__
#define LAB_THREAD_LOCAL __thread
#else
#define LAB_THREAD_LOCAL __thread __attribute__((tls_model("initial-exec")))
#endif
extern LAB_THREAD_LOCAL Thread* current;  // null outside kernels

// ---- options ----------------------------------------------------------------------------------------------

// Which threads run ahead of the others, as far as barriers let them: either none in particular, or always
// the one with the lowest (highest) block, warp and lane among those that can run. A missing barrier is
// noticed if the threads on its two sides are far apart.
enum class Ahead { nobody, lowest, highest };

struct Options {
  int threads = 0;      // OS threads; 0: the cores this process may use
  bool random = false;  // random schedule; `ahead` is then ignored
  uint64_t seed = 0;
  Ahead ahead = Ahead::nobody;
  bool poison = true;
  size_t stack_bytes = 64 * 1024;
};
Options get_options();
void set_options(const Options& options);  // applies to later launches

// ---- launch -----------------------------------------------------------------------------------------------

struct Launch {
  const char* name;
  dim3 grid, block;
  size_t smem_bytes;
  unsigned cluster;
  void (*run_thread)(const void* arguments);  // calls the kernel once, as `current`
  const void* arguments;
  bool pdl = false;  // may start before the preceding kernel has ended, so it must call pdl_wait()
};

// Runs the grid and returns when it has finished. Throws std::runtime_error with the kernel's name if the
// configuration is invalid, if a thread fails, or if no thread of a kernel with `pdl` has called pdl_wait()
// by its end; the next launch is not affected. May be called from several OS threads: grids run one at a
// time.
void run(const Launch& launch);

// Memory that the preceding kernel writes. Later launches with `pdl` find it filled with ones (NaN) until
// their first pdl_wait(), which restores its contents; so what a kernel reads there too early is wrong, and
// what it writes too early is lost. For tests; an empty list ends it.
struct Region {
  void* begin;
  size_t bytes;
};
void hide_until_pdl_wait(std::vector<Region> regions);
void pdl_wait();
// What an asynchronous copy that is issued now may read: src, or ones where some of it is hidden.
const void* source_now(const void* src, size_t bytes);

// Aborts the launch from inside a kernel; run() throws the message with the kernel, block and thread added.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- where threads wait -----------------------------------------------------------------------------------

// Barrier `id` of the block for `count` threads (0: all). Returns the sum of `value` over the threads that
// arrived.
int barrier(int id, int count, int value, const char* op, Site site);
void cluster_barrier(Site site);

// Waits for all lanes of `mask`. The last to arrive calls combine(warp, mask), which computes warp.out from
// warp.in. orders_memory: what lanes wrote before becomes visible to the other lanes (__syncwarp does that,
// shuffles do not).
using Combine = void (*)(Warp& warp, uint32_t mask);
void collective(uint32_t mask, const char* op, Combine combine, bool orders_memory, Site site);

// The caller polls memory that another process writes. Fails after LAB_PEER_SECONDS (60) without progress.
void wait_for_rank(int rank, Site site = Site::here());
void spin_yield(Site site);  // lets other threads run; the caller is polling global memory
void thread_fence();

// One warp collective: passes a value in and returns one. Both have at most 64 bytes.
template <typename Out, typename In>
LAB_NO_TSAN inline Out exchange(uint32_t mask, const In& in, Combine combine, const char* op, Site site) {
  static_assert(sizeof(In) <= sizeof(Slot) && sizeof(Out) <= sizeof(Slot), "a slot has 64 bytes");
  Thread* thread = current;
  memcpy(thread->warp->in[thread->lane].bytes, &in, sizeof(In));
  collective(mask, op, combine, false, site);
  Out out;
  memcpy(&out, thread->warp->out[thread->lane].bytes, sizeof(Out));
  return out;
}
template <typename T>
LAB_NO_TSAN inline T get(const Slot& slot) {
  T value;
  memcpy(&value, slot.bytes, sizeof value);
  return value;
}
template <typename T>
LAB_NO_TSAN inline void put(Slot& slot, const T& value) {
  memcpy(slot.bytes, &value, sizeof value);
}

// ---- asynchronous copies (async_copy.cpp) -----------------------------------------------------------------

void cp_async(void* dst, const void* src, unsigned bytes, unsigned valid, Site site);
void cp_async_commit();
void cp_async_wait(unsigned groups_in_flight);

void mbarrier_init(uint64_t* bar, unsigned arrivals, Site site);
void mbarrier_arrive(uint64_t* bar, unsigned bytes, Site site);
void mbarrier_wait(uint64_t* bar, unsigned parity, Site site);
void bulk_copy(void* dst, const void* src, unsigned bytes, uint64_t* bar, Site site);
void* cluster_peer(void* p, unsigned rank);
void read_shared(const void* p, size_t bytes);  // tells the race detector of a read made for the kernel

}  // namespace host
}  // namespace lab
