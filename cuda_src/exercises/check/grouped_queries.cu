// Runs exercise grouped_queries: exit code 0 and no output if scores are right and each key is loaded once.
#include <cmath>
#include <cstdio>
#include <vector>

#include EXERCISE

int main() {
  constexpr int kLength = 9;
  std::vector<float> q(kGroup * kDim), k(kLength * kDim), scores(kGroup * kLength, -1.f);
  for (size_t i = 0; i < q.size(); ++i) q[i] = float(i * 7 % 5) - 2.f;
  for (size_t i = 0; i < k.size(); ++i) k[i] = float(i * 3 % 11) - 5.f;
  launch({dim3(1), dim3(kDim)}, "scores_kernel", scores_kernel, q.data(), k.data(), scores.data(), kLength);
  for (int h = 0; h < kGroup; ++h) {
    for (int t = 0; t < kLength; ++t) {
      float want = 0.f;
      for (int d = 0; d < kDim; ++d) want += q[h * kDim + d] * k[t * kDim + d];
      if (scores[h * kLength + t] == want) continue;
      printf("head %d, token %d: %g, not %g\n", h, t, scores[h * kLength + t], want);
      return 1;
    }
  }
  const auto one = [](const auto&) { return size_t(1); };
  const auto loads = watch::worst(k.data(), k.data() + k.size(), one, one).lanes;
  if (loads < k.size()) {
    puts("some loads of k were not watched: use watched_load for them");
    return 1;
  }
  if (loads == k.size()) return 0;
  printf("each key is loaded %g times, where once would do\n", double(loads) / double(k.size()));
  return 1;
}
