// Runs grids: hands clusters of blocks to OS threads, and inside a cluster decides which CUDA thread runs next.
//
// A thread runs until it waits. Who could run is kept as bit masks, a mask of lanes per warp and a mask of warps per
// block, so choosing costs a count of trailing zeros. In a fixed schedule the scheduler stays in one warp while it can,
// lowest lane first; in a random one it draws among all ready threads, and also switches where it need not.
//
// When nobody can run and threads are left, that is a deadlock: the report says how many wait where.
// A failure abandons all fibers of the cluster as they stand. Their destructors do not run, so kernels must not own
// memory (on a GPU they cannot either).
#include "scheduler.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <thread>
#ifdef __linux__
#include <sched.h>
#endif

#include "fault.h"
#include "sanitizer.h"

namespace lab {
namespace host {

LAB_THREAD_LOCAL Thread* current = nullptr;
LAB_THREAD_LOCAL Worker* worker = nullptr;

namespace {

constexpr size_t kMaxSharedBytes = 227 * 1024;  // per block on Hopper
constexpr size_t kSharedAlignment = 128;
constexpr unsigned char kCanary = 0xa5;  // between the end of shared memory and the forbidden page
constexpr const char* kClusterSync = "cluster_sync";

std::string format_message(const char* format, va_list arguments) {
  char text[1024];
  vsnprintf(text, sizeof text, format, arguments);
  return text;
}

std::string index_text(unsigned x, unsigned y, unsigned z) {
  return "(" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
}

uint32_t low_bits(unsigned n) { return n >= 32 ? ~0u : (1u << n) - 1; }

unsigned nth_bit(uint32_t mask, unsigned n) {
  while (n-- > 0) mask &= mask - 1;
  return unsigned(__builtin_ctz(mask));
}

uint32_t bits_above(uint32_t mask, unsigned bit) { return bit >= 31 ? 0 : mask >> (bit + 1) << (bit + 1); }

}  // namespace

// ---- options --------------------------------------------------------------------------------------------------------

namespace {

int available_cores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, int(std::thread::hardware_concurrency()));
}

// A whole number, or the program says which variable is wrong.
bool environment_number(const char* name, uint64_t* value) {
  const char* text = getenv(name);
  if (text == nullptr || *text == '\0') return false;
  char* end = nullptr;
  *value = strtoull(text, &end, 10);
  if (*end != '\0' || *text == '-') {
    throw std::runtime_error(std::string(name) + "=" + text + ": a whole number is needed");
  }
  return true;
}

Options options_from_environment() {
  Options options;
  uint64_t value = 0;
  if (environment_number("LAB_HOST_THREADS", &value)) options.threads = int(std::min<uint64_t>(value, 1024));
  if (environment_number("LAB_HOST_SEED", &value)) {
    options.random = true;
    options.seed = value;
  }
  if (environment_number("LAB_HOST_POISON", &value)) options.poison = value != 0;
  if (environment_number("LAB_HOST_STACK", &value)) options.stack_bytes = size_t(value);
  return options;
}

std::mutex options_mutex;

Options& the_options() {
  static Options options = options_from_environment();
  return options;
}

}  // namespace

Options get_options() {
  std::lock_guard<std::mutex> lock(options_mutex);
  return the_options();
}

void set_options(const Options& options) {
  std::lock_guard<std::mutex> lock(options_mutex);
  the_options() = options;
}

// ---- failing --------------------------------------------------------------------------------------------------------

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string message = format_message(format, arguments);
  va_end(arguments);
  if (current == nullptr) throw std::runtime_error(message);
  const uint3& b = current->block->index;
  const uint3& t = current->index;
  worker->abandon(message + "\n  in block " + index_text(b.x, b.y, b.z) + " thread " + index_text(t.x, t.y, t.z));
}

void Worker::abandon(std::string message) {
  failure_ = std::move(message);
  Fiber* self = current->fiber;
  current = nullptr;
  Fiber::change(*self, main_);
  abort();  // nobody continues an abandoned fiber
}

namespace {

// "0-63, 96": runs of consecutive numbers.
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
  return std::to_string(threads.size()) + (threads.size() == 1 ? " thread (" : " threads (") + ranges_text(threads) + ")";
}

}  // namespace

void Worker::deadlock() {
  std::string report = "deadlock, no thread can go on";
  for (Block* block : blocks) {
    std::string where = "\n  block " + index_text(block->index.x, block->index.y, block->index.z) + ": ";
    std::vector<std::pair<std::string, std::vector<unsigned>>> places;
    std::vector<unsigned> exited;
    for (const Thread& thread : block->threads) {
      if (!(thread.warp->alive >> thread.lane & 1)) {
        exited.push_back(thread.linear);
        continue;
      }
      std::string place = std::string(thread.op) + " at " + thread.site.file + ":" + std::to_string(thread.site.line);
      auto same = std::find_if(places.begin(), places.end(), [&](const auto& p) { return p.first == place; });
      if (same == places.end()) same = places.insert(same, {place, {}});
      same->second.push_back(thread.linear);
    }
    for (const auto& place : places) report += where + count_text(place.second) + " wait in " + place.first;
    if (!exited.empty()) report += where + count_text(exited) + " have exited";
  }
  abandon(std::move(report));
}

// ---- who runs next --------------------------------------------------------------------------------------------------

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

Thread* Worker::pick() {
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
  if (fiber_stack_bytes_ != options.stack_bytes) {  // the option changed: none is in use between launches
    if (free_.size() == fibers_.size()) {
      free_.clear();
      fibers_.clear();
      fiber_stack_bytes_ = options.stack_bytes;
    }
  }
  if (free_.empty()) {
    fibers_.push_back(std::make_unique<Fiber>(fiber_stack_bytes_, unsigned(fibers_.size()), &Worker::fiber_entry));
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
  idle_ = 0;
  Thread* next = pick();
  if (next == nullptr) deadlock();
  if (next != self) change_to(*self->fiber, next);
}

void Worker::yield() {
  Thread* self = current;
  make_ready(self);
  Thread* next = pick_after(self);
  if (next != self) change_to(*self->fiber, next);
}

void Worker::maybe_yield() {
  if (options.random && (random.next() & 1)) {
    Thread* self = current;
    make_ready(self);
    Thread* next = pick();
    if (next != self) change_to(*self->fiber, next);
  }
}

void Worker::poll(const char* op, Site site, uint64_t patience) {
  current->op = op;
  current->site = site;
  if (++idle_ > patience) deadlock();
  if (idle_ % 1024 == 0) std::this_thread::yield();
  yield();
}

// ---- a thread's life ------------------------------------------------------------------------------------------------

void Worker::fiber_entry() {
  Fiber::begin();
  worker->run_threads();
}

// Runs CUDA threads one after the other on this stack: as long as each returns without having waited, or the next one
// has not begun, there is nothing to switch to.
void Worker::run_threads() {
  for (;;) {
    Thread* thread = current;
    try {
      launch->run_thread(launch->arguments);
    } catch (const std::exception& error) {
      fail("exception in the kernel: %s", error.what());
    } catch (...) {
      fail("exception in the kernel");
    }
    finish(thread);
    Thread* next = alive_ > 0 ? pick() : nullptr;
    if (alive_ > 0 && next == nullptr) deadlock();
    Fiber* self = thread->fiber;
    if (kTsan) {
      tsan_release(&done_);
      used_.push_back(self);  // its stack must not be reused by another thread of this block: false races
    } else if (next != nullptr && !(next->warp->started >> next->lane & 1)) {
      start(next, self);
      current = next;
      continue;
    } else {
      free_.push_back(self);  // it stops here, ready to begin the thread that takes it
    }
    if (next != nullptr) {
      change_to(*self, next);
    } else {
      current = nullptr;
      Fiber::change(*self, main_);
    }
  }
}

void Worker::finish(Thread* thread) {
  TsanIgnore ignore;
  for (const Collective& pending : thread->warp->pending) {
    if (pending.arrived != 0 && (pending.mask >> thread->lane & 1)) {
      fail("the thread exits while others of its warp wait for it in %s at %s:%d", pending.op, pending.site.file,
           pending.site.line);
    }
  }
  thread->copies.clear();  // never waited for, so nobody may look at them
  thread->copy_groups.clear();
  thread->warp->alive &= ~(1u << thread->lane);
  --blocks[thread->block->cluster_rank]->alive;
  --alive_;
  idle_ = 0;
  if (alive_ > 0) release_cluster();
}

// ---- barriers and collectives ---------------------------------------------------------------------------------------

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
  if (id < 0 || id > 15) fail("%s at %s:%d: barrier %d does not exist (0 to 15)", op, site.file, site.line, id);
  if (count < 0 || count % 32 != 0 || count > int(block.size + 31) / 32 * 32) {
    fail("%s at %s:%d: %d threads (a multiple of 32, at most the block's %u)", op, site.file, site.line, count, block.size);
  }
  if (count == 0) count = int(block.size);  // threads that have exited never arrive: reported as a deadlock
  Barrier& b = block.barriers[id];
  if (b.arrived > 0 && b.count != count) {
    fail("barrier %d: %s at %s:%d expects %d threads, %s at %s:%d expects %d", id, op, site.file, site.line, count, b.op,
         b.site.file, b.site.line, b.count);
  }
  if (b.arrived > 0 && id == 0 && (b.site.line != site.line || strcmp(b.site.file, site.file) != 0)) {
    fail("divergent barrier: %s at %s:%d while others wait in %s at %s:%d", op, site.file, site.line, b.op, b.site.file,
         b.site.line);
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

// As the PTX manual says of barrier.cluster, threads that have exited are not waited for.
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
    fail("%s at %s:%d: the calling lane %d is not in the mask %08x", op, site.file, site.line, self->lane, mask);
  }
  Collective* entry = nullptr;
  for (Collective& c : warp.pending) {
    if (c.arrived != 0 && c.mask == mask) entry = &c;
  }
  if (entry == nullptr) {
    for (Collective& c : warp.pending) {
      if (c.arrived == 0) entry = &c;
    }
    if (entry == nullptr) fail("%s at %s:%d: more than four groups of a warp diverge", op, site.file, site.line);
    if (mask & ~warp.alive) {
      fail("%s at %s:%d: the mask %08x names lanes that have exited or do not exist (lanes there: %08x)", op, site.file,
           site.line, mask, warp.alive);
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

void spin_yield(Site site) { worker->poll("__nanosleep", site, uint64_t(1) << 26); }

void thread_fence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  static char order;  // fences order whatever the race detector saw before them
  tsan_release(&order);
  tsan_acquire(&order);
}

void read_shared(const void* p, size_t bytes) { tsan_read(p, bytes, __builtin_return_address(0)); }

// ---- blocks ---------------------------------------------------------------------------------------------------------

Block::~Block() {
  if (memory != nullptr) unmap_pages(memory, memory_bytes + page_bytes());
}

// Shared memory ends at a page that faults, up to the slack that alignment needs; the slack is a canary.
void Worker::place_memory(Block& block) {
  size_t padded = (launch->smem_bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  if (block.memory_bytes < padded || block.memory == nullptr) {
    if (block.memory != nullptr) unmap_pages(block.memory, block.memory_bytes + page_bytes());
    block.memory_bytes = std::max<size_t>(1, (padded + page_bytes() - 1) / page_bytes()) * page_bytes();
    block.memory = static_cast<unsigned char*>(map_pages(block.memory_bytes + page_bytes()));
    forbid_page(block.memory + block.memory_bytes);
  }
  asan_unpoison(block.memory, block.memory_bytes);
  if (kTsan) forget_pages(block.memory, block.memory_bytes);
  block.smem_bytes = launch->smem_bytes;
  block.smem = block.memory + block.memory_bytes - padded;
  memset(block.smem, options.poison ? 0xff : 0, launch->smem_bytes);
  memset(block.smem + launch->smem_bytes, kCanary, padded - launch->smem_bytes);
  asan_poison(block.smem + launch->smem_bytes, padded - launch->smem_bytes);
}

void Worker::prepare(Block& block, size_t index, unsigned rank) {
  const dim3& grid = launch->grid;
  const dim3& shape = launch->block;
  unsigned size = shape.x * shape.y * shape.z;
  bool same_shape = block.size == size && block.block_dim.x == shape.x && block.block_dim.y == shape.y;
  block.index = {unsigned(index % grid.x), unsigned(index / grid.x % grid.y), unsigned(index / grid.x / grid.y)};
  block.grid_dim = grid;
  block.block_dim = shape;
  block.cluster_rank = rank;
  block.cluster_size = launch->cluster;
  block.size = block.alive = size;
  block.bulk_copies.clear();
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
  static thread_local std::unique_ptr<Worker> mine;
  if (mine == nullptr) mine = std::make_unique<Worker>();
  worker = mine.get();
  return *mine;
}

std::string Worker::run_cluster(const Launch& l, const Options& o, size_t cluster, uint64_t launch_number) {
  TsanIgnore ignore;
  launch = &l;
  options = o;
  random.state = o.seed * 0x2545f4914f6cdd1dull + launch_number * 0x9e3779b97f4a7c15ull + cluster;
  failure_.clear();
  fault.clear();
  current = nullptr;
  block_turn_ = 0;
  idle_ = 0;
  if (kTsan) pool_.clear();  // the race detector keeps clocks per address: new barriers, new clocks
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
  if (kTsan) forget_tsan_fibers();
  if (failure_.empty()) {
    for (Block* block : blocks) {
      const unsigned char* end = block->memory + block->memory_bytes;
      asan_unpoison(block->smem, size_t(end - block->smem));
      if (std::any_of(static_cast<const unsigned char*>(block->smem) + block->smem_bytes, end,
                      [](unsigned char c) { return c != kCanary; })) {
        failure_ = "written past the end of its " + std::to_string(block->smem_bytes) +
                   " bytes of shared memory\n  in block " + index_text(block->index.x, block->index.y, block->index.z);
        break;
      }
    }
  }
  if (!failure_.empty()) {  // every fiber stopped somewhere in a kernel
    free_.clear();
    for (auto& fiber : fibers_) {
      fiber->reset();
      free_.push_back(fiber.get());
    }
    for (Block* block : blocks) block->size = 0;  // rebuilt from nothing next time
  }
  return failure_;
}

void Worker::forget_tsan_fibers() {
#ifdef LAB_HOST_TSAN
  // The race detector forgets what a destroyed fiber did, so they are kept a while: blocks race with later blocks.
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
  return std::any_of(fibers_.begin(), fibers_.end(), [&](const auto& fiber) { return fiber->guards(address); });
}

// ---- launches -------------------------------------------------------------------------------------------------------

namespace {

// OS threads that stay; clusters are handed out by an atomic counter. Never destroyed: at exit the threads just end.
class Pool {
 public:
  static Pool& here() {
    std::call_once(once_, [] { pthread_atfork(nullptr, nullptr, [] { pool_ = nullptr; }); });
    if (pool_ == nullptr) pool_ = new Pool;  // at first, and in a forked child, which has none of the threads
    return *pool_;
  }

  void run(const Launch& launch) {
    launch_ = &launch;
    options_ = get_options();
    if (options_.threads <= 0) options_.threads = available_cores();
    clusters_ = size_t(launch.grid.x) * launch.grid.y * launch.grid.z / launch.cluster;
    chunk_ = options_.random ? 1 : std::max<size_t>(1, clusters_ / (size_t(options_.threads) * 8));
    next_ = 0;
    failure_.clear();
    failed_ = false;
    ++launch_number_;
    if (options_.random) {
      order_.resize(clusters_);
      std::iota(order_.begin(), order_.end(), size_t(0));
      Random random{options_.seed ^ launch_number_ << 32};
      for (size_t i = clusters_; i > 1; --i) std::swap(order_[i - 1], order_[random.next() % i]);
    }
    unsigned helpers = unsigned(std::min<size_t>(size_t(options_.threads), clusters_)) - 1;
    if (helpers > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      while (threads_ < helpers) {
        std::thread(&Pool::help, this, threads_++).detach();
      }
      helpers_ = busy_ = helpers;
      ++generation_;
      wake_.notify_all();
    }
    work();
    if (helpers > 0) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, [&] { return busy_ == 0; });
    }
    if (failed_) throw std::runtime_error("kernel " + std::string(launch.name) + ": " + failure_);
  }

  std::mutex one_launch;

 private:
  void work() {
    catch_faults_on_this_thread();
    Worker& mine = Worker::here();
    while (!failed_) {
      size_t first = next_.fetch_add(chunk_);
      if (first >= clusters_) break;
      for (size_t i = first; i < std::min(clusters_, first + chunk_) && !failed_; ++i) {
        std::string failure;
        try {
          failure = mine.run_cluster(*launch_, options_, options_.random ? order_[i] : i, launch_number_);
        } catch (const std::exception& error) {
          failure = error.what();
        }
        if (!failure.empty()) {
          std::lock_guard<std::mutex> lock(mutex_);
          if (!failed_) failure_ = failure;
          failed_ = true;
        }
      }
    }
    mine.end_launch();
  }

  void help(unsigned number) {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (number >= helpers_) continue;
      }
      work();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  static std::once_flag once_;
  static Pool* pool_;

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  unsigned threads_ = 0;  // helpers that exist
  unsigned helpers_ = 0;  // that take part in this launch
  unsigned busy_ = 0;
  uint64_t generation_ = 0;

  const Launch* launch_ = nullptr;
  Options options_;
  uint64_t launch_number_ = 0;
  size_t clusters_ = 0, chunk_ = 1;
  std::vector<size_t> order_;
  std::atomic<size_t> next_{0};
  std::atomic<bool> failed_{false};
  std::string failure_;
};

std::once_flag Pool::once_;
Pool* Pool::pool_ = nullptr;
std::mutex launch_mutex;

}  // namespace

void run(const Launch& launch) {
  auto refuse = [&](const std::string& why) { throw std::runtime_error("kernel " + std::string(launch.name) + ": " + why); };
  const dim3 &grid = launch.grid, &block = launch.block;
  size_t threads = size_t(block.x) * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    refuse("invalid grid " + index_text(grid.x, grid.y, grid.z));
  }
  if (threads == 0 || threads > 1024 || block.z > 64) refuse("invalid block " + index_text(block.x, block.y, block.z));
  if (launch.smem_bytes > kMaxSharedBytes) {
    refuse(std::to_string(launch.smem_bytes) + " bytes of shared memory (at most " + std::to_string(kMaxSharedBytes) + ")");
  }
  if (launch.cluster == 0 || launch.cluster > 8 || grid.x % launch.cluster != 0) {
    refuse("a cluster of " + std::to_string(launch.cluster) + " blocks does not fit a grid of " + std::to_string(grid.x));
  }
  if (current != nullptr) refuse("launched from inside a kernel");
  std::lock_guard<std::mutex> lock(launch_mutex);
  Pool::here().run(launch);
}

}  // namespace host
}  // namespace lab
