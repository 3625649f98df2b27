#pragma once
#include "arguments.h"

// y[r, c] = silu(gate_up[r, c]) * gate_up[r, cols + c].
struct SiluMulArgs {
  Ptr gate_up, y;
  int rows, cols, dtype;
  Ptr stream;
};
void silu_mul(const SiluMulArgs& a);
