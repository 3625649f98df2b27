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

// For measurement, too: a word goes back and forth between ranks 0 and 1, `rounds` times. Both launch it.
struct LinkLatencyArgs {
  PeerWords peers;
  int rounds;
  Ptr stream;
};
void link_latency(const LinkLatencyArgs& a);
