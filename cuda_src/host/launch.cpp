// Launches: checks the configuration, then distributes the grid's clusters of blocks over OS threads.
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#ifdef __linux__
#include <sched.h>
#endif

#include "fault.h"
#include "sanitizer.h"
#include "scheduler.h"

namespace lab {
namespace host {
namespace {

constexpr size_t kMaxSharedBytes = 227 * 1024;  // per block on Hopper

int available_cores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, int(std::thread::hardware_concurrency()));
}

// OS threads that live as long as the process; they take clusters by an atomic counter. Never destroyed: at
// exit the threads simply end.
class Pool {
 public:
  static Pool& here() {
    std::call_once(once_, [] { pthread_atfork(nullptr, nullptr, [] { pool_ = nullptr; }); });
    // The first time, and in a forked child, which has none of the threads.
    if (pool_ == nullptr) pool_ = new Pool;
    return *pool_;
  }

  void run(const Launch& launch) {
    launch_ = &launch;
    options_ = get_options();
    if (options_.threads <= 0) options_.threads = available_cores();
    clusters_ = size_t(launch.grid.x) * launch.grid.y * launch.grid.z / launch.cluster;
    const bool shuffled = options_.random, reversed = !shuffled && options_.ahead == Ahead::highest;
    chunk_ = shuffled || reversed ? 1 : std::max<size_t>(1, clusters_ / (size_t(options_.threads) * 8));
    next_ = 0;
    failure_.clear();
    failed_ = false;
    ++launch_number_;
    order_.clear();
    if (shuffled || reversed) {
      order_.resize(clusters_);
      std::iota(order_.begin(), order_.end(), size_t(0));
    }
    if (reversed) std::reverse(order_.begin(), order_.end());
    if (shuffled) {
      Random random{options_.seed ^ launch_number_ << 32};
      for (size_t i = clusters_; i > 1; --i) std::swap(order_[i - 1], order_[random.next() % i]);
    }
    unsigned helpers = unsigned(std::min<size_t>(size_t(options_.threads), clusters_)) - 1;
    if (helpers > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      while (threads_ < helpers) { std::thread(&Pool::help, this, threads_++).detach(); }
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
          failure = mine.run_cluster(*launch_, options_, order_.empty() ? i : order_[i], launch_number_);
        } catch (const std::exception& error) { failure = error.what(); }
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
  unsigned threads_ = 0;  // helper threads that exist
  unsigned helpers_ = 0;  // helper threads that take part in this launch
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

// Here one kernel runs at a time, so there is nothing to wait for. But memory that a GPU might not have
// written yet is hidden.

std::mutex hidden_mutex;
std::vector<Region> hidden;
std::vector<std::vector<unsigned char>> contents;  // of the regions, while they are hidden
std::atomic<bool> waited{false};                   // whether a thread of this launch has called pdl_wait()
std::atomic<bool> hiding{false};                   // whether there are `contents`

void hide() {
  std::lock_guard<std::mutex> lock(hidden_mutex);
  waited = false;
  for (const Region& region : hidden) {
    auto* bytes = static_cast<unsigned char*>(region.begin);
    contents.emplace_back(bytes, bytes + region.bytes);
    memset(bytes, 0xff, region.bytes);
  }
  hiding = !contents.empty();
}

void show() {
  std::lock_guard<std::mutex> lock(hidden_mutex);
  for (size_t i = contents.size(); i-- > 0;) {  // in reverse order, because regions may overlap
    memcpy(hidden[i].begin, contents[i].data(), contents[i].size());
  }
  contents.clear();
  hiding = false;
}

struct Hiding {  // restores the contents of the regions, whatever happens
  explicit Hiding(bool pdl) : pdl_(pdl) {
    if (pdl_) hide();
  }
  ~Hiding() {
    if (pdl_) show();
  }
  bool pdl_;
};

}  // namespace

void pdl_wait() {
  TsanIgnore ignore;
  if (waited.load(std::memory_order_acquire)) return;
  show();
  waited.store(true, std::memory_order_release);
}

const void* source_now(const void* src, size_t bytes) {
  static const std::vector<unsigned char> ones(kMaxSharedBytes, 0xff);
  if (!hiding) return src;
  std::lock_guard<std::mutex> lock(hidden_mutex);
  auto* begin = static_cast<const unsigned char*>(src);
  for (size_t i = 0; i < contents.size(); ++i) {
    auto* from = static_cast<const unsigned char*>(hidden[i].begin);
    if (begin < from + hidden[i].bytes && from < begin + bytes) return ones.data();
  }
  return src;
}

void hide_until_pdl_wait(std::vector<Region> regions) {
  std::lock_guard<std::mutex> launch_lock(launch_mutex);
  std::lock_guard<std::mutex> lock(hidden_mutex);
  hidden = std::move(regions);
}

void run(const Launch& launch) {
  auto refuse = [&](const std::string& why) {
    throw std::runtime_error("kernel " + std::string(launch.name) + ": " + why);
  };
  const dim3 &grid = launch.grid, &block = launch.block;
  size_t threads = size_t(block.x) * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    refuse("invalid grid " + index_text(grid.x, grid.y, grid.z));
  }
  if (threads == 0 || threads > 1024 || block.z > 64)
    refuse("invalid block " + index_text(block.x, block.y, block.z));
  if (launch.smem_bytes > kMaxSharedBytes) {
    refuse(std::to_string(launch.smem_bytes) + " bytes of shared memory (at most " +
           std::to_string(kMaxSharedBytes) + ")");
  }
  if (launch.cluster == 0 || launch.cluster > 8 || grid.x % launch.cluster != 0) {
    refuse("a cluster of " + std::to_string(launch.cluster) + " blocks does not divide a grid of " +
           std::to_string(grid.x));
  }
  if (current != nullptr) refuse("launched from inside a kernel");
  std::lock_guard<std::mutex> lock(launch_mutex);
  Hiding hiding(launch.pdl);
  Pool::here().run(launch);
  if (launch.pdl && !waited) refuse("allows programmatic dependent launch, but no thread called pdl_wait()");
}

}  // namespace host
}  // namespace lab
