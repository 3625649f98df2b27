// The scheduler's data: the blocks that run, and the worker that runs them. One worker per OS thread.
#pragma once
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "runtime.h"

namespace lab {
namespace host {

std::string index_text(unsigned x, unsigned y, unsigned z);  // "(x,y,z)"

// A small random generator (splitmix64), seeded per cluster, so that a cluster's schedule does not depend
// on which OS thread runs it.
struct Random {
  uint64_t state = 0;
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  unsigned below(unsigned n) { return unsigned(next() % n); }
};

struct Barrier {
  uint32_t waiting[32];  // the waiting lanes of each warp
  int arrived;           // threads, of `count`
  int count;
  int sum, result;  // of the threads' values: in this phase, and in the last completed one
  uint32_t phase;   // completions so far
  const char* op;
  Site site;
  char order[2];  // as in Collective
};

struct BulkCopy {
  void* dst;
  const void* src;
  uint32_t bytes;
  uint64_t* bar;
};

struct Block : BlockInfo {
  static constexpr size_t kGuardBytes = 64 * 1024;  // forbidden pages, before and after `memory`

  unsigned char* memory = nullptr;  // the pages of shared memory; smem ends where they end
  size_t memory_bytes = 0;
  unsigned size = 0;          // threads
  unsigned alive = 0;         // threads that have not returned yet
  uint32_t ready_warps = 0;   // warps with a lane that could run
  uint32_t polling[32] = {};  // lanes of each warp that poll; other threads run before them
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::vector<BulkCopy> bulk_copies;  // issued, not yet carried out

  void map_memory(size_t bytes);
  void unmap_memory();
  ~Block() { unmap_memory(); }
};

class Worker {
 public:
  static Worker& here();  // the calling OS thread's worker

  // Runs the blocks of cluster number `cluster` to their end. Returns an empty string, or why the launch
  // failed.
  std::string run_cluster(const Launch& launch, const Options& options, size_t cluster,
                          uint64_t launch_number);
  void end_launch();

  // For the running thread:
  void wait(const char* op, Site site);  // until another thread makes it ready
  void yield();                          // other threads run first
  void maybe_yield();                    // in a random schedule: perhaps other threads first
  // Yields; after `patience` calls without progress: deadlock.
  void poll(const char* op, Site site, uint64_t patience);
  void poll_rank(int rank, Site site);  // the same for memory that another process writes: by time
  [[noreturn]] void abandon();          // stops the cluster where it is; `failure` says why
  [[noreturn]] void deadlock();

  bool release(Block& block, Barrier& barrier);  // makes the waiting threads ready, if all have arrived
  bool release_cluster();
  void progress() { idle_ = 0, rank_waits_ = false; }
  static void make_ready(Thread* thread);

  std::vector<Block*> blocks;  // of the cluster that runs
  Barrier cluster_barrier;
  Options options;
  Random random;
  const Launch* launch = nullptr;
  std::string failure;  // empty while there is no failure

  bool guards_stack(const void* address) const;

 private:
  static void fiber_entry();
  std::string deadlock_report() const;
  [[noreturn]] void run_threads();
  void finish(Thread* thread);
  void prepare(Block& block, size_t index, unsigned rank);
  void place_memory(Block& block);
  Thread* take(Block& block, unsigned warp, unsigned lane);
  Thread* pick_ahead();  // see Options::ahead; null if all that could run are polling
  Thread* pick();        // the next to run: the same warp first
  // In turn, so that a polling thread does not keep the others from running.
  Thread* pick_after(Thread* thread);
  void start(Thread* thread, Fiber* fiber);
  void set_polling(bool polling);
  void change_to(Fiber& from, Thread* next);
  Fiber* free_fiber();
  void retire_tsan_fibers();

  std::vector<std::unique_ptr<Block>> pool_;  // blocks, reused
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> free_;
  std::vector<Fiber*> used_;  // race detector: not to be reused before the block has ended
  size_t fiber_stack_bytes_ = 0;
  std::vector<void*> tsan_fibers_, tsan_dead_;
  Fiber main_;
  unsigned alive_ = 0;                                // threads of the cluster
  unsigned block_turn_ = 0;                           // block that ran last
  uint64_t idle_ = 0;                                 // polls since the last progress
  bool rank_waits_ = false;                           // whether any of them was for another process
  std::chrono::steady_clock::time_point rank_since_;  // when the first of these was
  char done_;
};

extern LAB_THREAD_LOCAL Worker* worker;  // null until this OS thread has run a block

}  // namespace host
}  // namespace lab
