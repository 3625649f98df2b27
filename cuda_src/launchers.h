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

// The fused ops: what a step of the fused plan launches. Above 2 rows in half precision some launch several kernels, and
// those with a norm need room for its rows: normed [rows, k] in x's dtype, else 0.

// y[b, n] = sum over k of xn[b, k] * w[n, k] (+ bias[n]), xn = rmsnorm(x, norm_w).
void norm_linear(Ptr x, Ptr norm_w, Ptr w, Ptr bias, Ptr y, Ptr normed, int rows, int n, int k, float eps, int dtype,
                 int out_dtype, Ptr stream);

// y[b, j] = silu(xn[b] . w[j]) * (xn[b] . w[n + j]), w [2 n, k].
void norm_linear_silu_mul(Ptr x, Ptr norm_w, Ptr w, Ptr y, Ptr normed, int rows, int n, int k, float eps, int dtype,
                          Ptr stream);

// residual[b, n] += sum over k of x[b, k] * w[n, k] (+ bias[n]).
void linear_add(Ptr x, Ptr w, Ptr bias, Ptr residual, int rows, int n, int k, int dtype, Ptr stream);

// Norm (0: none) and rope of q and the new k, k and v into the cache, then decode_attention over position + 1 tokens.
void rope_append_attention(Ptr q, Ptr k, Ptr v, Ptr q_norm, Ptr k_norm, float eps, Ptr positions, Ptr cos_sin,
                           Ptr k_cache, Ptr v_cache, Ptr block_table, Ptr out, Ptr partial, Ptr tickets, int batch,
                           int q_heads, int kv_heads, int head_dim, int page_size, int max_pages, int splits,
                           int64_t q_stride, int64_t k_stride, int64_t v_stride, float scale, int dtype, Ptr stream);

// out[b] = argmax over n of logits[b, n] = xn[b] . w[n]; scratch int32 [rows, 8196], zero on entry, left ready.
void norm_linear_argmax(Ptr x, Ptr norm_w, Ptr w, Ptr logits, Ptr scratch, Ptr normed, Ptr out, int rows, int n, int k,
                        float eps, int dtype, Ptr stream);

// A whole decode step of one sequence in one launch. table: int64 [layers, 10], addresses of each layer's tensors; words:
// int64, room for what passes between blocks (StepWorkspace of the contract); counters: uint32. Both zero at first. Needs sm_90.
void decode_step(Ptr ids, Ptr positions, Ptr embed, Ptr table, Ptr final_norm, Ptr lm_head, Ptr cos_sin, Ptr k_cache,
                 Ptr v_cache, Ptr block_table, Ptr logits, Ptr out, Ptr words, Ptr counters, int layers, int vocab,
                 int hidden, int intermediate, int q_heads, int kv_heads, int head_dim, int pages, int page_size,
                 float eps, float scale, int dtype, Ptr stream);

// Measurement, not an op: reads (mode 0), copies (1) or writes (2) `bytes` (a multiple of 16), `passes` times over.
void stream(Ptr src, Ptr dst, int64_t bytes, int mode, int passes, int blocks, int threads, Ptr stream);
