#pragma once
#include "arguments.h"

// residual += the sum over all ranks of partial: `words` pieces of 32 bits, an even number.
struct AllReduceAddArgs {
  Ptr partial, residual;
  PeerWords peers;
  int words, dtype;
  Ptr stream;
};
void all_reduce_add(const AllReduceAddArgs& a);
