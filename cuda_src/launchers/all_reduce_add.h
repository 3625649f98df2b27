#pragma once
#include "arguments.h"

// residual += the sum over all ranks of partial: `words` pieces of 32 bits, an even number.
// two_shot: each word is added by one rank, which sends the result to all others.
struct AllReduceAddArgs {
  Ptr partial, residual;
  PeerWords peers;
  int words, two_shot, dtype;
  Ptr stream;
};
void all_reduce_add(const AllReduceAddArgs& a);
