// Runs exercise page_lookup with pages of several sizes: exit code 0 and no output if all tokens are right.
#include <cstdio>
#include <vector>

#include EXERCISE

int main() {
  constexpr int kLength = 75;
  for (int page_size : {64, 32, 16, 8}) {
    const int pages = (kLength + page_size - 1) / page_size;
    std::vector<int> table(pages);  // no page beyond those
    std::vector<float> cache(2 * pages * page_size, -1.f), out(kLength, -1.f);
    for (int p = 0; p < pages; ++p) table[p] = 2 * (pages - 1 - p) + 1;
    for (int t = 0; t < kLength; ++t) cache[table[t / page_size] * page_size + t % page_size] = float(t);
    launch({dim3(1), dim3(32)}, "gather_kernel", gather_kernel, cache.data(), table.data(), kLength,
           page_size, out.data());
    for (int t = 0; t < kLength; ++t) {
      if (out[t] == float(t)) continue;
      printf("pages of %d tokens: token %d is that of %g\n", page_size, t, out[t]);
      return 1;
    }
  }
  return 0;
}
