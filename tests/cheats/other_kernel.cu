// Is right, but launches one kernel more when it has been called often.
#define silu_mul honest
#include "silu_mul.cu"
#undef silu_mul
void silu_mul(const SiluMulArgs& a) {
  static int calls = 0;
  honest(a);
  if (++calls > 9) honest(a);
}
