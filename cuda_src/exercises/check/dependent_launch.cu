// Runs exercise dependent_launch, where x is NaN until pdl_wait(): exit code 0 and no output if y is right.
#include <cstdio>
#include <vector>

#include EXERCISE

int main() {
  constexpr int kCount = 256;
  std::vector<float> x(kCount), w(kCount), y(kCount, -1.f);
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
  return 0;
}
