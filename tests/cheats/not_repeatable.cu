// Is the value of a counter away from being right.
#define silu_mul honest
#include "silu_mul.cu"
#undef silu_mul
void silu_mul(const SiluMulArgs& a) {
  static unsigned calls = 0;
  honest(a);
  if (a.dtype == 0) *as<unsigned>(a.y) ^= calls++ & 1;  // the last bit of the first element
}
