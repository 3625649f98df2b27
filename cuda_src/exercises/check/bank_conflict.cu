// Runs exercise bank_conflict: exit code 0 and no output if the result is right and every access takes one
// step.
#include <cstdio>
#include <vector>

#include EXERCISE

int main() {
  std::vector<float> x(kSide * kSide), y(x.size(), -1.f);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i);
  launch({dim3(1), dim3(kSide), sizeof(TransposeSmem)}, "transpose_kernel", transpose_kernel, x.data(),
         y.data());
  for (int i = 0; i < kSide * kSide; ++i) {
    const float want = x[i % kSide * kSide + i / kSide];
    if (y[i] == want) continue;
    printf("y[%d] is %g, not %g\n", i, y[i], want);
    return 1;
  }
  const auto worst = watch::worst(nullptr, reinterpret_cast<void*>(~uintptr_t(0)), watch::bank_steps,
                                  [](const auto&) { return size_t(1); });
  if (worst.lanes < size_t(2 * kSide * kSide)) {
    puts("some accesses to the tile were not watched: use watched_load and watched_store for it");
    return 1;
  }
  if (worst.cost > 1) {
    printf("line %d: one access of the warp to shared memory takes %zu steps, where 1 would do\n", worst.line,
           worst.cost);
    return 1;
  }
  return 0;
}
