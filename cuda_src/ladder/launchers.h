// The ladders: the rungs below the ops' own kernels, one entry point per op. `rung` is a number of
// lab/rungs/; the arguments are those of the op. Arguments that a rung cannot take are
// refused in lab/ladder.py.
#pragma once
#include "../launchers/decode_attention.h"
#include "../launchers/linear.h"
#include "../launchers/rmsnorm.h"

void linear_ladder(int rung, const LinearArgs& a);
void rmsnorm_ladder(int rung, const RmsnormArgs& a);
void decode_attention_ladder(int rung, const DecodeAttentionArgs& a);
