// Runs one cluster of blocks, and decides which CUDA thread runs next. A cooperative grid is run as one
// cluster, so that all its blocks can wait for each other.
//
// A thread runs until it waits. Which threads could run is kept in bit masks, one of lanes for each warp and
// one of warps for each block, so a choice costs a count of trailing zeros. In a fixed schedule the scheduler
// stays in one warp as long as it can, lowest lane first. In a random one it draws a block, then
// one of its ready warps, then one of the warp's ready lanes, and sometimes switches where it need not. With
// Options::ahead the same thread runs whenever it can, so that it gets as far ahead of the others as barriers
// allow.
//
// If threads are left and none can run, that is a deadlock: the report says how many threads wait, and where.
// After a failure all fibers of the cluster are abandoned where they are. Their destructors do not run, so
// kernels must not own memory (on a GPU they cannot either).
#include "scheduler.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>

#include "sanitizer.h"

namespace lab {
namespace host {

LAB_THREAD_LOCAL Thread* current = nullptr;
LAB_THREAD_LOCAL Worker* worker = nullptr;

namespace {

constexpr size_t kSharedAlignment = 128;
constexpr unsigned char kCanary = 0xa5;  // between the end of shared memory and the forbidden pages

std::string format_message(const char* format, va_list arguments) {
  char text[1024];
  vsnprintf(text, sizeof text, format, arguments);
  return text;
}

uint32_t low_bits(unsigned n) { return n >= 32 ? ~0u : (1u << n) - 1; }

unsigned nth_bit(uint32_t mask, unsigned n) {
  while (n-- > 0) mask &= mask - 1;
  return unsigned(__builtin_ctz(mask));
}

uint32_t bits_above(uint32_t mask, unsigned bit) { return bit >= 31 ? 0 : mask >> (bit + 1) << (bit + 1); }

}  // namespace

// ---- failing ----------------------------------------------------------------------------------------------

std::string index_text(unsigned x, unsigned y, unsigned z) {
  return "(" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
}

void fail(const char* format, ...) {
  {  // abandon() never returns: no object that owns memory may be alive then
    va_list arguments;
    va_start(arguments, format);
    std::string message = format_message(format, arguments);
    va_end(arguments);
    if (current == nullptr) throw std::runtime_error(message);
    const uint3& b = current->block->index;
    const uint3& t = current->index;
    worker->failure =
        message + "\n  in block " + index_text(b.x, b.y, b.z) + " thread " + index_text(t.x, t.y, t.z);
  }
  worker->abandon();
}

void Worker::abandon() {
  Fiber* self = current->fiber;
  current = nullptr;
  Fiber::change(*self, main_);
  abort();  // no one continues an abandoned fiber
}

namespace {

// Runs of consecutive numbers as text: "0-63, 96".
std::string ranges_text(const std::vector<unsigned>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t j = i;
    while (j + 1 < numbers.size() && numbers[j + 1] == numbers[j] + 1) ++j;
    if (text.size() > 100) return text + ", ...";
    if (!text.empty()) text += ", ";
    text += std::to_string(numbers[i]);
    if (j > i) text += "-" + std::to_string(numbers[j]);
    i = j + 1;
  }
  return text;
}

std::string count_text(const std::vector<unsigned>& threads) {
  const char* noun = threads.size() == 1 ? " thread (" : " threads (";
  return std::to_string(threads.size()) + noun + ranges_text(threads) + ")";
}

}  // namespace

void Worker::deadlock() {
  failure = deadlock_report();
  abandon();
}

std::string Worker::deadlock_report() const {
  std::string report = "deadlock, no thread can go on";
  for (const Block* block : blocks) {
    std::string where = "\n  block " + index_text(block->index.x, block->index.y, block->index.z) + ": ";
    std::vector<std::pair<std::string, std::vector<unsigned>>> places;
    std::vector<unsigned> exited;
    for (const Thread& thread : block->threads) {
      if (!(thread.warp->alive >> thread.lane & 1)) {
        exited.push_back(thread.linear);
        continue;
      }
      std::string place =
          std::string(thread.op) + " at " + thread.site.file + ":" + std::to_string(thread.site.line);
      auto same = std::find_if(places.begin(), places.end(), [&](const auto& p) { return p.first == place; });
      if (same == places.end()) same = places.insert(same, {place, {}});
      same->second.push_back(thread.linear);
    }
    for (const auto& place : places) report += where + count_text(place.second) + " wait in " + place.first;
    if (!exited.empty()) report += where + count_text(exited) + " have exited";
  }
  return report;
}

// ---- who runs next ----------------------------------------------------------------------------------------

void Worker::make_ready(Thread* thread) {
  thread->warp->ready |= 1u << thread->lane;
  worker->blocks[thread->block->cluster_rank]->ready_warps |= 1u << thread->warp_index;
}

Thread* Worker::take(Block& block, unsigned warp, unsigned lane) {
  block.warps[warp].ready &= ~(1u << lane);
  if (block.warps[warp].ready == 0) block.ready_warps &= ~(1u << warp);
  block_turn_ = block.cluster_rank;
  return &block.threads[warp * 32 + lane];
}

Thread* Worker::pick_ahead() {
  const bool lowest = options.ahead == Ahead::lowest;
  const auto first_of = [&](uint32_t mask) {
    return unsigned(lowest ? __builtin_ctz(mask) : 31 - __builtin_clz(mask));
  };
  for (size_t i = 0; i < blocks.size(); ++i) {
    Block& block = *blocks[lowest ? i : blocks.size() - 1 - i];
    for (uint32_t warps = block.ready_warps; warps != 0;) {
      const unsigned warp = first_of(warps);
      warps &= ~(1u << warp);
      const uint32_t lanes = block.warps[warp].ready & ~block.polling[warp];
      if (lanes != 0) return take(block, warp, first_of(lanes));
    }
  }
  return nullptr;
}

void Worker::set_polling(bool polling) {
  uint32_t& lanes = blocks[current->block->cluster_rank]->polling[current->warp_index];
  const uint32_t bit = 1u << current->lane;
  lanes = polling ? lanes | bit : lanes & ~bit;
}

Thread* Worker::pick() {
  if (options.ahead != Ahead::nobody) {
    if (Thread* thread = pick_ahead()) return thread;
  }
  unsigned count = unsigned(blocks.size());
  unsigned first = options.random ? random.below(count) : block_turn_;
  for (unsigned i = 0; i < count; ++i) {
    Block& block = *blocks[(first + i) % count];
    uint32_t warps = block.ready_warps;
    if (warps == 0) continue;
    if (options.random) {
      unsigned warp = nth_bit(warps, random.below(unsigned(__builtin_popcount(warps))));
      uint32_t lanes = block.warps[warp].ready;
      return take(block, warp, nth_bit(lanes, random.below(unsigned(__builtin_popcount(lanes)))));
    }
    unsigned warp = i == 0 && current != nullptr ? current->warp_index : 0;
    if (!(warps >> warp & 1)) warp = unsigned(__builtin_ctz(warps));
    return take(block, warp, unsigned(__builtin_ctz(block.warps[warp].ready)));
  }
  return nullptr;
}

Thread* Worker::pick_after(Thread* thread) {
  if (options.random) return pick();
  Block& block = *blocks[thread->block->cluster_rank];
  if (uint32_t lanes = bits_above(thread->warp->ready, thread->lane)) {
    return take(block, thread->warp_index, unsigned(__builtin_ctz(lanes)));
  }
  if (uint32_t warps = bits_above(block.ready_warps, thread->warp_index)) {
    unsigned warp = unsigned(__builtin_ctz(warps));
    return take(block, warp, unsigned(__builtin_ctz(block.warps[warp].ready)));
  }
  for (unsigned i = 1; i <= blocks.size(); ++i) {
    Block& other = *blocks[(block.cluster_rank + i) % blocks.size()];
    if (other.ready_warps == 0) continue;
    unsigned warp = unsigned(__builtin_ctz(other.ready_warps));
    return take(other, warp, unsigned(__builtin_ctz(other.warps[warp].ready)));
  }
  return nullptr;
}

Fiber* Worker::free_fiber() {
  if (fiber_stack_bytes_ != options.stack_bytes) {  // the option changed: between launches none is in use
    if (free_.size() == fibers_.size()) {
      free_.clear();
      fibers_.clear();
      fiber_stack_bytes_ = options.stack_bytes;
    }
  }
  if (free_.empty()) {
    fibers_.push_back(
        std::make_unique<Fiber>(fiber_stack_bytes_, unsigned(fibers_.size()), &Worker::fiber_entry));
    return fibers_.back().get();
  }
  Fiber* fiber = free_.back();
  free_.pop_back();
  if (kTsan) fiber->reset();
  return fiber;
}

void Worker::start(Thread* thread, Fiber* fiber) {
  thread->warp->started |= 1u << thread->lane;
  thread->fiber = fiber;
  if (kTsan) fiber->tsan = tsan_fibers_[thread->block->cluster_rank * 1024 + thread->linear];
}

void Worker::change_to(Fiber& from, Thread* next) {
  if (!(next->warp->started >> next->lane & 1)) start(next, free_fiber());
  current = next;
  Fiber::change(from, *next->fiber);
}

void Worker::wait(const char* op, Site site) {
  Thread* self = current;
  self->op = op;
  self->site = site;
  progress();
  set_polling(false);
  Thread* next = pick();
  if (next == nullptr) deadlock();
  if (next != self) change_to(*self->fiber, next);
}

void Worker::yield() {
  Thread* self = current;
  make_ready(self);
  Thread* next = options.ahead == Ahead::nobody ? nullptr : pick_ahead();
  if (next == nullptr) next = pick_after(self);
  if (next != self) change_to(*self->fiber, next);
}

void Worker::maybe_yield() {
  if (options.ahead != Ahead::nobody || (options.random && (random.next() & 1))) {
    Thread* self = current;
    set_polling(false);
    make_ready(self);
    Thread* next = pick();
    if (next != self) change_to(*self->fiber, next);
  }
}

void Worker::poll(const char* op, Site site, uint64_t patience) {
  current->op = op;
  current->site = site;
  // Who waits for a thread that waits for another rank waits as long as that thread does.
  if (++idle_ > patience && !rank_waits_) deadlock();
  if (idle_ % 1024 == 0) std::this_thread::yield();
  set_polling(true);
  yield();
}

void Worker::poll_rank(int rank, Site site) {
  static const int seconds = [] {
    const char* text = getenv("LAB_PEER_SECONDS");
    return text != nullptr && atoi(text) > 0 ? atoi(text) : 60;
  }();
  const auto now = std::chrono::steady_clock::now();
  if (!rank_waits_) rank_since_ = now;
  rank_waits_ = true;
  if (now - rank_since_ > std::chrono::seconds(seconds))
    fail("rank %d has sent nothing for %d s (it ended, or runs another model or plan)", rank, seconds);
  poll("wait for another rank", site, UINT64_MAX);
}

// ---- a thread's life --------------------------------------------------------------------------------------

void Worker::fiber_entry() {
  Fiber::begin();
  worker->run_threads();
}

// Runs CUDA threads one after the other on this stack. As long as each returns without having waited, or the
// next one has not begun, there is nothing to switch to.
void Worker::run_threads() {
  for (;;) {
    Thread* thread = current;
    try {
      launch->run_thread(launch->arguments);
    } catch (const std::exception& error) { fail("exception in the kernel: %s", error.what()); } catch (...) {
      fail("exception in the kernel");
    }
    Thread* next = nullptr;
    Fiber* self = thread->fiber;
    {
      TsanIgnore ignore;
      finish(thread);
      next = alive_ > 0 ? pick() : nullptr;
      if (alive_ > 0 && next == nullptr) deadlock();
      bool fresh = next != nullptr && !(next->warp->started >> next->lane & 1);
      if (kTsan) {
        // No other thread of this block may take over its stack: ThreadSanitizer would report races between
        // the two where there are none. So its fiber is not free yet.
        tsan_release(&done_);
        used_.push_back(self);
        if (fresh) start(next, free_fiber());
      } else if (fresh) {
        start(next, self);
        current = next;
        continue;
      } else {
        free_.push_back(self);  // it stops here, ready to begin the thread that takes it
      }
      current = next;
    }
    Fiber::change(*self, next != nullptr ? *next->fiber : main_);
  }
}

void Worker::finish(Thread* thread) {
  for (const Collective& pending : thread->warp->pending) {
    if (pending.arrived != 0 && (pending.mask >> thread->lane & 1)) {
      fail("the thread exits while others of its warp wait for it in %s at %s:%d", pending.op,
           pending.site.file, pending.site.line);
    }
  }
  bool in_flight = false;
  thread->copies.commit();
  thread->copies.wait(0, [&](const AsyncCopy&) { in_flight = true; });
  if (in_flight) {
    fail(
        "the thread exits while its cp.async copies are in flight; without a wait they may land on whatever "
        "their place holds by then");
  }
  thread->products.clear();  // never waited for, so no thread may read them
  thread->warp->alive &= ~(1u << thread->lane);
  Block& block = *blocks[thread->block->cluster_rank];
  // Shared memory ends with its block: what others of the cluster still read of it is lost.
  if (--block.alive == 0 && blocks.size() > 1 && options.poison) memset(block.smem, 0xff, block.smem_bytes);
  --alive_;
  progress();
  if (alive_ > 0) release_cluster();
}

// ---- blocks -----------------------------------------------------------------------------------------------

void Block::map_memory(size_t bytes) {
  unmap_memory();
  memory_bytes = std::max<size_t>(1, (bytes + page_bytes() - 1) / page_bytes()) * page_bytes();
  memory = static_cast<unsigned char*>(map_pages(memory_bytes + 2 * kGuardBytes)) + kGuardBytes;
  forbid_pages(memory - kGuardBytes, kGuardBytes);
  forbid_pages(memory + memory_bytes, kGuardBytes);
}

void Block::unmap_memory() {
  if (memory != nullptr) unmap_pages(memory - kGuardBytes, memory_bytes + 2 * kGuardBytes);
  memory = nullptr;
}

// Shared memory ends right before forbidden pages, except for a few bytes of alignment, which are filled with
// a canary.
void Worker::place_memory(Block& block) {
  size_t padded = (launch->smem_bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  if (block.memory == nullptr || block.memory_bytes < padded) block.map_memory(padded);
  asan_unpoison(block.memory, block.memory_bytes);
  if (kTsan) forget_pages(block.memory, block.memory_bytes);
  block.smem_bytes = launch->smem_bytes;
  block.smem = block.memory + block.memory_bytes - padded;
  memset(block.smem, options.poison ? 0xff : 0, launch->smem_bytes);
  memset(block.smem + launch->smem_bytes, kCanary, padded - launch->smem_bytes);
  asan_poison(block.smem + launch->smem_bytes, padded - launch->smem_bytes);
  asan_poison(block.memory, size_t(block.smem - block.memory));
}

void Worker::prepare(Block& block, size_t index, unsigned rank) {
  const dim3& grid = launch->grid;
  const dim3& shape = launch->block;
  unsigned size = shape.x * shape.y * shape.z;
  bool same_shape = block.size == size && block.block_dim.x == shape.x && block.block_dim.y == shape.y;
  block.index = {unsigned(index % grid.x), unsigned(index / grid.x % grid.y),
                 unsigned(index / grid.x / grid.y)};
  block.grid_dim = grid;
  block.block_dim = shape;
  block.cluster_rank = rank;
  block.cluster_size = launch->cluster;
  block.size = block.alive = size;
  block.bulk_copies.clear();
  memset(block.polling, 0, sizeof block.polling);
  place_memory(block);

  unsigned warps = (size + 31) / 32;
  if (!same_shape) {
    block.threads.assign(size, Thread());
    block.warps.assign(warps, Warp());
    for (unsigned i = 0; i < size; ++i) {
      Thread& thread = block.threads[i];
      thread.index = {i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y};
      thread.block = &block;
      thread.warp = &block.warps[i / 32];
      thread.linear = uint16_t(i);
      thread.lane = uint8_t(i % 32);
      thread.warp_index = uint8_t(i / 32);
    }
  }
  for (unsigned w = 0; w < warps; ++w) {
    Warp& warp = block.warps[w];
    warp.lanes = warp.alive = warp.ready = low_bits(size - w * 32);
    warp.started = 0;
    for (Collective& pending : warp.pending) pending.arrived = 0;
  }
  block.ready_warps = low_bits(warps);
  for (Barrier& barrier : block.barriers) {
    memset(barrier.waiting, 0, sizeof barrier.waiting);
    barrier.arrived = 0;
    barrier.sum = 0;
  }
}

Worker& Worker::here() {
  struct Destroy {
    void operator()(Worker* w) const {
      TsanIgnore ignore;
      delete w;
    }
  };
  static thread_local std::unique_ptr<Worker, Destroy> mine;
  if (mine == nullptr) mine.reset(new Worker);
  worker = mine.get();
  return *mine;
}

std::string Worker::run_cluster(const Launch& l, const Options& o, size_t cluster, uint64_t launch_number) {
  TsanIgnore ignore;
  launch = &l;
  options = o;
  if (options.random) options.ahead = Ahead::nobody;
  random.state = o.seed * 0x2545f4914f6cdd1dull + launch_number * 0x9e3779b97f4a7c15ull + cluster;
  failure.clear();
  current = nullptr;
  block_turn_ = 0;
  progress();
  if (kTsan) pool_.clear();  // the race detector keeps clocks per address: new barriers need new ones
  while (pool_.size() < l.cluster) pool_.push_back(std::make_unique<Block>());
  blocks.clear();
  for (unsigned rank = 0; rank < l.cluster; ++rank) {
    prepare(*pool_[rank], cluster * l.cluster + rank, rank);
    blocks.push_back(pool_[rank].get());
  }
  alive_ = blocks[0]->size * l.cluster;
  cluster_barrier = Barrier();
#ifdef LAB_HOST_TSAN
  tsan_fibers_.assign(l.cluster * 1024, nullptr);
  for (Block* block : blocks) {
    for (const Thread& thread : block->threads) {
      std::string name = "block " + index_text(block->index.x, block->index.y, block->index.z) + " thread " +
                         index_text(thread.index.x, thread.index.y, thread.index.z);
      void* fiber = __tsan_create_fiber(0);
      __tsan_set_fiber_name(fiber, name.c_str());
      tsan_fibers_[block->cluster_rank * 1024 + thread.linear] = fiber;
    }
  }
#endif

  Thread* first = pick();
  current = first;
  if (!(first->warp->started >> first->lane & 1)) start(first, free_fiber());
  Fiber::change(main_, *first->fiber);
  current = nullptr;

  free_.insert(free_.end(), used_.begin(), used_.end());
  used_.clear();
  if (kTsan) retire_tsan_fibers();
  if (failure.empty()) {
    for (Block* block : blocks) {
      const unsigned char* end = block->memory + block->memory_bytes;
      asan_unpoison(block->smem, size_t(end - block->smem));
      if (std::any_of(static_cast<const unsigned char*>(block->smem) + block->smem_bytes, end,
                      [](unsigned char c) { return c != kCanary; })) {
        failure = "written past the end of its " + std::to_string(block->smem_bytes) +
                  " bytes of shared memory\n  in block " +
                  index_text(block->index.x, block->index.y, block->index.z);
        break;
      }
    }
  }
  if (!failure.empty()) {  // every fiber stopped somewhere in a kernel
    free_.clear();
    for (auto& fiber : fibers_) {
      fiber->reset();
      free_.push_back(fiber.get());
    }
    for (Block* block : blocks) block->size = 0;  // rebuilt completely next time
  }
  return failure;
}

void Worker::retire_tsan_fibers() {
#ifdef LAB_HOST_TSAN
  if (!failure.empty()) {
    // Abandoned fibers cannot be destroyed, because they stopped in the middle of this layer. But they are
    // finished: what they did happened before anything that the caller does next.
    void* self = __tsan_get_current_fiber();
    for (void* fiber : tsan_fibers_) {
      if (fiber == nullptr) continue;
      __tsan_switch_to_fiber(fiber, 1);
      tsan_release(&done_);
    }
    __tsan_switch_to_fiber(self, 1);
    return;
  }
  // The race detector forgets what a destroyed fiber did, so fibers are kept for a while: blocks race with
  // later blocks.
  for (void* fiber : tsan_fibers_) {
    if (fiber != nullptr) tsan_dead_.push_back(fiber);
  }
  if (tsan_dead_.size() > 2000) {
    for (void* fiber : tsan_dead_) __tsan_destroy_fiber(fiber);
    tsan_dead_.clear();
  }
#endif
}

void Worker::end_launch() {
#ifdef LAB_HOST_TSAN
  for (void* fiber : tsan_dead_) __tsan_destroy_fiber(fiber);
  tsan_dead_.clear();
#endif
  tsan_acquire(&done_);  // the launch's caller sees all that its threads wrote
}

bool Worker::guards_stack(const void* address) const {
  return std::any_of(fibers_.begin(), fibers_.end(),
                     [&](const auto& fiber) { return fiber->guards(address); });
}

}  // namespace host
}  // namespace lab
