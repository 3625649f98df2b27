// Never comes back from its fifth call.
#define silu_mul honest
#include "silu_mul.cu"
#undef silu_mul
void silu_mul(const SiluMulArgs& a) {
  static volatile int calls = 0;
  ++calls;
  while (calls == 5) {}
  honest(a);
}
