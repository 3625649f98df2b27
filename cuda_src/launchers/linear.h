#pragma once
#include "arguments.h"

// y[b, n] = sum over k of x[b, k] * w[n, k] (+ bias[n]), b < rows <= 64.
struct LinearArgs {
  Ptr x;
  Weights w;
  Ptr bias, y;
  int rows, n, k, dtype, out_dtype;
  Ptr stream;
};
void linear(const LinearArgs& a);
