#pragma once
#include "arguments.h"

// y[b, g, :] = T(x[b, g, :] * rsqrt(mean(x[b, g, :]^2) + eps)) * w. With residual [rows, cols]: residual += x
// first, and the sum is what is normalised.
struct RmsnormArgs {
  Ptr x, w, residual, y;
  int rows, groups, cols;
  int64_t x_stride, y_stride;
  float eps;
  int dtype;
  Ptr stream;
};
void rmsnorm(const RmsnormArgs& a);
