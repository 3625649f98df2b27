// Runs exercise coalescing: exit code 0 and no output if the result is right and no access touches more lines
// than it needs.
#include <cstdio>
#include <vector>

#include EXERCISE

int main() {
  constexpr int kBlocks = 3, kCount = kBlocks * kThreads * kPerThread;
  std::vector<float> memory(2 * kCount + 32);
  float* x = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 127) / 128 * 128);
  float* y = x + kCount;
  for (int i = 0; i < kCount; ++i) x[i] = float(i), y[i] = -1.f;
  launch({dim3(kBlocks), dim3(kThreads)}, "double_kernel", double_kernel, x, y);
  for (int i = 0; i < kCount; ++i) {
    if (y[i] == 2 * x[i]) continue;
    printf("y[%d] is %g, not %g\n", i, y[i], 2 * x[i]);
    return 1;
  }
  const auto lines = [](const auto& addresses) { return watch::distinct(addresses, 128); };
  const auto fewest = [](const auto& addresses) {
    return (watch::distinct(addresses, sizeof(float)) * 4 + 127) / 128;
  };
  for (const auto& [name, array] : {std::pair{"load", x}, std::pair{"store", y}}) {
    const auto worst = watch::worst(array, array + kCount, lines, fewest);
    if (worst.lanes < size_t(kCount)) {
      printf("only %zu of %d %ss were watched: use watched_load and watched_store for x and y\n", worst.lanes,
             kCount, name);
      return 1;
    }
    if (worst.cost <= worst.fewest) continue;
    printf("line %d: one %s of a warp touches %zu lines of 128 bytes, where %zu would do\n", worst.line, name,
           worst.cost, worst.fewest);
    return 1;
  }
  return 0;
}
