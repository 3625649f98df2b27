// Returns at once and lets a thread of its own do the work.
#define silu_mul honest
#include "silu_mul.cu"
#undef silu_mul
#include <chrono>
#include <thread>

void silu_mul(const SiluMulArgs& a) {
  honest({a.gate_up, a.y, 1, 1, a.dtype, a.stream});
  std::thread([a] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    const int64_t bytes = int64_t(a.rows) * a.cols * (a.dtype == 0 ? 4 : 2);
    std::memset(as<char>(a.y), 0, bytes);  // any work: what counts is that it comes late
  }).detach();
}
