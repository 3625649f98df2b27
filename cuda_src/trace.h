// Tracing: while it is on, the names of launched kernels are collected. Recording: launches are noted in full
// and not run, so that a machine without a GPU can tell which instantiation a call launches, and with which
// configuration.
//
// Plain C++, so that bindings.cpp can include it too. Hidden visibility keeps the lists of the GPU extension
// and of the host extension apart when both are loaded in one process.
#pragma once
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace lab {
namespace trace __attribute__((visibility("hidden"))) {

  inline std::atomic<bool> enabled{false};
  inline std::mutex mutex;
  inline std::vector<std::string> names;

  inline void record(const char* kernel) {
    if (!enabled.load(std::memory_order_relaxed)) return;
    std::lock_guard<std::mutex> lock(mutex);
    names.emplace_back(kernel);
  }

  // A launch requested while recording. function: the address, in this module, of the kernel's host function.
  struct Launch {
    std::string kernel;
    std::uintptr_t function;
    std::array<unsigned, 3> grid, block;
    size_t smem_bytes;
    unsigned cluster;
    bool pdl;
  };

  inline std::atomic<int> recording{0};        // multiprocessors of the assumed GPU; 0: launches run
  inline std::atomic<int> recording_major{0};  // its major compute capability
  inline std::vector<Launch> launches;

  // Multiprocessors of the assumed GPU while launches are recorded, else 0.
  inline int recorded_multiprocessors() { return recording.load(std::memory_order_relaxed); }
  inline int recorded_major() { return recording_major.load(std::memory_order_relaxed); }

  template <typename Config>
  inline void record_launch(const char* kernel, std::uintptr_t function, const Config& c) {
    std::lock_guard<std::mutex> lock(mutex);
    launches.push_back({kernel,
                        function,
                        {c.grid.x, c.grid.y, c.grid.z},
                        {c.block.x, c.block.y, c.block.z},
                        c.smem_bytes,
                        c.cluster,
                        c.pdl});
  }

}  // namespace trace

// Starts or stops recording; either way the list is emptied.
inline void set_trace(bool on) {
  std::lock_guard<std::mutex> lock(trace::mutex);
  trace::names.clear();
  trace::enabled = on;
}

// Returns the names recorded since the last call, in launch order, and empties the list.
inline std::vector<std::string> take_trace() {
  std::lock_guard<std::mutex> lock(trace::mutex);
  return std::exchange(trace::names, {});
}

// Makes later launches be noted and not run, as on a GPU with this many multiprocessors and this major
// compute capability (the host build ignores the latter and uses LAB_HOST_SHAPES). 0 multiprocessors ends
// this.
inline void record_launches(int multiprocessors, int major) {
  std::lock_guard<std::mutex> lock(trace::mutex);
  trace::launches.clear();
  trace::recording_major = major;
  trace::recording = multiprocessors;
}

// Returns the launches noted since the last call, in order, and empties the list.
inline std::vector<trace::Launch> take_launches() {
  std::lock_guard<std::mutex> lock(trace::mutex);
  return std::exchange(trace::launches, {});
}

}  // namespace lab
