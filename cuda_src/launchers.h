// Every host entry point of the CUDA kernels, one declaration per op.
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

// out[r, :] = table[ids[r], :]; an id outside [0, vocab) gives a row of NaN.
struct EmbeddingArgs {
  Ptr ids, table, out;
  int rows, cols, vocab, dtype;
  Ptr stream;
};
void embedding(const EmbeddingArgs& a);

// y[b, g, :] = T(x[b, g, :] * rsqrt(mean(x[b, g, :]^2) + eps)) * w. With residual [rows, cols]: residual += x
// first, and the sum is what is normalised.
struct RmsnormArgs {
  Ptr x, w, residual, y;
  int rows, groups, cols;
  int64_t x_stride, y_stride;
  float eps;
  int dtype;
  Ptr stream;
};
void rmsnorm(const RmsnormArgs& a);

// y[b, n] = sum over k of x[b, k] * w[n, k] (+ bias[n]), b < rows <= 64.
struct LinearArgs {
  Ptr x, w, bias, y;
  int rows, n, k, dtype, out_dtype;
  Ptr stream;
};
void linear(const LinearArgs& a);

// Rotates the pairs (i, i + head_dim/2) of every head of q and k, in place.
struct RopeArgs {
  HeadRows q, k;
  Ptr positions, cos_sin;
  int batch, q_heads, kv_heads, head_dim, dtype;
  Ptr stream;
};
void rope(const RopeArgs& a);

// Copies the k and v of one new token of every sequence into that sequence's page of the cache.
struct KvAppendArgs {
  HeadRows k, v;
  CachePages cache;
  Ptr positions;
  int batch, head_dim, dtype;
  Ptr stream;
};
void kv_append(const KvAppendArgs& a);

// out[b, h, :] = softmax(scale * q[b, h, :] . K^T) V over the paged cache.
struct DecodeAttentionArgs {
  HeadRows q;
  CachePages cache;
  Ptr context_lens, out;
  ContextSplits splits;
  int batch, q_heads, head_dim;
  float scale;
  int dtype;
  Ptr stream;
};
void decode_attention(const DecodeAttentionArgs& a);

// y[r, c] = silu(gate_up[r, c]) * gate_up[r, cols + c].
struct SiluMulArgs {
  Ptr gate_up, y;
  int rows, cols, dtype;
  Ptr stream;
};
void silu_mul(const SiluMulArgs& a);

// out[r] = the next token of row r of logits [rows, vocab]: greedy at temperature 0, else drawn from the
// top-k, top-p set.
struct SampleArgs {
  Ptr logits, positions, out;
  int rows, vocab;
  float temperature;
  int top_k;
  float top_p;
  uint64_t seed;
  Ptr stream;
};
void sample(const SampleArgs& a);

// The fused ops, which a step of the fused plan launches. Above 2 rows in half precision some of them launch
// several kernels; those with a norm then need memory for the normalised rows: normed [rows, k] in x's dtype,
// otherwise 0.

// y[b, n] = sum over k of xn[b, k] * w[n, k] (+ bias[n]), xn = rmsnorm(x, norm_w).
struct NormLinearArgs {
  Ptr x, norm_w, w, bias, y, normed;
  int rows, n, k;
  float eps;
  int dtype, out_dtype;
  Ptr stream;
};
void norm_linear(const NormLinearArgs& a);

// y[b, j] = silu(xn[b] . w[j]) * (xn[b] . w[n + j]), w [2 n, k].
struct NormLinearSiluMulArgs {
  Ptr x, norm_w, w, y, normed;
  int rows, n, k;
  float eps;
  int dtype;
  Ptr stream;
};
void norm_linear_silu_mul(const NormLinearSiluMulArgs& a);

// residual[b, n] += sum over k of x[b, k] * w[n, k] (+ bias[n]).
struct LinearAddArgs {
  Ptr x, w, bias, residual;
  int rows, n, k, dtype;
  Ptr stream;
};
void linear_add(const LinearAddArgs& a);

// Norm and rope of q and of the new k; k and v appended to the cache; then decode_attention over position + 1
// tokens.
struct RopeAppendAttentionArgs {
  HeadRows q, k, v;
  HeadNorms norms;
  Ptr positions, cos_sin;
  CachePages cache;
  Ptr out;
  ContextSplits splits;
  int batch, q_heads, head_dim;
  float scale;
  int dtype;
  Ptr stream;
};
void rope_append_attention(const RopeAppendAttentionArgs& a);

// out[b] = argmax over n of logits[b, n] = xn[b] . w[n]; scratch int32 [rows, 8196], zero on entry and on
// exit.
struct NormLinearArgmaxArgs {
  Ptr x, norm_w, w, logits, scratch, normed, out;
  int rows, n, k;
  float eps;
  int dtype;
  Ptr stream;
};
void norm_linear_argmax(const NormLinearArgmaxArgs& a);

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

// For measurement, not an op: reads (mode 0), copies (1) or writes (2) `bytes` bytes (a multiple of 16),
// `passes` times.
struct BandwidthArgs {
  Ptr src, dst;
  int64_t bytes;
  int mode, passes, blocks, threads;
  Ptr stream;
};
void bandwidth(const BandwidthArgs& a);
