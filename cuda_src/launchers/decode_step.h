#pragma once
#include "arguments.h"

// The tensors of a model. layers: int64 [layers, 10], the addresses of each layer's tensors.
struct StepWeights { Ptr embed, layers, final_norm, lm_head, cos_sin; };

// The cache of every layer: k, v [layers, pages, kv_heads, page_size, head_dim]; block_table int32 [1,
// max_pages].
struct StepCache {
  Ptr k, v, block_table;
  int pages, kv_heads, page_size;
};

// Memory through which the blocks exchange results (StepWorkspace of the contract): words int64, counters
// uint32; zero before the first launch.
struct StepExchange { Ptr words, counters; };

struct StepSizes { int layers, vocab, hidden, intermediate; };

// A whole decode step of one sequence in one launch. Needs sm_90.
struct DecodeStepArgs {
  Ptr ids, positions;
  StepWeights weights;
  StepCache cache;
  Ptr logits, out;
  StepExchange exchange;
  StepSizes sizes;
  int q_heads, head_dim;
  float eps, scale;
  int dtype;
  Ptr stream;
};
void decode_step(const DecodeStepArgs& a);
