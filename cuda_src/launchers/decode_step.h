#pragma once
#include "arguments.h"

// The tensors of a model. layers: int64 [layers, columns], the addresses of each layer's tensors; if any matrix is
// packed, also the scales and formats of the four matrices; if the scales of any belong to several segments, or q, k
// and v of a layer are apart, also where k and v are.
constexpr int kPlainColumns = 10, kPackedColumns = 15;
struct StepWeights {
  Weights embed;
  Ptr layers, final_norm;
  Weights lm_head;
  Ptr cos_sin;
  int columns;
};

// The cache of every layer: k, v [layers, pages, kv_heads, page_size, head_dim]; block_table int32 [1,
// max_pages]. Where it is quantised (format: a KvFormat), k and v are codes; k_scales and v_scales are those of
// lab/formats/kv.py for all layers.
struct StepCache {
  Ptr k, v, block_table;
  int pages, kv_heads, page_size;
  Ptr k_scales, v_scales;
  int format;
};

// Memory through which the blocks exchange results (StepWorkspace of the contract): words int64, counters
// uint32; zero before the first launch. trace: null, or where a kernel that can record its times does so
// (core/step_trace.cuh).
struct StepExchange { Ptr words, counters, trace; };

// layer_bytes: of the four matrices of a layer. vocab, head_rows: rows of the embedding and of lm_head, of which
// a rank has a share.
struct StepSizes {
  int layers, vocab, head_rows, hidden, intermediate;
  int64_t layer_bytes;
};

// A whole decode step of one sequence in one launch. Needs sm_90. peers: ranks is 1 where the model is not
// divided; otherwise the ranks add up what o and down give.
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
  PeerWords peers;
};
void decode_step(const DecodeStepArgs& a);
