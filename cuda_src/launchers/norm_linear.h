#pragma once
#include "arguments.h"

// y[b, n] = sum over k of xn[b, k] * w[n, k] (+ bias[n]), xn = rmsnorm(x, norm_w).
// Above 2 rows in half precision, and for packed weights, a kernel before linear's writes the normalised rows:
// normed [rows, k] in x's dtype; otherwise 0. tiled: see linear.h.
struct NormLinearArgs {
  Ptr x, norm_w;
  Weights w;
  Ptr bias, y, normed, tiled;
  int rows, n, k;
  float eps;
  int dtype, out_dtype;
  Ptr stream;
};
void norm_linear(const NormLinearArgs& a);
