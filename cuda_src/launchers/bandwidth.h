#pragma once
#include "arguments.h"

// For measurement, not an op: reads (mode 0), copies (1) or writes (2) `bytes` bytes (a multiple of 16),
// `passes` times.
struct BandwidthArgs {
  Ptr src, dst;
  int64_t bytes;
  int mode, passes, blocks, threads;
  Ptr stream;
};
void bandwidth(const BandwidthArgs& a);
