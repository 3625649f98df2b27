// The ladder of decode_attention: out[b, h, :] = softmax(scale * q[b, h, :] . K^T) V over the paged cache,
// from one thread per query head to a cp.async ring.
//
//   Each rung changes one thing of the rung before it. What it should gain, and why: lab/rungs/.
//   head_dim 64 or 128. All rungs keep a running softmax: with a new maximum the sums so far are scaled down.
//   twin  triton_kernels/ladder/decode_attention.py         the op's own kernel  cuda_src/decode_attention.cu
#include <cfloat>

#include "../common.cuh"
#include "../sizes.h"
#include "launchers.h"

using namespace lab;

namespace {

template <typename T>
struct Problem {
  const T *q, *k, *v;
  const int *table, *lengths;
  T* out;
  float* partial;  // [batch, kv_heads, splits, group, D + 2]: sums, maximum, weight
  int batch, q_heads, kv_heads, page_shift, max_pages;
  int64_t q_stride;
  float scale;

  LAB_DEVICE int group() const { return q_heads / kv_heads; }
  // Offset of token t of a KV head in the caches.
  LAB_DEVICE size_t token(int b, int kv_head, int t, int dim) const {
    const int page = table[size_t(b) * max_pages + (t >> page_shift)], slot = t & ((1 << page_shift) - 1);
    return (((size_t(page) * kv_heads + kv_head) << page_shift) + slot) * dim;
  }
};

// 1. Naive: one thread per query head goes through the whole context alone. That is 256 threads on the card,
// and each lane of a warp reads memory of another token or head.
template <typename T, int D>
__global__ void attention_naive_kernel(Problem<T> p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, b = i / p.q_heads, h = i % p.q_heads;
  if (b >= p.batch) return;
  const T* q = p.q + b * p.q_stride + h * D;
  float acc[D] = {}, maximum = -FLT_MAX, weight = 0.f;
  for (int t = 0; t < p.lengths[b]; ++t) {
    const size_t at = p.token(b, h / p.group(), t, D);
    float score = 0.f;
    for (int d = 0; d < D; ++d) score = fmadd(to_float(q[d]), to_float(p.k[at + d]), score);
    score *= p.scale;
    const float top = fmaxf(maximum, score), shrink = expf(maximum - top), e = expf(score - top);
    weight = weight * shrink + e;
    LAB_UNROLL
    for (int d = 0; d < D; ++d) acc[d] = acc[d] * shrink + e * to_float(p.v[at + d]);
    maximum = top;
  }
  LAB_UNROLL
  for (int d = 0; d < D; ++d) p.out[size_t(i) * D + d] = from_float<T>(weight == 0.f ? 0.f : acc[d] / weight);
}

// 2. Warp reduction: a warp per query head. Its lanes share the head dimension, so that a token is read by
// neighbouring lanes, and shuffles add the lanes' parts of the dot product.
template <typename T, int D>
__global__ void attention_warp_kernel(Problem<T> p) {
  constexpr int E = D / 32;  // elements of a head that a lane holds
  const int lane = threadIdx.x, h = blockIdx.x, b = blockIdx.y;
  float query[E], acc[E] = {}, maximum = -FLT_MAX, weight = 0.f;
  LAB_UNROLL
  for (int e = 0; e < E; ++e) query[e] = to_float(p.q[b * p.q_stride + h * D + lane + e * 32]) * p.scale;
  for (int t = 0; t < p.lengths[b]; ++t) {
    const size_t at = p.token(b, h / p.group(), t, D) + lane;
    float score = 0.f;
    LAB_UNROLL
    for (int e = 0; e < E; ++e) score = fmadd(query[e], to_float(p.k[at + e * 32]), score);
    score = group_sum<32>(score);
    const float top = fmaxf(maximum, score), shrink = expf(maximum - top), share = expf(score - top);
    weight = weight * shrink + share;
    LAB_UNROLL
    for (int e = 0; e < E; ++e) acc[e] = acc[e] * shrink + share * to_float(p.v[at + e * 32]);
    maximum = top;
  }
  LAB_UNROLL
  for (int e = 0; e < E; ++e) {
    p.out[(size_t(b) * p.q_heads + h) * D + lane + e * 32] =
        from_float<T>(weight == 0.f ? 0.f : acc[e] / weight);
  }
}

// Rungs 3 to 6 are one kernel in four shapes. W: warps that share the tokens. H: query heads a block serves.
// Stages: depth of the cp.async ring; 0: loads go straight to registers.
template <typename T, int D_, int W_, int H_, int Stages>
struct Shape {
  static constexpr int D = D_, W = W_, H = H_, N = Vec<T>::size;
  static constexpr bool kRing = Stages > 0;
  static constexpr int kStages = kRing ? Stages : 1;
  static constexpr int L = D / N;  // lanes that share a token, 16 bytes each
  // Tokens at a time, which is also the number of running softmaxes of a block.
  static constexpr int kParts = W * 32 / L;
};

template <typename T, typename S>
struct AttentionSmem {
  union {
    float part[S::kParts][S::H][S::D + 2];
    T ring[S::kStages][2][S::W * 32][S::N];
  };
};

LAB_DEVICE int parts_of(int whole, int part) { return (whole + part - 1) / part; }

// Element d of `count` partial softmaxes, `stride` floats apart, merged: {sum, maximum, weight}.
template <int D>
LAB_DEVICE Vec<float, 4> merge(const float* parts, int count, int stride, int d) {
  float maximum = -FLT_MAX, sum = 0.f, weight = 0.f;
  for (int i = 0; i < count; ++i) maximum = fmaxf(maximum, parts[size_t(i) * stride + D]);
  for (int i = 0; i < count; ++i) {
    const float* part = parts + size_t(i) * stride;
    const float factor = expf(part[D] - maximum);
    sum += part[d] * factor;
    weight += part[D + 1] * factor;
  }
  return {{sum, maximum, weight, 0.f}};
}

// 3. Vectorised: 16 bytes a lane, so 8 or 16 lanes suffice for a token, and the warp works on 2 or 4 tokens
// at a time, each with a running softmax of its own; they are merged in shared memory at the end.
//
// 4. Split-KV: each sequence's tokens are divided into `splits` parts, one for each block, and 4 warps share
// a part. A second kernel merges the parts. Only now is there work for the whole card.
//
// 5. Group: one block serves up to 4 query heads of a KV head, so that each key and value is loaded once for
// all of them.
//
// 6. Pipeline: cp.async keeps 3 tokens of each lane in flight while one is used. A lane reads only what it
// copied itself.
template <typename T, typename S>
__global__ void attention_tokens_kernel(Problem<T> p) {
  constexpr int D = S::D, H = S::H, N = S::N, L = S::L, kParts = S::kParts;
  auto& shared = smem<AttentionSmem<T, S>>();
  const int group = p.group(), teams = parts_of(group, H), split = blockIdx.x, splits = gridDim.x,
            b = blockIdx.z;
  const int kv_head = blockIdx.y / teams, head0 = blockIdx.y % teams * H;  // head0: within the group
  const int c = threadIdx.x % L * N, part = threadIdx.x / L;
  const int length = p.lengths[b], chunk = length > 0 ? parts_of(length, splits) : 0;
  const int begin = min(split * chunk, max(length, 0)), end = min(begin + chunk, length);
  const int steps = end > begin ? parts_of(end - begin, kParts) : 0;

  float query[H][N], acc[H][N] = {}, maximum[H], weight[H] = {};
  LAB_UNROLL
  for (int h = 0; h < H; ++h) {
    const bool live = head0 + h < group;
    const Vec<T> v = live ? load(p.q + b * p.q_stride + (kv_head * group + head0 + h) * D + c) : Vec<T>{};
    LAB_UNROLL
    for (int e = 0; e < N; ++e) query[h][e] = to_float(v.v[e]) * p.scale;
    maximum[h] = -FLT_MAX;
  }
  const auto address = [&](int i) {
    return p.token(b, kv_head, min(begin + i * kParts + part, end - 1), D) + c;
  };
  const auto copy = [&](int i) {  // past the end of the split nothing is copied
    if (i < steps) {
      const size_t at = address(i);
      cp_async16(shared.ring[i % S::kStages][0][threadIdx.x], p.k + at);
      cp_async16(shared.ring[i % S::kStages][1][threadIdx.x], p.v + at);
    }
    cp_async_commit();
  };
  if constexpr (S::kRing) {
    for (int i = 0; i < S::kStages - 1; ++i) copy(i);
  }
  for (int i = 0; i < steps; ++i) {
    Vec<T> key, value;
    if constexpr (S::kRing) {
      cp_async_wait<S::kStages - 2>();
      key = load(shared.ring[i % S::kStages][0][threadIdx.x]);
      value = load(shared.ring[i % S::kStages][1][threadIdx.x]);
      copy(i + S::kStages - 1);
    } else {
      const size_t at = address(i);
      key = load(p.k + at);
      value = load(p.v + at);
    }
    float score[H] = {};
    LAB_UNROLL
    for (int h = 0; h < H; ++h) {
      LAB_UNROLL
      for (int e = 0; e < N; ++e) score[h] = fmadd(query[h][e], to_float(key.v[e]), score[h]);
    }
    group_sum<L>(score);
    const bool live = begin + i * kParts + part < end;  // a token past the end has weight zero
    LAB_UNROLL
    for (int h = 0; h < H; ++h) {
      const float top = live ? fmaxf(maximum[h], score[h]) : maximum[h];
      const float shrink = expf(maximum[h] - top), share = live ? expf(score[h] - top) : 0.f;
      weight[h] = weight[h] * shrink + share;
      LAB_UNROLL
      for (int e = 0; e < N; ++e) acc[h][e] = acc[h][e] * shrink + share * to_float(value.v[e]);
      maximum[h] = top;
    }
  }

  if constexpr (S::kRing) {
    cp_async_wait<0>();
    __syncthreads();  // the parts' results overwrite the ring
  }
  LAB_UNROLL
  for (int h = 0; h < H; ++h) {
    LAB_UNROLL
    for (int e = 0; e < N; ++e) shared.part[part][h][c + e] = acc[h][e];
    if (c == 0) {
      shared.part[part][h][D] = maximum[h];
      shared.part[part][h][D + 1] = weight[h];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < min(H, group - head0) * D; i += S::W * 32) {
    const int h = i / D, d = i % D, head = head0 + h;
    const Vec<float, 4> all = merge<D>(shared.part[0][h], kParts, H * (D + 2), d);
    if (splits == 1) {
      const float result = all.v[2] == 0.f ? 0.f : all.v[0] / all.v[2];
      p.out[((size_t(b) * p.kv_heads + kv_head) * group + head) * D + d] = from_float<T>(result);
    } else {
      float* mine =
          p.partial + (((size_t(b) * p.kv_heads + kv_head) * splits + split) * group + head) * (D + 2);
      mine[d] = all.v[0];
      if (d == 0) {
        mine[D] = all.v[1];
        mine[D + 1] = all.v[2];
      }
    }
  }
}

// The second kernel of rungs 4 to 6: a block per query head, a thread per element.
template <typename T, int D>
__global__ void attention_merge_kernel(Problem<T> p, int splits) {
  const int group = p.group(), kv_head = blockIdx.x / group, g = blockIdx.x % group, b = blockIdx.y;
  const float* parts = p.partial + ((size_t(b) * p.kv_heads + kv_head) * splits * group + g) * (D + 2);
  const Vec<float, 4> all = merge<D>(parts, splits, group * (D + 2), threadIdx.x);
  const float result = all.v[2] == 0.f ? 0.f : all.v[0] / all.v[2];
  p.out[(size_t(b) * p.q_heads + blockIdx.x) * D + threadIdx.x] = from_float<T>(result);
}

template <typename T, typename S>
void launch_tokens(const Problem<T>& p, int splits, Ptr stream) {
  const int teams = ceil_div(p.q_heads / p.kv_heads, S::H);
  launch({dim3(splits, p.kv_heads * teams, p.batch), dim3(S::W * 32), sizeof(AttentionSmem<T, S>), stream},
         "attention_tokens_kernel", attention_tokens_kernel<T, S>, p);
  if (splits == 1) return;
  launch({dim3(p.q_heads, p.batch), dim3(S::D), 0, stream}, "attention_merge_kernel",
         attention_merge_kernel<T, S::D>, p, splits);
}

template <typename T, int D>
void climb(int rung, const Problem<T>& p, int splits, Ptr stream) {
  switch (rung) {
    case 1:
      return launch({dim3(ceil_div(p.batch * p.q_heads, 32)), dim3(32), 0, stream}, "attention_naive_kernel",
                    attention_naive_kernel<T, D>, p);
    case 2:
      return launch({dim3(p.q_heads, p.batch), dim3(32), 0, stream}, "attention_warp_kernel",
                    attention_warp_kernel<T, D>, p);
    case 3: return launch_tokens<T, Shape<T, D, 1, 1, 0>>(p, 1, stream);
    case 4: return launch_tokens<T, Shape<T, D, 4, 1, 0>>(p, splits, stream);
    case 5: return launch_tokens<T, Shape<T, D, 4, 4, 0>>(p, splits, stream);
    case 6: return launch_tokens<T, Shape<T, D, 4, 4, 4>>(p, splits, stream);
  }
  throw std::invalid_argument("decode_attention_ladder: no rung " + std::to_string(rung));
}

}  // namespace

void decode_attention_ladder(int rung, const DecodeAttentionArgs& a) {
  if (a.batch == 0) return;
  int page_shift = 0;
  while (1 << page_shift < a.cache.page_size) ++page_shift;
  by_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    const Problem<T> p{as<const T>(a.q.data),
                       as<const T>(a.cache.k),
                       as<const T>(a.cache.v),
                       as<const int>(a.cache.block_table),
                       as<const int>(a.context_lens),
                       as<T>(a.out),
                       as<float>(a.splits.partial),
                       a.batch,
                       a.q_heads,
                       a.cache.kv_heads,
                       page_shift,
                       a.cache.max_pages,
                       a.q.stride,
                       a.scale};
    if (a.head_dim == 64) return climb<T, 64>(rung, p, a.splits.count, a.stream);
    if (a.head_dim == 128) return climb<T, 128>(rung, p, a.splits.count, a.stream);
    throw std::invalid_argument("decode_attention_ladder: head_dim " + std::to_string(a.head_dim) +
                                " is not 64 or 128");
  });
}
