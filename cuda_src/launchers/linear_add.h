#pragma once
#include "arguments.h"

// residual[b, n] += sum over k of x[b, k] * w[n, k] (+ bias[n]). tiled: see linear.h.
struct LinearAddArgs {
  Ptr x, tiled;
  Weights w;
  Ptr bias, residual;
  int rows, n, k, dtype;
  Ptr stream;
};
void linear_add(const LinearAddArgs& a);
