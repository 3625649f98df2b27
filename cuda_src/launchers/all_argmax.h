#pragma once
#include "arguments.h"

// ids[r] = the index in the whole vocabulary of the largest logit that any rank has; see lab/ops/all_argmax.py.
struct AllArgmaxArgs {
  Ptr logits, ids;
  int rows, n, first;
  PeerWords peers;
  Ptr stream;
};
void all_argmax(const AllArgmaxArgs& a);
