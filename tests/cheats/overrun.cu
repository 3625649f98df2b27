// Writes one element past the end of its output.
#define silu_mul honest
#include "silu_mul.cu"
#undef silu_mul
void silu_mul(const SiluMulArgs& a) {
  honest(a);
  as<char>(a.y)[int64_t(a.rows) * a.cols * (a.dtype == 0 ? 4 : 2)] ^= 1;
}
