#pragma once
#include "arguments.h"

// out[b, h, :] = softmax(scale * q[b, h, :] . K^T) V over the paged cache.
struct DecodeAttentionArgs {
  HeadRows q;
  CachePages cache;
  Ptr context_lens, out;
  ContextSplits splits;
  int batch, q_heads, head_dim;
  float scale;
  int dtype;
  Ptr stream;
#ifdef LAB_LSE
  Ptr lse;  // float32 [batch, q_heads]: log2 of the sum of exponentials
#endif
};
void decode_attention(const DecodeAttentionArgs& a);
