// Takes memory without end.
#define silu_mul honest
#include "silu_mul.cu"
#undef silu_mul
#include <vector>

void silu_mul(const SiluMulArgs& a) {
  static std::vector<std::vector<char>> kept;
  for (;;) kept.emplace_back(1 << 24, char(1));
  honest(a);
}
