// decode_attention: out[b, h, :] = sum over tokens t of softmax_t(scale * q[b, h, :] . k[t, :]) * v[t, :]
//
//   q [batch, q_heads, D], any stride between sequences   out [batch, q_heads, D]
//   context_lens [batch] int32
//   k_cache, v_cache [pages, kv_heads, page_size, D]   block_table [batch, max_pages] int32
//   partial [batch, kv_heads, splits, group, D + 2] float32: the splits' results   tickets [batch, kv_heads]
//   mapping   grid (splits, kv_heads, batch); the warps of a block share the tokens of its split
//             (core/split_attention.cuh)
//   traffic   K and V once for all query heads of their group; q, partial and out are small
//   contract  lab/ops/decode_attention.py          twin  triton_kernels/decode_attention.py
#include "common.cuh"
#include "core/attention.cuh"
#include "launchers/decode_attention.h"

using namespace lab;

#ifdef LAB_LSE  // `lab export` compiles it so: the log-sum-exp is a second output
#define LAB_AND_LSE(lse) , lse
#else
#define LAB_AND_LSE(lse)
#endif

template <typename A, typename T = typename A::T>
__global__ void __launch_bounds__(A::kMaxThreads, 1)
    decode_attention_kernel(const T* q, typename A::Cache cache, const int* context_lens, T* out,
                            float* partial, unsigned* tickets, int splits, int group, int64_t q_stride,
                            float scale_log2, int least LAB_AND_LSE(float* lse)) {
  // 1. Locate: split s owns the tokens [begin, end) of one sequence. The length is read here, on the device,
  // so that a captured graph serves every length. The copies of the first tiles are issued at once.
  constexpr int D = A::D, N = Vec<T>::size;
  pdl_wait();
  const int length = context_lens[blockIdx.z];
  A attention(cache, splits, group, length, length, least);
  if (attention.unused()) return;
#ifdef LAB_LSE
  attention.lse = lse;
#endif
  attention.start();

  // 2. Load the query: into shared memory, for all warps; heads beyond the group are zero.
  auto& inputs = attention.shared.inputs;
  const T* heads = q + attention.b * q_stride + attention.kv_head * group * D;
  for (int i = threadIdx.x * N; i < attention.query_rows() * D; i += blockDim.x * N) {
    store(&inputs.q[0][0] + i, i < group * D ? load(heads + i) : Vec<T>{});
  }
  __syncthreads();
  attention.load_query(scale_log2);

  // 3. Load the tiles: cp.async copies them into a ring of tiles in shared memory.
  for (int t = 0; t < attention.count; ++t) {
    attention.wait_for(t);

    // 4. Online softmax: in registers; each part of the block handles its own tokens.
    attention.attend(t);
  }

  // 5. Publish the split: the block's parts are merged; if there is only one split, the result is final.
  attention.publish(out, partial);

  // 6. Merge in the last block: in the order of the splits. The blocks of a cluster share this work instead.
  attention.merge(out, partial, tickets);
}

// With heads in T.
template <typename T>
void attention_of(const DecodeAttentionArgs& a) {
  const int group = a.q_heads / a.cache.kv_heads;
  const Settings tuned = settings::find("decode_attention", sizeof(T), a.batch,
                                        {a.q_heads, a.cache.kv_heads, a.head_dim, a.cache.page_size});
  by_attention_core<T>("decode_attention", a.cache, a.head_dim, group, [&](auto core) {
    using A = typename decltype(core)::type;
    const unsigned cluster = attention_cluster(a.splits.count, a.cache.kv_heads, a.batch);
    launch({dim3(round_up(a.splits.count, cluster), a.cache.kv_heads, a.batch), dim3(A::threads(group)),
            attention_smem_bytes<A>(group, a.splits.count), a.stream, true, cluster},
           "decode_attention_kernel", decode_attention_kernel<A>, as<const T>(a.q.data),
           kv_cache<typename A::C>(a.cache), as<const int>(a.context_lens), as<T>(a.out),
           as<float>(a.splits.partial), as<unsigned>(a.splits.tickets), a.splits.count, group, a.q.stride,
           a.scale * 1.4426950408889634f, tuned.least LAB_AND_LSE(as<float>(a.lse)));
  });
}

// The parts that nvcc compiles one by one: setup.py finds them here, and LAB_PART is one of them.
#ifdef LAB_PART
extern template void attention_of<float>(const DecodeAttentionArgs&);
extern template void attention_of<half>(const DecodeAttentionArgs&);
extern template void attention_of<bf16>(const DecodeAttentionArgs&);
template void attention_of<LAB_PART>(const DecodeAttentionArgs&);
#endif

// weak: every part has this function, and the linker takes one of them.
__attribute__((weak)) void decode_attention(const DecodeAttentionArgs& a) {
  if (a.batch == 0) return;
  by_dtype(a.dtype, [&](auto tag) { attention_of<decltype(tag)>(a); });
}
