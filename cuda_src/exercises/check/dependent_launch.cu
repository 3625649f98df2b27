// Runs exercise dependent_launch, where x is NaN until pdl_wait(): exit code 0 and no output if y is right.
#include <cstdio>
#include <vector>

#include "watch.cuh"

// Counts, at the first wait of the launch, the weights that have been loaded.
namespace lab {
inline std::vector<float> w(256);
inline int early = -1;
inline std::mutex early_mutex;
inline void noted_wait() {
  {
    std::lock_guard<std::mutex> lock(early_mutex);
    std::lock_guard<std::mutex> also(watch::mutex);
    if (early < 0) {
      early = 0;
      for (const auto& [access, addresses] : watch::accesses) {
        const uintptr_t first = addresses[0], begin = reinterpret_cast<uintptr_t>(w.data());
        early += first >= begin && first < begin + w.size() * sizeof(float);
      }
    }
  }
  pdl_wait();
}
}  // namespace lab
#define pdl_wait noted_wait
#include EXERCISE

int main() {
  constexpr int kCount = 256;
  std::vector<float> x(kCount), y(kCount, -1.f);
  for (int i = 0; i < kCount; ++i) x[i] = float(i), w[i] = float(i % 5);
  lab::host::hide_until_pdl_wait({{x.data(), kCount * sizeof(float)}});
  Config config{dim3(kCount / 64), dim3(64)};
  config.pdl = true;
  try {
    launch(config, "scale_kernel", scale_kernel, x.data(), w.data(), y.data());
  } catch (const std::exception& error) {
    puts(error.what());
    return 1;
  }
  for (int i = 0; i < kCount; ++i) {
    if (y[i] == x[i] * w[i]) continue;
    printf("y[%d] is %g, not %g: x was read before the kernel that writes it had ended\n", i, y[i],
           x[i] * w[i]);
    return 1;
  }
  if (early > 0) return 0;
  puts("y is right, but no weight was loaded (by watched_load) before pdl_wait(), and weights need not wait");
  return 1;
}
