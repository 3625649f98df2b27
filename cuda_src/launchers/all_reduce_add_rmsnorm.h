#pragma once
#include "arguments.h"

// residual += the sum over all ranks of partial, then y = rmsnorm(residual) * w. Rows of `cols` elements, each
// `words` pieces of 32 bits, an even number.
struct AllReduceAddRmsnormArgs {
  Ptr partial, residual, w, y;
  PeerWords peers;
  int rows, words, cols;
  float eps;
  int dtype;
  Ptr stream;
};
void all_reduce_add_rmsnorm(const AllReduceAddRmsnormArgs& a);
