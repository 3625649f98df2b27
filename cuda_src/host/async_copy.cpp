// cp.async, mbarriers and bulk copies, which here write their destination as late as the rules allow.
//
// A GPU may write the destination at any time between issue and wait. Here the destination is filled with NaN
// at issue and written at the wait, so a kernel that reads too early, or waits for the wrong group, computes
// NaN. So does one that issues a copy before pdl_wait() of what is hidden until then. An mbarrier's state is in
// its own 8 bytes of shared memory. Bulk copies are carried out while some thread polls an mbarrier, in random
// order in a random schedule.
#include <cstring>

#include "sanitizer.h"
#include "scheduler.h"

namespace lab {
namespace host {
namespace {

struct MbarrierState {
  int64_t pending_bytes : 22;  // expected and not yet arrived; negative if they arrived before being expected
  uint64_t phase : 1;
  uint64_t pending : 20;  // arrivals still missing in this phase
  uint64_t arrivals : 20;
  uint64_t valid : 1;  // 0 until mbarrier_init; see load_state
};
static_assert(sizeof(MbarrierState) == sizeof(uint64_t), "an mbarrier has 8 bytes");
constexpr unsigned kMaxArrivals = (1u << 20) - 1;

MbarrierState load_state(const uint64_t* bar, const char* op, Site site) {
  uint64_t bits;
  memcpy(&bits, bar, sizeof bits);
  MbarrierState state;
  memcpy(&state, &bits, sizeof state);
  if (bits == ~uint64_t(0) || !state.valid)
    fail("%s at %s:%d: mbarrier_init was not called", op, site.file, site.line);
  return state;
}

void store_state(uint64_t* bar, MbarrierState state) {
  if (state.pending == 0 && state.pending_bytes == 0) {
    state.phase ^= 1;
    state.pending = state.arrivals;
    worker->progress();
  }
  memcpy(bar, &state, sizeof state);
}

// Whether [p, p + bytes) lies in the shared memory of a block of this cluster.
bool in_shared(const void* p, size_t bytes) {
  auto* begin = static_cast<const unsigned char*>(p);
  for (const Block* block : worker->blocks) {
    if (begin >= block->smem && begin + bytes <= block->smem + block->smem_bytes) return true;
  }
  return false;
}

bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

void land(const BulkCopy& copy) {
  memcpy(copy.dst, copy.src, copy.bytes);
  MbarrierState state = load_state(copy.bar, "bulk_copy_g2s", {"", 0});
  state.pending_bytes -= copy.bytes;
  store_state(copy.bar, state);
}

}  // namespace

// ---- cp.async ---------------------------------------------------------------------------------------------

void cp_async(void* dst, const void* src, unsigned bytes, unsigned valid, Site site) {
  void* pc = __builtin_return_address(0);
  tsan_write(dst, bytes, pc);
  if (valid > 0) tsan_read(src, valid, pc);
  TsanIgnore ignore;
  if (!aligned(dst, bytes) || !aligned(src, bytes)) {
    fail("cp_async%u at %s:%d: addresses must be %u-byte aligned", bytes, site.file, site.line, bytes);
  }
  if (!in_shared(dst, bytes))
    fail("cp_async%u at %s:%d: writes outside shared memory", bytes, site.file, site.line);
  if (worker->options.poison) memset(dst, 0xff, bytes);
  current->copies.issue({dst, source_now(src, valid), bytes, valid});
}

void cp_async_commit() {
  TsanIgnore ignore;
  current->copies.commit();
}

void cp_async_wait(unsigned groups_in_flight) {
  TsanIgnore ignore;
  current->copies.wait(groups_in_flight, [](const AsyncCopy& copy) {
    memcpy(copy.dst, copy.src, copy.valid);
    memset(static_cast<char*>(copy.dst) + copy.valid, 0, copy.bytes - copy.valid);
  });
}

// ---- mbarriers --------------------------------------------------------------------------------------------

void mbarrier_init(uint64_t* bar, unsigned arrivals, Site site) {
  TsanIgnore ignore;
  if (!in_shared(bar, 8) || !aligned(bar, 8)) {
    fail("mbarrier_init at %s:%d: an mbarrier lives in shared memory, 8-byte aligned", site.file, site.line);
  }
  if (arrivals == 0 || arrivals > kMaxArrivals) {
    fail("mbarrier_init at %s:%d: %u arrivals (1 to %u)", site.file, site.line, arrivals, kMaxArrivals);
  }
  MbarrierState state = {};
  state.pending = state.arrivals = arrivals;
  state.valid = 1;
  memcpy(bar, &state, sizeof state);
}

void mbarrier_arrive(uint64_t* bar, unsigned bytes, Site site) {
  TsanIgnore ignore;
  tsan_release(bar);
  MbarrierState state = load_state(bar, "mbarrier_arrive", site);
  if (state.pending == 0)
    fail("mbarrier_arrive at %s:%d: more arrivals than the phase expects", site.file, site.line);
  state.pending_bytes += bytes;
  --state.pending;
  store_state(bar, state);
  worker->maybe_yield();
}

void mbarrier_wait(uint64_t* bar, unsigned parity, Site site) {
  TsanIgnore ignore;
  Block& block = *worker->blocks[current->block->cluster_rank];
  std::vector<BulkCopy>& copies = block.bulk_copies;
  bool random = worker->options.random;
  for (;;) {
    for (size_t i = 0; i < copies.size();) {
      size_t k = random ? i + worker->random.below(unsigned(copies.size() - i)) : i;
      if (random && (worker->random.next() & 1)) {
        ++i;  // not yet
        continue;
      }
      BulkCopy copy = copies[k];
      copies.erase(copies.begin() + long(k));
      land(copy);
      worker->progress();
    }
    if (load_state(bar, "mbarrier_wait", site).phase != (parity & 1)) break;
    // Only threads of this cluster can complete the phase, and each of them has run many times before this
    // gives up.
    worker->poll("mbarrier_wait", site,
                 64 * (uint64_t(block.size) * block.cluster_size + copies.size()) + 4096);
  }
  tsan_acquire(bar);
}

void bulk_copy(void* dst, const void* src, unsigned bytes, uint64_t* bar, Site site) {
  void* pc = __builtin_return_address(0);
  tsan_write(dst, bytes, pc);
  tsan_read(src, bytes, pc);
  TsanIgnore ignore;
  tsan_release(bar);  // a thread that waits for the bytes may read them
  if (!aligned(dst, 16) || !aligned(src, 16) || bytes % 16 != 0) {
    fail("bulk_copy_g2s at %s:%d: addresses and size must be multiples of 16", site.file, site.line);
  }
  if (!in_shared(dst, bytes))
    fail("bulk_copy_g2s at %s:%d: writes outside shared memory", site.file, site.line);
  load_state(bar, "bulk_copy_g2s", site);
  if (worker->options.poison) memset(dst, 0xff, bytes);
  worker->blocks[current->block->cluster_rank]->bulk_copies.push_back(
      {dst, source_now(src, bytes), bytes, bar});
}

void* cluster_peer(void* p, unsigned rank) {
  const BlockInfo* mine = current->block;
  if (rank >= mine->cluster_size) fail("cluster_peer: rank %u of a cluster of %u", rank, mine->cluster_size);
  if (!in_shared(p, 1)) fail("cluster_peer: not an address in shared memory");
  return worker->blocks[rank]->smem + (static_cast<unsigned char*>(p) - mine->smem);
}

}  // namespace host
}  // namespace lab
