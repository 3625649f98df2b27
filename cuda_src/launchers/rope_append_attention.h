#pragma once
#include "arguments.h"

// Norm and rope of q and of the new k; k and v appended to the cache; then decode_attention over position + 1
// tokens.
struct RopeAppendAttentionArgs {
  HeadRows q, k, v;
  HeadNorms norms;
  Ptr positions, cos_sin;
  CachePages cache;
  Ptr out;
  ContextSplits splits;
  int batch, q_heads, head_dim;
  float scale;
  int dtype;
  Ptr stream;
};
void rope_append_attention(const RopeAppendAttentionArgs& a);
