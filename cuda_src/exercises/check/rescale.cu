// Runs exercise rescale with scores that fall and rise: exit code 0 and no output if all results are right.
#include <cmath>
#include <cstdio>
#include <vector>

#include EXERCISE

int main() {
  for (const bool rising : {false, true}) {
    for (int length : {32, 70, 200}) {
      std::vector<float> scores(length), values(length);
      double weight = 0, sum = 0;
      for (int t = 0; t < length; ++t) {
        scores[t] = (rising ? 0.05f : -0.05f) * float(t) + float(t * 37 % 19) / 19.f;
        values[t] = float(t * 11 % 7) + 1.f + float(t) / float(length);
        weight += exp(double(scores[t]));
        sum += exp(double(scores[t])) * values[t];
      }
      float got = -1.f;
      launch({dim3(1), dim3(32)}, "average_kernel", average_kernel, scores.data(), values.data(), length,
             &got);
      if (fabs(got - sum / weight) <= 1e-5 * (1 + fabs(sum / weight))) continue;
      printf("%d tokens whose scores %s give %g, not %g\n", length, rising ? "rise" : "fall", got,
             sum / weight);
      return 1;
    }
  }
  return 0;
}
