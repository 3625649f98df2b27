// The ladders: the rungs below the ops' own kernels, one entry point per ladder. `rung` is a number of
// lab/rungs/; the arguments are those of the op, if nothing else is said. Arguments that a rung cannot take are
// refused in lab/ladder.py.
#pragma once
#include "../launchers/decode_attention.h"
#include "../launchers/linear.h"
#include "../launchers/rmsnorm.h"

// Those of linear, of which rungs need no `tiled`. w: rungs 1 to 3 take the layout of lab/formats/row_major.py.
// expanded: for rung 1 memory for w, [n, k filled up to whole groups] of dtype; for others 0.
struct QuantisedLinearArgs {
  Ptr x, tiled;
  Weights w;
  Ptr expanded, bias, y;
  int rows, n, k, dtype, out_dtype;
  Ptr stream;
};

void linear_ladder(int rung, const LinearArgs& a);
void quantised_linear_ladder(int rung, const QuantisedLinearArgs& a);
void rmsnorm_ladder(int rung, const RmsnormArgs& a);
void decode_attention_ladder(int rung, const DecodeAttentionArgs& a);
