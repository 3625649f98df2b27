#pragma once
#include "arguments.h"

// out[b] = argmax over n of logits[b, n] = xn[b] . w[n]; scratch int32 [rows, 8196], zero on entry and on
// exit.
// normed, tiled: see norm_linear.h.
struct NormLinearArgmaxArgs {
  Ptr x, norm_w;
  Weights w;
  Ptr logits, scratch, normed, tiled, out;
  int rows, n, k;
  float eps;
  int dtype;
  Ptr stream;
};
void norm_linear_argmax(const NormLinearArgmaxArgs& a);
