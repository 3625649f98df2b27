#pragma once
#include "arguments.h"

// out[r, :] = table[ids[r], :]; an id outside [0, vocab) gives a row of NaN.
struct EmbeddingArgs {
  Ptr ids;
  Weights table;
  Ptr out;
  int rows, cols, vocab, dtype;
  Ptr stream;
};
void embedding(const EmbeddingArgs& a);
