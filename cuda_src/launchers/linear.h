#pragma once
#include "arguments.h"

// y[b, n] = sum over k of x[b, k] * w[n, k] (+ bias[n]), b < rows <= 64.
// tiled: workspace of packed weights and more than 8 rows in half precision (core/tiled_rows.cuh), in x's dtype:
// [2 * (k / 128 rounded up), B, 64] with B = 16 for up to 16 rows and 64 for more; otherwise 0.
struct LinearArgs {
  Ptr x, tiled;
  Weights w;
  Ptr bias, y;
  int rows, n, k, dtype, out_dtype;
  Ptr stream;
};
void linear(const LinearArgs& a);
