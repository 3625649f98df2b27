// rope_append_attention: q = rope(norm(q)), k = rope(norm(k)); k and v appended to the cache at positions;
// out[b, h, :] = sum over tokens t <= positions[b] of softmax_t(scale * q[b, h, :] . k[t, :]) * v[t, :]
//
//   q [batch, q_heads, D], k, v [batch, kv_heads, D], any stride between sequences
//   q_norm, k_norm [D] (optional)
//   positions [batch] int32   cos_sin [max_positions, D] float32   out [batch, q_heads, D]
//   caches, block_table, partial and tickets as in decode_attention
//   mapping   as decode_attention; the block whose split holds the new token writes it and attends to it
//   traffic   K and V once for all query heads of their group; the rest is small
//   contract  lab/ops/rope_append_attention.py          twin  triton_kernels/rope_append_attention.py
#include "common.cuh"
#include "core/attention.cuh"
#include "core/rotation.cuh"
#include "launchers/rope_append_attention.h"

using namespace lab;

template <typename A, typename T = typename A::T>
__global__ void __launch_bounds__(A::kMaxThreads, 1)
    rope_append_attention_kernel(const T* q, const T* k, const T* v, const T* q_norm, const T* k_norm,
                                 float eps, const int* positions, const float* cos_sin,
                                 typename A::Cache cache, T* out, float* partial, unsigned* tickets,
                                 int splits, int group, int64_t q_stride, int64_t k_stride, int64_t v_stride,
                                 float scale_log2, int least) {
  // 1. Locate: as decode_attention. What was written before the preceding kernel began may be read before the
  // wait for it, because that kernel has itself waited: this holds for the position, the table and the cache.
  // So the copies of the first tiles are issued here.
  constexpr int D = A::D;
  const int position = positions[blockIdx.z];  // negative: an idle row, with no tokens
  A attention(cache, splits, group, position + 1, position, least);
  if (attention.unused()) return;
  attention.start();
  auto& inputs = attention.shared.inputs;
  const int b = attention.b, kv_head = attention.kv_head;
  const int new_page = attention.owns(position) ? attention.page_of(position) : 0;
  const Rotation<T, D> rotation(cos_sin + size_t(max(position, 0)) * D);
  pdl_wait();

  // 2. Norm and rotate the query: L lanes take a head and write it to shared memory, for all warps; heads
  // beyond the group are zero.
  constexpr int L = Rotation<T, D>::L, N = Rotation<T, D>::N;
  const T* heads = q + b * q_stride + kv_head * group * D;
  for (int first = 0; first < attention.query_rows(); first += blockDim.x / L) {
    const int head = first + threadIdx.x / L;
    const Vec<T> turned = rotation.turn(heads + head * D, rotation.live && head < group, q_norm, eps);
    if (rotation.live && head < attention.query_rows()) store(&inputs.q[head][rotation.c * N], turned);
  }

  // 3. Append the new token: in the block that owns it, the last warp writes it to the cache, and to shared
  // memory for its tile.
  if (attention.owns(position) && threadIdx.x >= blockDim.x - 32) {
    const bool valid = rotation.live && threadIdx.x >= blockDim.x - L;
    const int i = rotation.c * N;  // its first element
    const Vec<T> value = valid ? load(v + b * v_stride + kv_head * D + i) : Vec<T>{};
    const Vec<T> key = rotation.turn(k + b * k_stride + kv_head * D, valid, k_norm, eps);
    attention.template append<L>(inputs, key, value, i, valid, new_page, position);
  }
  __syncthreads();
  attention.load_query(scale_log2);

  // 4. Load the tiles: cp.async copies them into a ring of tiles in shared memory; the new token is added
  // from there.
  for (int t = 0; t < attention.count; ++t) {
    attention.wait_for(t);

    // 5. Online softmax: in registers; each part of the block handles its own tokens.
    attention.attend(t);
  }

  // 6. Publish the split: the block's parts are merged; if there is only one split, the result is final.
  attention.publish(out, partial);

  // 7. Merge in the last block: in the order of the splits. The blocks of a cluster share this work instead.
  attention.merge(out, partial, tickets);
}

// With heads in T.
template <typename T>
void attention_of(const RopeAppendAttentionArgs& a) {
  const int group = a.q_heads / a.cache.kv_heads;
  const Settings tuned = settings::find("rope_append_attention", sizeof(T), a.batch,
                                        {a.q_heads, a.cache.kv_heads, a.head_dim, a.cache.page_size});
  by_attention_core<T>("rope_append_attention", a.cache, a.head_dim, group, [&](auto core) {
    using A = typename decltype(core)::type;
    const unsigned cluster = attention_cluster(a.splits.count, a.cache.kv_heads, a.batch);
    launch({dim3(round_up(a.splits.count, cluster), a.cache.kv_heads, a.batch), dim3(A::threads(group)),
            attention_smem_bytes<A>(group, a.splits.count), a.stream, true, cluster},
           "rope_append_attention_kernel", rope_append_attention_kernel<A>, as<const T>(a.q.data),
           as<const T>(a.k.data), as<const T>(a.v.data), as<const T>(a.norms.q), as<const T>(a.norms.k),
           a.norms.eps, as<const int>(a.positions), as<const float>(a.cos_sin),
           kv_cache<typename A::C>(a.cache), as<T>(a.out), as<float>(a.splits.partial),
           as<unsigned>(a.splits.tickets), a.splits.count, group, a.q.stride, a.k.stride, a.v.stride,
           a.scale * 1.4426950408889634f, tuned.least);
  });
}

// The parts that nvcc compiles one by one: setup.py finds them here, and LAB_PART is one of them.
#ifdef LAB_PART
extern template void attention_of<float>(const RopeAppendAttentionArgs&);
extern template void attention_of<half>(const RopeAppendAttentionArgs&);
extern template void attention_of<bf16>(const RopeAppendAttentionArgs&);
template void attention_of<LAB_PART>(const RopeAppendAttentionArgs&);
#endif

// weak: every part has this function, and the linker takes one of them.
__attribute__((weak)) void rope_append_attention(const RopeAppendAttentionArgs& a) {
  if (a.batch == 0) return;
  by_dtype(a.dtype, [&](auto tag) { attention_of<decltype(tag)>(a); });
}
