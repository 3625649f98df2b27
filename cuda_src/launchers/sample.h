#pragma once
#include "arguments.h"

// out[r] = the next token of row r of logits [rows, vocab]: greedy at temperature 0, else drawn from the
// top-k, top-p set.
struct SampleArgs {
  Ptr logits, positions, out;
  int rows, vocab;
  float temperature;
  int top_k;
  float top_p;
  uint64_t seed;
  Ptr stream;
};
void sample(const SampleArgs& a);
