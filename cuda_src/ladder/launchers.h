// The ladders: the rungs below the product's kernels, one entry point per op. `rung` is a number of
// lab/rungs.py; the arguments are the op's own (../launchers.h). What a rung cannot do, lab/ladder.py refuses
// before it comes here.
#pragma once
#include "../launchers.h"

void linear_ladder(int rung, const LinearArgs& a);
void rmsnorm_ladder(int rung, const RmsnormArgs& a);
void decode_attention_ladder(int rung, const DecodeAttentionArgs& a);
