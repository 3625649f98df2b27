// The fields of the groups of launchers/arguments.h and launchers/decode_step.h, for what fills them one by one.
#pragma once
#include "launchers.h"

namespace lab::named {

// Calls f with references to the fields of a group, in their order. (std::tie would be one line shorter, but a
// tuple for each launcher costs the compiler more than all the rest of this file.)
template <typename F> bool with_fields(Weights& g, F f) { return f(g.data, g.scales, g.format); }
template <typename F> bool with_fields(HeadRows& g, F f) { return f(g.data, g.stride); }
template <typename F> bool with_fields(CachePages& g, F f) {
  return f(g.k, g.v, g.block_table, g.kv_heads, g.page_size, g.max_pages, g.k_scales, g.v_scales, g.format);
}
template <typename F> bool with_fields(ContextSplits& g, F f) { return f(g.partial, g.tickets, g.count); }
template <typename F> bool with_fields(PeerWords& g, F f) {
  return f(g.inboxes, g.launches, g.capacity, g.rank, g.ranks);
}
template <typename F> bool with_fields(HeadNorms& g, F f) { return f(g.q, g.k, g.eps); }
template <typename F> bool with_fields(StepWeights& g, F f) {
  return f(g.embed, g.layers, g.final_norm, g.lm_head, g.cos_sin, g.columns);
}
template <typename F> bool with_fields(StepCache& g, F f) {
  return f(g.k, g.v, g.block_table, g.pages, g.kv_heads, g.page_size, g.k_scales, g.v_scales, g.format);
}
template <typename F> bool with_fields(StepExchange& g, F f) { return f(g.words, g.counters, g.trace); }
template <typename F> bool with_fields(StepSizes& g, F f) {
  return f(g.layers, g.vocab, g.head_rows, g.hidden, g.intermediate, g.layer_bytes);
}

}  // namespace lab::named
