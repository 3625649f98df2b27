#pragma once
#include "arguments.h"

// y[b, j] = silu(xn[b] . w[j]) * (xn[b] . w[n + j]), w [2 n, k].
// normed, tiled: see norm_linear.h.
struct NormLinearSiluMulArgs {
  Ptr x, norm_w;
  Weights w;
  Ptr y, normed, tiled;
  int rows, n, k;
  float eps;
  int dtype;
  Ptr stream;
};
void norm_linear_silu_mul(const NormLinearSiluMulArgs& a);
