// Runs exercise counter three times on one counter: exit code 0 and no output if all three sums are right.
#include <cstdio>
#include <vector>

#include EXERCISE

int main() {
  constexpr int kBlocks = 6;
  std::vector<float> x(kBlocks * 32), partial(kBlocks);
  unsigned counter = 0;
  for (int time = 1; time <= 3; ++time) {
    float want = 0.f, got = -1.f;
    for (size_t i = 0; i < x.size(); ++i) want += x[i] = float(i * time % 7);
    launch({dim3(kBlocks), dim3(32)}, "sum_kernel", sum_kernel, x.data(), partial.data(), &counter, &got);
    if (got == want) continue;
    printf("launch %d gives %g, not %g (-1: nothing was written)\n", time, got, want);
    return 1;
  }
  return 0;
}
