#pragma once
#include "arguments.h"

// out[r] = the next token of row r of logits [rows, vocab]: greedy at temperature 0, else drawn from the
// tokens that top-k, top-p and min-p keep.
struct SampleArgs {
  Ptr logits, positions, out;
  Ptr table;  // int [rows, 6], the parameters of each row (lab/ops/sample.py); 0: those below, for all rows
  int rows, vocab;
  float temperature;
  int top_k;
  float top_p, min_p;
  uint64_t seed;
  Ptr stream;
};
void sample(const SampleArgs& a);
