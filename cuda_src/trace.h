// Which kernels were launched: a list of names, kept only while tracing is on.
//
// Plain C++, so that bindings.cpp can include it too. Hidden visibility keeps the GPU extension's list and the
// host extension's list apart when both are loaded in one process.
#pragma once
#include <atomic>
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

}  // namespace lab
