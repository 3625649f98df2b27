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

// Groups of values that belong together. Python passes a group as a tuple, in the order of its fields.

// The queries, keys or values of a batch, [batch, heads, head_dim]: a sequence's heads are contiguous, and
// the next sequence's begin `stride` elements further on.
struct HeadRows {
  Ptr data;
  int64_t stride;
};

// Keys and values in pages: k, v [pages, kv_heads, page_size, head_dim]; block_table int32 [batch, max_pages]
// names the pages of each sequence.
struct CachePages {
  Ptr k, v, block_table;
  int kv_heads, page_size, max_pages;
};

// `count` blocks share the context of a sequence. partial: float32 [batch, kv_heads, count, group, head_dim +
// 2], the result of each of them; tickets: uint32 [batch, kv_heads], zero on entry and on exit.
struct ContextSplits {
  Ptr partial, tickets;
  int count;
};

// The weights of RMSNorm over each head of q and k, [head_dim]; both 0 where the model has no such norm.
struct HeadNorms {
  Ptr q, k;
  float eps;
};
