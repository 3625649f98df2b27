// Every host entry point of the CUDA side, one declaration per op: the table of contents.
//
// Plain C++ types only. Arguments arrive validated by lab/ops/<op>.py: tensors are row-major, dtypes agree, base addresses
// are 16-byte aligned. `dtype` is a DType code; `stream` is a cudaStream_t (ignored by the host build). Strides count
// elements. A launch that fails throws std::runtime_error, which names the kernel.
#pragma once
#include <cstdint>

using Ptr = std::uintptr_t;                       // an address, as Python passes it; 0 where an argument is optional
enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

// out[r, :] = table[ids[r], :]; an id outside [0, vocab) gives a row of NaN.
void embedding(Ptr ids, Ptr table, Ptr out, int rows, int cols, int vocab, int dtype, Ptr stream);

// y[b, g, :] = T(x[b, g, :] * rsqrt(mean(x[b, g, :]^2) + eps)) * w. With residual [rows, cols]: residual += x first, and
// the sum is what is normalised.
void rmsnorm(Ptr x, Ptr w, Ptr residual, Ptr y, int rows, int groups, int cols, int64_t x_stride, int64_t y_stride,
             float eps, int dtype, Ptr stream);

// y[b, n] = sum over k of x[b, k] * w[n, k] (+ bias[n]), b < rows <= 64.
void linear(Ptr x, Ptr w, Ptr bias, Ptr y, int rows, int n, int k, int dtype, int out_dtype, Ptr stream);

// Rotates the pairs (i, i + head_dim/2) of every head of q and k, in place.
void rope(Ptr q, Ptr k, Ptr positions, Ptr cos_sin, int batch, int q_heads, int kv_heads, int head_dim, int64_t q_stride,
          int64_t k_stride, int dtype, Ptr stream);

// Copies one new token's k and v of every sequence into its page of the cache.
void kv_append(Ptr k, Ptr v, Ptr k_cache, Ptr v_cache, Ptr block_table, Ptr positions, int batch, int kv_heads,
               int head_dim, int page_size, int max_pages, int64_t k_stride, int64_t v_stride, int dtype, Ptr stream);

// out[b, h, :] = softmax(scale * q[b, h, :] . K^T) V over the paged cache. partial: float32 [batch, kv_heads, splits,
// group, head_dim + 2]; tickets: uint32 [batch, kv_heads], zero on entry and on exit.
void decode_attention(Ptr q, Ptr k_cache, Ptr v_cache, Ptr block_table, Ptr context_lens, Ptr out, Ptr partial,
                      Ptr tickets, int batch, int q_heads, int kv_heads, int head_dim, int page_size, int max_pages,
                      int splits, int64_t q_stride, float scale, int dtype, Ptr stream);

// y[r, c] = silu(gate_up[r, c]) * gate_up[r, cols + c].
void silu_mul(Ptr gate_up, Ptr y, int rows, int cols, int dtype, Ptr stream);

// out[r] = the next token of row r of logits [rows, vocab]: greedy at temperature 0, else drawn from the top-k, top-p set.
void sample(Ptr logits, Ptr positions, Ptr out, int rows, int vocab, float temperature, int top_k, float top_p,
            uint64_t seed, Ptr stream);

// Measurement, not an op: reads (mode 0), copies (1) or writes (2) `bytes` (a multiple of 16), `passes` times over.
void stream(Ptr src, Ptr dst, int64_t bytes, int mode, int passes, int blocks, int threads, Ptr stream);
