// The types of a launcher's arguments.
//
// Plain C++ types only. A launcher takes one struct of arguments, which Python fills by name (named_args.h).
// lab/ops/<op>.py has validated them: tensors are row-major, dtypes agree, base addresses are 16-byte
// aligned. `dtype` is a DType code; `stream` is a cudaStream_t (ignored by the host build). Strides count
// elements. A launch that fails throws std::runtime_error with the kernel's name.
#pragma once
#include <cstdint>

using Ptr = std::uintptr_t;  // an address; 0 for an optional argument that is absent
enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

// Formats of packed weights: `number` in lab/formats. plain: a tensor of the activations' dtype.
enum class Format : int {
  plain = 0,
  int8 = 1,
  int8_g32 = 2,
  int4_g32 = 3,
  int4_g32_min = 4,
  int4_g128 = 5,
  int4_g128_zero = 6,
  fp8 = 7,
  mxfp4 = 8,
  fp8_g128 = 9,
  q4_k = 10,
  q6_k = 11,
};

// Formats of a KV cache: NUMBERS in lab/formats/kv.py. plain: a tensor of the heads' dtype.
enum class KvFormat : int { plain = 0, fp8 = 1, int8 = 2 };

// Groups of values that belong together. Python passes a group as a tuple, in the order of its fields.

// The weights of a product [n, k]: a tensor, or codes and scales in the layout of lab/formats/format.py.
struct Weights {
  Ptr data, scales;
  int format;  // a Format
};

// The queries, keys or values of a batch, [batch, heads, head_dim]: a sequence's heads are contiguous, and
// the next sequence's begin `stride` elements further on.
struct HeadRows {
  Ptr data;
  int64_t stride;
};

// Keys and values in pages: k, v [pages, kv_heads, page_size, head_dim]; block_table int32 [batch, max_pages]
// names the pages of each sequence. Where the cache is quantised (format: a KvFormat), k and v are codes;
// k_scales and v_scales are described in lab/formats/kv.py.
struct CachePages {
  Ptr k, v, block_table;
  int kv_heads, page_size, max_pages;
  Ptr k_scales, v_scales;
  int format;
};

// `count` blocks share the context of a sequence. partial: float32 [batch, kv_heads, count, group, head_dim +
// 2], the result of each of them; tickets: uint32 [batch, kv_heads], zero on entry and on exit.
struct ContextSplits {
  Ptr partial, tickets;
  int count;
};

// The inboxes of all ranks and one rank's place among them (lab/ops/exchange.py). inboxes: their addresses,
// uint64 [ranks]; launches: uint32, one for each block; capacity: words of a slot.
struct PeerWords {
  Ptr inboxes, launches;
  int capacity, rank, ranks;
};

// The weights of RMSNorm over each head of q and k, [head_dim]; both 0 where the model has no such norm.
struct HeadNorms {
  Ptr q, k;
  float eps;
};
