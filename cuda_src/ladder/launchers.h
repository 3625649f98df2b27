// The ladders: the rungs below the product's kernels, one entry point per op. `rung` is a number of lab/ladder.py; the
// other arguments are the op's own (../launchers.h). What a rung cannot do, lab/ladder.py refuses before it comes here.
#pragma once
#include "../launchers.h"

void linear_ladder(int rung, Ptr x, Ptr w, Ptr bias, Ptr y, int rows, int n, int k, int dtype, int out_dtype,
                   Ptr stream);

void rmsnorm_ladder(int rung, Ptr x, Ptr w, Ptr residual, Ptr y, int rows, int groups, int cols, int64_t x_stride,
                    int64_t y_stride, float eps, int dtype, Ptr stream);

void decode_attention_ladder(int rung, Ptr q, Ptr k_cache, Ptr v_cache, Ptr block_table, Ptr context_lens, Ptr out,
                             Ptr partial, Ptr tickets, int batch, int q_heads, int kv_heads, int head_dim,
                             int page_size, int max_pages, int splits, int64_t q_stride, float scale, int dtype,
                             Ptr stream);
