#pragma once
#include "arguments.h"

// Rotates the pairs (i, i + head_dim/2) of every head of q and k, in place.
struct RopeArgs {
  HeadRows q, k;
  Ptr positions, cos_sin;
  int batch, q_heads, kv_heads, head_dim, dtype;
  Ptr stream;
};
void rope(const RopeArgs& a);
