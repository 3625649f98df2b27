// Runs exercise barrier: exit code 0 and no output if the result is right.
#include <cstdio>
#include <vector>

#include EXERCISE

int main() {
  constexpr int kTiles = 5;
  std::vector<float> x(kTiles * kTile), y(x.size(), -1.f);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i);
  launch({dim3(1), dim3(kTile), sizeof(ReverseSmem)}, "reverse_kernel", reverse_kernel, x.data(), y.data(),
         kTiles);
  for (int t = 0; t < kTiles; ++t) {
    for (int i = 0; i < kTile; ++i) {
      const float want = x[t * kTile + kTile - 1 - i], got = y[t * kTile + i];
      if (got == want) continue;
      printf("y[%d] is %g, not %g: that number belongs to tile %d, and this is tile %d\n", t * kTile + i, got,
             want, int(got) / kTile, t);
      return 1;
    }
  }
  return 0;
}
