#include "normed_scratch.h"

#include <mutex>
#include <vector>

#include "common.cuh"

namespace lab {
namespace {

constexpr size_t kFirst = size_t(4) << 20;

struct Buffer {
  Ptr address = 0;
  size_t bytes = 0;
};

// Memory that is outgrown is kept: a captured graph may still use it.
#ifdef __CUDACC__
Ptr allocate(size_t bytes, Ptr stream) {
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  detail::check(cudaStreamIsCapturing(reinterpret_cast<cudaStream_t>(stream), &capturing), "normed_scratch");
  if (capturing != cudaStreamCaptureStatusNone) {
    throw std::runtime_error("normed_scratch: no memory can be taken while a graph is captured; run the op before");
  }
  void* p = nullptr;
  detail::check(cudaMalloc(&p, bytes), "normed_scratch");
  return reinterpret_cast<Ptr>(p);
}
int current_device() {
  int device = 0;
  detail::check(cudaGetDevice(&device), "normed_scratch");
  return device;
}
#else
Ptr allocate(size_t bytes, Ptr) { return reinterpret_cast<Ptr>(::operator new(bytes, std::align_val_t(64))); }
int current_device() { return 0; }
#endif

}  // namespace

Ptr normed_scratch(size_t bytes, Ptr stream) {
  if (trace::recorded_multiprocessors()) return 256;  // an aligned address that no kernel will see
  static std::mutex mutex;
  static std::vector<Buffer> buffers;             // by device
  const std::lock_guard<std::mutex> lock(mutex);
  const size_t device = size_t(current_device());
  if (buffers.size() <= device) buffers.resize(device + 1);
  Buffer& buffer = buffers[device];
  if (buffer.bytes < bytes) {
    const size_t larger = bytes > kFirst ? bytes : kFirst;
    buffer = {allocate(larger, stream), larger};
  }
  return buffer.address;
}

}  // namespace lab
