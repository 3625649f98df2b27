// Where threads wait for each other: barriers, warp collectives, fences.
//
// The thread that arrives last completes the call for all and then continues; the others become ready. Misuse
// that is undefined on a GPU is an error here: threads of one group that call a barrier or a collective at
// different places, a mask with lanes that have exited, a lane that calls but is not in the mask.
#include <cstring>

#include "sanitizer.h"
#include "scheduler.h"

namespace lab {
namespace host {
namespace {

constexpr const char* kClusterSync = "cluster_sync";

}  // namespace

bool Worker::release(Block& block, Barrier& barrier) {
  if (barrier.arrived < barrier.count) return false;
  barrier.result = barrier.sum;
  barrier.sum = 0;
  barrier.arrived = 0;
  ++barrier.phase;
  for (unsigned warp = 0; warp < block.warps.size(); ++warp) {
    if (barrier.waiting[warp] == 0) continue;
    block.warps[warp].ready |= barrier.waiting[warp];
    block.ready_warps |= 1u << warp;
    barrier.waiting[warp] = 0;
  }
  return true;
}

int barrier(int id, int count, int value, const char* op, Site site) {
  TsanIgnore ignore;
  Thread* self = current;
  Block& block = *worker->blocks[self->block->cluster_rank];
  if (id < 0 || id > 15)
    fail("%s at %s:%d: barrier %d does not exist (0 to 15)", op, site.file, site.line, id);
  if (count < 0 || count % 32 != 0 || count > int(block.size + 31) / 32 * 32) {
    fail("%s at %s:%d: %d threads (a multiple of 32, at most the block's %u)", op, site.file, site.line,
         count, block.size);
  }
  if (count == 0) count = int(block.size);  // exited threads never arrive: reported as a deadlock
  Barrier& b = block.barriers[id];
  if (b.arrived > 0 && b.count != count) {
    fail("barrier %d: %s at %s:%d expects %d threads, %s at %s:%d expects %d", id, op, site.file, site.line,
         count, b.op, b.site.file, b.site.line, b.count);
  }
  if (b.arrived > 0 && id == 0 && (b.site.line != site.line || strcmp(b.site.file, site.file) != 0)) {
    fail("divergent barrier: %s at %s:%d while others wait in %s at %s:%d", op, site.file, site.line, b.op,
         b.site.file, b.site.line);
  }
  b.op = op;
  b.site = site;
  b.count = count;
  b.sum += value;
  ++b.arrived;
  char* order = &b.order[b.phase & 1];
  tsan_release(order);
  if (worker->release(block, b)) {
    worker->maybe_yield();
  } else {
    b.waiting[self->warp_index] |= 1u << self->lane;
    worker->wait(op, site);
  }
  tsan_acquire(order);
  return b.result;
}

// According to the PTX manual on barrier.cluster, threads that have exited are not waited for.
bool Worker::release_cluster() {
  if (cluster_barrier.arrived == 0 || unsigned(cluster_barrier.arrived) < alive_) return false;
  cluster_barrier.arrived = 0;
  ++cluster_barrier.phase;
  for (Block* block : blocks) {
    for (Thread& thread : block->threads) {
      if ((thread.warp->alive >> thread.lane & 1) && thread.op == kClusterSync && &thread != current) {
        thread.op = "";
        make_ready(&thread);
      }
    }
  }
  return true;
}

void cluster_barrier(Site site) {
  TsanIgnore ignore;
  Barrier& b = worker->cluster_barrier;
  char* order = &b.order[b.phase & 1];
  tsan_release(order);
  ++b.arrived;
  if (worker->release_cluster()) {
    worker->maybe_yield();
  } else {
    worker->wait(kClusterSync, site);
  }
  tsan_acquire(order);
}

void collective(uint32_t mask, const char* op, Combine combine, bool orders_memory, Site site) {
  TsanIgnore ignore;
  Thread* self = current;
  Warp& warp = *self->warp;
  uint32_t bit = 1u << self->lane;
  if (!(mask & bit)) {
    fail("%s at %s:%d: the calling lane %d is not in the mask %08x", op, site.file, site.line, self->lane,
         mask);
  }
  Collective* entry = nullptr;
  for (Collective& c : warp.pending) {
    if (c.arrived != 0 && c.mask == mask) entry = &c;
  }
  if (entry == nullptr) {
    for (Collective& c : warp.pending) {
      if (c.arrived == 0) entry = &c;
    }
    if (entry == nullptr)
      fail("%s at %s:%d: more than four groups of a warp diverge", op, site.file, site.line);
    if (mask & ~warp.alive) {
      fail("%s at %s:%d: the mask %08x names lanes that have exited or do not exist (lanes there: %08x)", op,
           site.file, site.line, mask, warp.alive);
    }
    entry->mask = mask;
    entry->op = op;
    entry->site = site;
  } else if (strcmp(entry->op, op) != 0) {
    fail("divergent warp: %s at %s:%d while others wait in %s at %s:%d", op, site.file, site.line, entry->op,
         entry->site.file, entry->site.line);
  }
  entry->arrived |= bit;
  char* order = &entry->order[entry->phase & 1];
  if (orders_memory) tsan_release(order);
  if (entry->arrived == mask) {
    if (combine != nullptr) combine(warp, mask);
    entry->arrived = 0;
    ++entry->phase;
    if (uint32_t others = mask & ~bit) {
      warp.ready |= others;
      worker->blocks[self->block->cluster_rank]->ready_warps |= 1u << self->warp_index;
    }
    worker->maybe_yield();
  } else {
    worker->wait(op, site);
  }
  if (orders_memory) tsan_acquire(order);
}

void spin_yield(Site site) {
  TsanIgnore ignore;
  worker->poll("__nanosleep", site, uint64_t(1) << 26);
}

void wait_for_rank(int rank, Site site) {
  TsanIgnore ignore;
  worker->poll_rank(rank, site);
}

void thread_fence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  static char order;  // a fence orders all that the race detector saw before it
  tsan_release(&order);
  tsan_acquire(&order);
}

void read_shared(const void* p, size_t bytes) { tsan_read(p, bytes, __builtin_return_address(0)); }

}  // namespace host
}  // namespace lab
