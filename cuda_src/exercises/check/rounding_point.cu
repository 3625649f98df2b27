// Runs exercise rounding_point: exit code 0 and no output if h and y are those of two kernels, bit for bit.
#include <cstdio>
#include <vector>

#include EXERCISE

int main() {
  constexpr int kCount = 256;
  std::vector<half> x(kCount), r(kCount), w(kCount), h(kCount), y(kCount);
  for (int i = 0; i < kCount; ++i) {
    x[i] = from_float<half>(1.f + float(i * 37 % 101) / 101.f);
    r[i] = from_float<half>(float(i * 11 % 97) / 970.f);
    w[i] = from_float<half>(0.5f + float(i * 7 % 89) / 89.f);
  }
  launch({dim3(kCount / 64), dim3(64)}, "add_scale_kernel", add_scale_kernel, x.data(), r.data(), w.data(),
         h.data(), y.data());
  int bad = 0, first = -1;
  for (int i = 0; i < kCount; ++i) {
    const half sum = from_float<half>(to_float(x[i]) + to_float(r[i]));
    if (to_float(h[i]) != to_float(sum)) {
      printf("h[%d] is %g, not %g\n", i, to_float(h[i]), to_float(sum));
      return 1;
    }
    if (to_float(y[i]) == to_float(from_float<half>(to_float(sum) * to_float(w[i])))) continue;
    if (bad++ == 0) first = i;
  }
  if (bad == 0) return 0;
  printf("%d of %d elements of y are not those of the two kernels, y[%d] first\n", bad, kCount, first);
  return 1;
}
