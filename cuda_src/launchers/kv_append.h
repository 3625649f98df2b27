#pragma once
#include "arguments.h"

// Copies the k and v of one new token of every sequence into that sequence's page of the cache.
struct KvAppendArgs {
  HeadRows k, v;
  CachePages cache;
  Ptr positions;
  int batch, head_dim, dtype;
  Ptr stream;
};
void kv_append(const KvAppendArgs& a);
