// Leaves a zero in its input.
#define silu_mul honest
#include "silu_mul.cu"
#undef silu_mul
void silu_mul(const SiluMulArgs& a) {
  honest(a);
  std::memset(as<char>(a.gate_up), 0, 4);
}
