// How the attention ops launch: the choice of the core by dtype, what the cache stores, head dim and number
// of query heads in a group, and the shared memory it needs.
#pragma once
#include "lane_attention.cuh"
#include "../launchers/arguments.h"
#include "mma_attention.cuh"
#include "../settings.h"
#include "../sizes.h"

namespace lab {

// Shared memory of a block, in bytes. The same bytes hold three things one after another: first the tiles of
// K and V; then the running softmaxes of the block's parts, followed by their merged result where a cluster
// reads it; at last the results of all splits, which the last block merges.
template <typename A>
inline size_t attention_smem_bytes(int group, int splits) {
  // The most running softmaxes that a block keeps of one head.
  constexpr int kParts = sizeof(typename A::T) == 4 || kHost ? 16 : 4;
  const size_t parts = size_t(kParts + 1) * group * (A::kRow + 2) * sizeof(float);
  const size_t merging = size_t(splits) * group * 3 * sizeof(float);
  const size_t most = parts > merging ? parts : merging;
  return most > sizeof(typename A::Smem) ? most : sizeof(typename A::Smem);
}

// Blocks of a cluster, which merges its splits through shared memory: a power of two, at most 8. A cluster is
// used only where there are no more than 1.5 blocks for each multiprocessor. With more blocks, clusters fill
// the device unevenly, and that costs more than the merge of a long context saves (H100, 8192 tokens of the
// 8B: 19.1 us without clusters, 23.6 us with them).
inline unsigned attention_cluster(int splits, int kv_heads, int batch) {
  unsigned blocks = 1;
  while (int(blocks) < splits && blocks < kMaxCluster) blocks *= 2;
  const bool few = 2 * round_up(splits, blocks) * kv_heads * batch <= 3 * multiprocessors();
  return has_clusters() && (kHost || few) ? blocks : 1;
}

// The cache of a launcher's arguments, in the form that the kernels take.
template <typename C>
KvCache<C> kv_cache(const CachePages& cache) {
  const PagedCache<C> pages{as<C>(cache.k), as<C>(cache.v), as<const int>(cache.block_table),
                            log2_of(cache.page_size), cache.max_pages};
  if constexpr (kIsCode<C>) {
    return {pages, kv_scales<C>(cache)};
  } else {
    return pages;
  }
}

// Calls f with the attention core for these heads. The core is a type, passed in a tag: `using A = typename
// decltype(core)::type;`
template <typename A>
struct AttentionCore {
  using type = A;
};
template <typename T, int D, typename C, typename F>
inline void by_group(int group, F&& f) {
  if constexpr (sizeof(T) == 2 && kHasGpuShapes) {
    if (!cpu_shapes()) {
      if constexpr (kHost && kIsCode<C>) {
        // Fewer kernels to compile: a GPU's shapes are in the host build for tests alone, and these take them.
        constexpr int kTiles = D == 128 ? 2 : 1;
        if (group <= 8 * kTiles) return f(AttentionCore<MmaAttention<T, D, kTiles, C>>{});
        throw std::invalid_argument(
            "LAB_HOST_SHAPES: a quantised cache of such heads is not in the host build");
      }
      if (group <= 8) return f(AttentionCore<MmaAttention<T, D, 1, C>>{});
      return f(AttentionCore<MmaAttention<T, D, 2, C>>{});
    }
  }
  if constexpr (!kIsCode<C> && kHasGpuShapes) {
    // Query heads that one warp serves. The host build without a GPU's shapes has one of these four, to save
    // compile time; where there are fewer heads than that, the rest is masked. The same is done for quantised
    // caches, which no GPU reads by these.
    const int heads = ceil_div(group, ceil_div(group, 4));
    if (heads == 1) return f(AttentionCore<LaneAttention<T, D, 1>>{});
    if (heads == 2) return f(AttentionCore<LaneAttention<T, D, 2>>{});
    if (heads == 3) return f(AttentionCore<LaneAttention<T, D, 3>>{});
  }
  f(AttentionCore<LaneAttention<T, D, 4, C>>{});
}
template <typename T, typename F>
inline void by_attention_core(const char* op, const CachePages& cache, int head_dim, int group, F&& f) {
  if (group > kMaxGroup)
    throw std::invalid_argument(std::string(op) + ": more than 16 query heads per KV head");
  by_cache<T>(cache.format, [&](auto code) {
    using C = decltype(code);
    switch (head_dim) {
      case 64: return by_group<T, 64, C>(group, f);
      case 96: return by_group<T, 96, C>(group, f);
      case 128: return by_group<T, 128, C>(group, f);
    }
    throw std::invalid_argument(std::string(op) + ": head_dim " + std::to_string(head_dim) +
                                " is not 64, 96 or 128");
  });
}

}  // namespace lab
