// Decode attention over a paged cache, with one block for each split of each sequence and KV head: which
// tokens a block owns, and how the results of the splits are merged. This is the core of decode_attention and
// rope_append_attention. What a block computes with its tokens is in lane_attention.cuh (CUDA cores) and
// mma_attention.cuh (tensor cores); the launch is in attention.cuh.
//
// A block keeps the group's queries in shared memory, copies the split's K and V through a ring of tiles
// (cp.async), and merges the running softmaxes of its parts. Scores are kept in base 2: exp(x) = exp2(x *
// log2(e)), and log2(e) is folded into the scale.
#pragma once
#include <cfloat>

#include "../common.cuh"
#include "kv_codes.cuh"

namespace lab {

constexpr int kMaxGroup = 16;   // the most query heads of one KV head
constexpr int kMaxCluster = 8;  // the most blocks of a cluster on any GPU that has clusters

// k, v [pages, kv_heads, page_size, D], of T or of codes; table [batch, max_pages]; a page holds 2^page_shift
// tokens, at least 16.
template <typename C>
struct PagedCache {
  C *k, *v;
  const int* table;
  int page_shift, max_pages;
};
// The same with scales. (An empty member of PagedCache would move the parameters of kernels without them.)
template <typename C>
struct CodedCache : PagedCache<C> {
  KvScales<C> scales;
};
template <typename C>
using KvCache = std::conditional_t<kIsCode<C>, CodedCache<C>, PagedCache<C>>;

// The values that a block reads before its tiles: the queries, and a new token that is not in the cache yet (as
// the cache stores it, and in int8 with its scales).
template <typename C>
struct NewScales {};
template <>
struct NewScales<Int8Code> {
  half new_scales[2];  // of the key, of the value
};
template <typename T, int D, typename C = T>
struct AttentionInputs : NewScales<C> {
  alignas(16) T q[kMaxGroup][D];
  C new_k[D], new_v[D];
};

// One block of the grid (splits, kv_heads, batch): the tokens it owns, and how its result is merged with the
// others'.
// C: what the cache stores.
template <typename T_, int D_, typename C_ = T_>
struct SplitAttention {
  using T = T_;
  using C = C_;
  // Kernels name the type of their argument so: spelled out, the symbol of the kernel, by which `lab inspect`
  // finds it, would hold an expression that nvcc and g++ mangle differently.
  using Cache = KvCache<C>;
  static constexpr int D = D_;
  // Floats of a head's sums in shared memory: 4 more avoid bank conflicts.
  static constexpr int kRow = D + 4;
  KvCache<C> cache;
  int split, kv_head, kv_heads, b, group;
  int splits, used;  // splits of the grid; those that this context length needs
  int begin, end;    // tokens of this split: [begin, end)
  // [begin, stored) are in the cache; at most one more token follows.
  int stored;
  // Of a cache in fp8: what the numbers of all keys and of all values are multiplied by. Read early.
  float keys_scale = 1.f, values_scale = 1.f;
  // This block's result in shared memory, where a cluster merges.
  float* merged = nullptr;
#ifdef LAB_LSE  // for `lab export`: log2 of each head's sum of exponentials, [batch, q_heads]
  float* lse = nullptr;
#endif

  // Split s owns the tokens [begin, end) of `length`; every split but the last has the same multiple of
  // `unit`. A context of up to `alone` tokens is not split, because a merge would cost more than it saves;
  // otherwise a split has at least `least` tokens. As long as each block of one cluster gets at most `alone`
  // tokens, the context is split among these blocks only: they merge sooner than a larger number of blocks.
  // Tokens from `in_cache` on are not read from the cache: the new token is taken from AttentionInputs.
  LAB_DEVICE SplitAttention(const KvCache<C>& cache_, int splits_, int group_, int length, int in_cache,
                            int unit, int least, int alone)
      : cache(cache_), group(group_), splits(splits_) {
    split = blockIdx.x, kv_head = blockIdx.y, kv_heads = gridDim.y, b = blockIdx.z;
    const int most = length <= blocks_of_cluster() * alone ? min(splits, blocks_of_cluster()) : splits;
    const int wanted = length <= alone ? length : max(least, (length + most - 1) / most);
    const int chunk = max(unit, (wanted + unit - 1) / unit * unit);
    // With no token at all the first block writes zeros.
    used = length > 0 ? (length + chunk - 1) / chunk : 1;
    begin = split * chunk, end = min(length, begin + chunk), stored = min(end, in_cache);
    if constexpr (kIsFp8<C>) keys_scale = *cache.scales.k, values_scale = *cache.scales.v;
  }
  LAB_DEVICE bool unused() const { return split >= used; }
  LAB_DEVICE bool owns(int token) const { return begin <= token && token < end; }

  LAB_DEVICE int page_of(int token) const {
    return cache.table[size_t(b) * cache.max_pages + (token >> cache.page_shift)];
  }
  // Which row of the cache a token of this KV head has, the offset of its first element, and how many elements
  // after it the page's next token begins. (LAB_NHD: in pages [page_size, kv_heads, D], for `lab export`.)
#ifndef LAB_NHD
  LAB_DEVICE size_t row_of(int page, int token) const {
    const int slot = token & ((1 << cache.page_shift) - 1);
    return ((size_t(page) * kv_heads + kv_head) << cache.page_shift) + slot;
  }
  LAB_DEVICE int token_stride() const { return D; }
#else
  LAB_DEVICE size_t row_of(int page, int token) const {
    const int slot = token & ((1 << cache.page_shift) - 1);
    return ((size_t(page) << cache.page_shift) + slot) * kv_heads + kv_head;
  }
  LAB_DEVICE int token_stride() const { return kv_heads * D; }
#endif
  LAB_DEVICE size_t place(int page, int token) const { return row_of(page, token) * D; }

  // Writes the new token to the cache, and to `inputs` for its tile, as it is stored. L lanes have N elements of
  // the key and of the value each, from element i on, if valid. All lanes of the warp must call it.
  template <int L, int N>
  LAB_DEVICE void append(AttentionInputs<T, D, C>& inputs, const Vec<T, N>& key, const Vec<T, N>& value,
                         int i, bool valid, int page, int token) {
    const auto put = [&](const auto& k, const auto& v) {
      if (!valid) return;
      const size_t to = place(page, token) + i;
      store(&inputs.new_k[i], k);
      store(&inputs.new_v[i], v);
      store(cache.k + to, k);
      store(cache.v + to, v);
    };
    if constexpr (!kIsCode<C>) {
      put(key, value);
    } else {
      Vec<C, N> k, v;
      [[maybe_unused]] const half of_key = head_codes<L>(k, key, keys_scale);
      [[maybe_unused]] const half of_value = head_codes<L>(v, value, values_scale);
      if constexpr (kIsInt8<C>) {
        if (valid && i == 0) {
          const size_t row = row_of(page, token);
          inputs.new_scales[0] = cache.scales.k[row] = of_key;
          inputs.new_scales[1] = cache.scales.v[row] = of_value;
        }
      }
      put(k, v);
    }
  }

  // Merges the running softmaxes of this block. sums: in shared memory, [parts][group][kRow], followed by
  // maxima and weights [parts][group][2]. The result goes to one of three places: to out [batch, q_heads, D],
  // if only one split is used and it is therefore final; else, where a cluster merges, to shared memory
  // behind what was merged; else to `partial`, which has for each sequence and KV head the sums
  // [splits][group][D], followed by maxima and weights [splits][group][2].
  template <int Parts>
  LAB_DEVICE_ONCE void publish(float* sums, T* out, float* partial) {
    const float* stats = sums + Parts * group * kRow;
    merged = sums + Parts * group * (kRow + 2);
    for (int i = threadIdx.x * 4; i < group * D; i += blockDim.x * 4) {
      const int h = i / D, d = i % D;
      float top = -FLT_MAX, total = 0.f;
      Vec<float> sum{};
      LAB_UNROLL
      for (int p = 0; p < Parts; ++p) top = fmaxf(top, stats[(p * group + h) * 2]);
      LAB_UNROLL
      for (int p = 0; p < Parts; ++p) {
        const int row = p * group + h;
        const float factor = exp2f(stats[row * 2] - top);
        add(sum, load(sums + row * kRow + d), factor);
        total = fmadd(stats[row * 2 + 1], factor, total);
      }
      if (used == 1) {
        store_normalised(out, i, sum, total);
        store_lse(i, top, total);
      } else if (in_cluster()) {
        store(merged + i, sum);
        if (d == 0) store(merged + group * D + h * 2, Vec<float, 2>{{top, total}});
      } else {
        float* mine = published(partial) + size_t(split) * group * D + i;
        store(mine, Vec<float, 2>{{sum.v[0], sum.v[1]}});
        store(mine + 2, Vec<float, 2>{{sum.v[2], sum.v[3]}});
        if (d == 0) store(published_stats(partial) + (split * group + h) * 2, Vec<float, 2>{{top, total}});
      }
    }
  }

  // Merges the splits. If one cluster has them all this happens through shared memory, which saves two round
  // trips to L2.
  LAB_DEVICE_ONCE void merge(T* out, float* partial, unsigned* tickets) const {
    if (used == 1) return;
    if (in_cluster()) return merge_in_cluster(out);
    merge_in_last_block(out, partial, tickets);
  }

 private:
  LAB_DEVICE bool in_cluster() const { return used <= blocks_of_cluster(); }
  static LAB_DEVICE int blocks_of_cluster() {
#if LAB_SM90
    return int(cluster_size());
#else
    return 1;
#endif
  }

  // Each block of the cluster merges a part of the group's outputs, in the order of the splits.
  LAB_DEVICE void merge_in_cluster(T* out) const {
#if LAB_SM90
    // All blocks have published; those without tokens have ended.
    cluster_sync();
    for (int i = (split * blockDim.x + threadIdx.x) * 4; i < group * D; i += used * blockDim.x * 4) {
      Vec<float, 2> stats[kMaxCluster];
      Vec<float> sums[kMaxCluster], sum{};
      float top = -FLT_MAX, total = 0.f;
      LAB_UNROLL
      for (int s = 0; s < kMaxCluster; ++s) {
        if (s >= used) continue;
        const float* theirs = cluster_peer(merged, s);
        sums[s] = load(theirs + i);
        stats[s] = load<2>(theirs + group * D + i / D * 2);
      }
      LAB_UNROLL
      for (int s = 0; s < kMaxCluster; ++s) {
        if (s < used) top = fmaxf(top, stats[s].v[0]);
      }
      LAB_UNROLL
      for (int s = 0; s < kMaxCluster; ++s) {
        if (s >= used) continue;
        const float factor = exp2f(stats[s].v[0] - top);
        add(sum, sums[s], factor);
        total = fmadd(stats[s].v[1], factor, total);
      }
      store_normalised(out, i, sum, total);
      store_lse(i, top, total);
    }
    // All have read: a block's shared memory ends with the block.
    cluster_sync();
#endif
  }

  // Each block takes a ticket after its results are visible. The block with the last ticket sees the results
  // of all; it merges them in the order of the splits, so that a run repeats bit for bit, and resets the
  // counter to zero for the next launch.
  LAB_DEVICE void merge_in_last_block(T* out, float* partial, unsigned* tickets) const {
    int& last = smem<int>();
    unsigned* ticket = tickets + b * kv_heads + kv_head;
    __syncthreads();
    if (threadIdx.x == 0) last = take_ticket(ticket) == unsigned(used - 1);
    __syncthreads();
    if (!last) return;
    __syncthreads();  // all have read `last`: its memory is reused below
    // [used][group][2]; then a factor for each, exp2(maximum - common maximum).
    float* stats = &smem<float>();
    float* factors = stats + used * group * 2;
    for (int i = threadIdx.x; i < used * group; i += blockDim.x) {
      store(stats + i * 2, load<2>(published_stats(partial) + i * 2));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < used * group; i += blockDim.x) {
      float top = -FLT_MAX;
      for (int j = i % group; j < used * group; j += group) top = fmaxf(top, stats[j * 2]);
      factors[i] = exp2f(stats[i * 2] - top);
    }
    __syncthreads();
    // Splits whose loads are in flight at once: a third of an H100's 33.
    constexpr int kAhead = 11;
    for (int i = threadIdx.x * 4; i < group * D; i += blockDim.x * 4) {
      const float* sums = published(partial) + i;
      float total = 0.f;
      Vec<float> sum{};
      for (int s0 = 0; s0 < used; s0 += kAhead) {
        Vec<float, 2> low[kAhead], high[kAhead];  // a row of partial is aligned to 8 bytes only
        LAB_UNROLL
        for (int s = 0; s < kAhead; ++s) {
          if (s0 + s >= used) continue;
          low[s] = load<2>(sums + size_t(s0 + s) * group * D);
          high[s] = load<2>(sums + size_t(s0 + s) * group * D + 2);
        }
        LAB_UNROLL
        for (int s = 0; s < kAhead; ++s) {
          if (s0 + s >= used) continue;
          const int row = (s0 + s) * group + i / D;
          add(sum, Vec<float>{{low[s].v[0], low[s].v[1], high[s].v[0], high[s].v[1]}}, factors[row]);
          total = fmadd(stats[row * 2 + 1], factors[row], total);
        }
      }
      store_normalised(out, i, sum, total);
#ifdef LAB_LSE
      float top = -FLT_MAX;
      for (int j = i / D; j < used * group; j += group) top = fmaxf(top, stats[j * 2]);
      store_lse(i, top, total);
#endif
    }
    if (threadIdx.x == 0) atomicExch(ticket, 0u);
  }

  LAB_DEVICE static void add(Vec<float>& sum, const Vec<float>& v, float factor) {
    LAB_UNROLL
    for (int e = 0; e < 4; ++e) sum.v[e] = fmadd(v.v[e], factor, sum.v[e]);
  }
  // Writes elements i to i + 3 of this group's part of out, divided by the weights' sum. With no token at all
  // they are zero.
  LAB_DEVICE void store_normalised(T* out, int i, const Vec<float>& sum, float total) const {
    const float factor = total == 0.f ? 0.f : values_scale / total;
    Vec<T, 4> v;
    LAB_UNROLL
    for (int e = 0; e < 4; ++e) v.v[e] = from_float<T>(sum.v[e] * factor);
    store(out + (size_t(b) * kv_heads + kv_head) * group * D + i, v);
  }
  // top: the maximum, in base 2, to which the sum of weights `total` refers.
  LAB_DEVICE void store_lse([[maybe_unused]] int i, [[maybe_unused]] float top,
                            [[maybe_unused]] float total) const {
#ifdef LAB_LSE
    if (i % D == 0) {
      lse[(size_t(b) * kv_heads + kv_head) * group + i / D] = total == 0.f ? -INFINITY : top + log2f(total);
    }
#endif
  }
  LAB_DEVICE float* published(float* partial) const {
    return partial + (size_t(b) * kv_heads + kv_head) * splits * group * (D + 2);
  }
  LAB_DEVICE float* published_stats(float* partial) const {
    return published(partial) + size_t(splits) * group * D;
  }
};

}  // namespace lab
