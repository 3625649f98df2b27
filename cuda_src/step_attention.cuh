// Attention of one sequence inside decode_step: a block takes a split of one KV head's context. K and V come through the
// ring, as the weights do (weight_ring.cuh). The warps share a tile's tokens and keep running softmaxes in registers
// (base 2, as in split_attention.cuh).
#pragma once
#include <climits>

#include "rotation.cuh"
#include "split_attention.cuh"
#include "tagged_row.cuh"
#include "weight_ring.cuh"

namespace lab {

constexpr int kStepSplits = 64;                   // MAX_SPLITS of the contract
constexpr int kStepGroup = 8;                     // MAX_GROUP

// What all layers have in common.
template <typename T>
struct StepHeads {
  int q_heads, kv_heads, page_shift;
  float eps, scale_log2;
  const int* table;                               // block_table
  int64_t layer;                                  // elements of a layer's K
  T *k_cache, *v_cache;
};

template <typename T, int D>
struct StepAttentionSmem {
  alignas(16) float cos_sin[D];
  T q[kStepGroup][D], new_k[D], new_v[D];
};

template <typename T, int D>
struct StepAttention {
  static constexpr int N = Vec<T>::size, L = lanes_per_token(D / N);  // D / N of L lanes have 16 bytes of a token each
  static constexpr int kSlots = 32 / L;           // tokens that a warp takes at once
  static constexpr int kHeads = 4;                // query heads of a warp; a larger group takes two teams of warps
  static constexpr int kTokens = 2 * kRingWarps * kSlots;             // of a tile: half K, half V
  static constexpr int kRow = D + 4;              // floats of a head's sums in shared memory; the 4 spare bank conflicts
  static constexpr int kSumsBytes = kRingWarps * kHeads * (kRow + 2) * int(sizeof(float));
  static_assert(kRingThreads / L >= kStepGroup + 2, "a pass of all lanes takes a group's queries, key and value");
  static_assert(2 * kTokens * D * sizeof(T) <= kTileBytes, "K and V of a tile's tokens fit");

  StepAttentionSmem<T, D>& shared;
  float* sums;                                    // [kRingWarps][kHeads][kRow], then maxima and weights [..][2]
  const StepHeads<T>& heads;
  const int position, group, splits;
  int kv_head, split, used, begin, end;           // of an item; tokens [begin, end), the new one among them
  size_t new_place = 0;                           // in a layer's cache, of the new token

  LAB_DEVICE StepAttention(StepAttentionSmem<T, D>& shared_, float* sums_, const StepHeads<T>& heads_, int position_)
      : shared(shared_), sums(sums_), heads(heads_), position(position_), group(heads_.q_heads / heads_.kv_heads),
        splits(max(1, min(kStepSplits, int(gridDim.x) / heads_.kv_heads))) {
    locate(blockIdx.x);
  }

  // Sends for the context of this block's items, in one layer.
  LAB_DEVICE void send(WeightRing<T>& ring, int layer) {
    const T *k = heads.k_cache + layer * heads.layer, *v = heads.v_cache + layer * heads.layer;
    each_item([&] {
      const int last = min(end, position);        // the new token is not there yet
      for (int first = begin; first < last; first += kTokens) {
        const int tokens = min(kTokens, last - first);
        ring.begin(tokens * 2 * kTokenBytes, kFewUnderWay);
        for (int t = 0; t < tokens;) {            // as far as a page goes
          const int left = (1 << heads.page_shift) - ((first + t) & ((1 << heads.page_shift) - 1));
          const int run = min(left, tokens - t);
          const size_t from = place(first + t);
          ring.copy(ring.tile() + t * D, k + from, run * kTokenBytes);
          ring.copy(ring.tile() + (kTokens + t) * D, v + from, run * kTokenBytes);
          t += run;
        }
        ring.advance();
      }
    });
  }

  // qkv [(q_heads + 2 kv_heads) D] -> out [q_heads D]; norms [D], which may be null. partial: of each KV head the sums
  // [kStepSplits][group][D] and then maxima and weights [kStepSplits][group][2].
  LAB_DEVICE void run(WeightRing<T>& ring, int layer, const TaggedRow<T>& qkv, const T* q_norm, const T* k_norm,
                      const TaggedRow<T>& out, TaggedFloats partial) {
    each_item([&] {
      rotate(layer, qkv, q_norm, k_norm);
      ring_sync();
      attend(ring);
      ring_sync();
      TaggedFloats mine = partial;
      mine.words += size_t(kv_head) * kStepSplits * group * (D + 2);
      publish(out, mine);
      if (used > 1) merge(out, mine);
      ring_sync();                                // `sums` is free
    });
  }

 private:
  static constexpr unsigned kTokenBytes = D * sizeof(T);
  LAB_DEVICE int lane() const { return threadIdx.x % 32; }
  LAB_DEVICE int warp() const { return threadIdx.x / 32; }
  LAB_DEVICE int team_bits() const { return group > kHeads; }        // 1: two teams of warps

  // Item i is split i % splits of KV head i / splits; a block takes items blockIdx.x, + gridDim.x, ... There is more than
  // one only where there are more KV heads than blocks.
  template <typename F>
  LAB_DEVICE void each_item(F f) {
    const int items = heads.kv_heads * splits;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      if (item != int(blockIdx.x)) locate(item);
      if (begin < end) f();
    }
    if (items > int(gridDim.x)) locate(blockIdx.x);
  }
  // A context of up to kAlone tiles is not split, and no split but the last has less than kLeast: a merge would cost more than it
  // saves. Without tokens begin is not below end.
  LAB_DEVICE void locate(int item) {
    constexpr int kAlone = 4, kLeast = 1;
    const int length = position + 1, tiles = (length + kTokens - 1) / kTokens;
    const int chunk = (tiles <= kAlone ? tiles : max(kLeast, (tiles + splits - 1) / splits)) * kTokens;
    kv_head = item / splits, split = item % splits;
    used = (length + chunk - 1) / chunk;
    begin = split * chunk, end = kv_head < heads.kv_heads ? min(length, begin + chunk) : begin;
    if (begin <= position && position < end) new_place = place(position);
  }
  LAB_DEVICE size_t place(int token) const {
    const int page = heads.table[token >> heads.page_shift], slot = token & ((1 << heads.page_shift) - 1);
    return (((size_t(page) * heads.kv_heads + kv_head) << heads.page_shift) + slot) * D;
  }

  // The group's queries into shared memory, normed and rotated; by the split that has it, the new token into shared
  // memory and the cache. L lanes take a head; after the group's come the new key and the new value.
  LAB_DEVICE void rotate(int layer, const TaggedRow<T>& qkv, const T* q_norm, const T* k_norm) {
    const int head = threadIdx.x / L;
    const bool query = head < group, key = head == group, value = head == group + 1;
    const Rotation<T, D> rotation(shared.cos_sin);
    const bool valid = rotation.live && (query || ((key || value) && position < end));
    const int i = rotation.c * N;
    const int of = query ? kv_head * group + head : heads.q_heads + (value ? heads.kv_heads : 0) + kv_head;
    const size_t to = layer * heads.layer + new_place + i;
    Vec<T> plain[1];
    typename TaggedRow<T>::template Words<1> words;
    qkv.request(words, of * D + i, 0, valid ? INT_MAX : 0);
    qkv.wait(plain, words, of * D + i, 0, valid ? INT_MAX : 0);
    const Vec<T> turned = rotation.turn(plain[0], valid, query ? q_norm : k_norm, heads.eps);
    if (!valid) return;
    store(query ? &shared.q[head][i] : key ? &shared.new_k[i] : &shared.new_v[i], value ? plain[0] : turned);
    if (key) store(heads.k_cache + to, turned);
    if (value) store(heads.v_cache + to, plain[0]);
  }

  // A warp's running softmaxes of kHeads heads.
  struct Running {
    float query[kHeads][N], acc[kHeads][N], top[kHeads], weight[kHeads];
  };

  // Over the split's tokens, a tile at a time; then the warp's are merged into its place in `sums`.
  LAB_DEVICE void attend(WeightRing<T>& ring) {
    const bool live = lane() % L * N < D;
    const int head0 = (warp() & team_bits()) * kHeads;
    Running r = {};
    LAB_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      const bool valid = live && head0 + h < group;
      unpack<T>(r.query[h], valid ? load_packed<N>(&shared.q[head0 + h][lane() % L * N]) : Packed<T, N>{});
      LAB_UNROLL
      for (int e = 0; e < N; ++e) r.query[h][e] *= heads.scale_log2;
      r.top[h] = -FLT_MAX;
    }
    for (int first = begin; first < end; first += kTokens) {
      const int cached = position - first;        // the new token is not in the tile, which has no others perhaps
      if (cached > 0) ring.wait();
      add_tokens(r, ring.tile(), cached, end - first);
      if (cached > 0) ring.release();
    }

    // Over the warp's slots: each keeps the sum of a part of the elements.
    constexpr int kKept = N / kSlots;
    LAB_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      float most = r.top[h];
      LAB_UNROLL
      for (int s = L; s < 32; s *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, s));
      const float shrink = exp2f(r.top[h] - most);
      float weight = r.weight[h] * shrink;
      LAB_UNROLL
      for (int s = L; s < 32; s *= 2) weight += __shfl_xor_sync(0xffffffffu, weight, s);
      LAB_UNROLL
      for (int e = 0; e < N; ++e) r.acc[h][e] *= shrink;
      keep_part<N / 2, 16>(r.acc[h]);
      const int row = warp() * kHeads + h;
      if (live) {
        Vec<float, kKept> kept;
        LAB_UNROLL
        for (int e = 0; e < kKept; ++e) kept.v[e] = r.acc[h][e];
        store(sums + row * kRow + lane() % L * N + lane() / L * kKept, kept);
      }
      if (lane() == 0) store(stats() + row * 2, Vec<float, 2>{{most, weight}});
    }
  }
  // Lanes at `Distance` from each other keep a half each of their sum; the lower distances go on with it.
  template <int Kept, int Distance>
  LAB_DEVICE void keep_part(float (&v)[N]) const {
    if constexpr (Distance >= L) {
      const bool upper = lane() & Distance;
      LAB_UNROLL
      for (int e = 0; e < Kept; ++e) {
        const float mine = upper ? v[e + Kept] : v[e], sent = upper ? v[e] : v[e + Kept];
        v[e] = mine + __shfl_xor_sync(0xffffffffu, sent, Distance);
      }
      keep_part<Kept / 2, Distance / 2>(v);
    }
  }

  // The first `count` of a tile's tokens, two for each slot at a time; token `cached` is the new one.
  LAB_DEVICE void add_tokens(Running& r, const T* tile, int cached, int count) const {
    const bool live = lane() % L * N < D;
    const int step = (kRingWarps >> team_bits()) * kSlots, c = lane() % L * N;
    for (int first = (warp() >> team_bits()) * kSlots + lane() / L; first - lane() / L < min(count, kTokens); first += 2 * step) {
      float scores[2 * kHeads] = {}, key[N];
      Packed<T, N> value[2];
      LAB_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int t = first + j * step;
        const bool valid = live && t < min(count, kTokens);
        const T* k_at = t == cached ? shared.new_k : tile + t * D;
        const T* v_at = t == cached ? shared.new_v : tile + (kTokens + t) * D;
        unpack<T>(key, valid ? load_packed<N>(k_at + c) : Packed<T, N>{});
        value[j] = valid ? load_packed<N>(v_at + c) : Packed<T, N>{};
        LAB_UNROLL
        for (int h = 0; h < kHeads; ++h) {
          LAB_UNROLL
          for (int e = 0; e < N; ++e) scores[j * kHeads + h] = fmadd(r.query[h][e], key[e], scores[j * kHeads + h]);
        }
      }
      group_sum<L>(scores);
      LAB_UNROLL
      for (int h = 0; h < kHeads; ++h) {
        LAB_UNROLL
        for (int j = 0; j < 2; ++j) {
          if (first + j * step >= min(count, kTokens)) scores[j * kHeads + h] = -INFINITY;
        }
        const float most = fmaxf(r.top[h], fmaxf(scores[h], scores[kHeads + h])), shrink = exp2f(r.top[h] - most);
        r.top[h] = most;
        r.weight[h] *= shrink;
        LAB_UNROLL
        for (int e = 0; e < N; ++e) r.acc[h][e] *= shrink;
      }
      LAB_UNROLL
      for (int j = 0; j < 2; ++j) {
        unpack<T>(key, value[j]);
        LAB_UNROLL
        for (int h = 0; h < kHeads; ++h) {
          const float p = exp2f(scores[j * kHeads + h] - r.top[h]);
          r.weight[h] += p;
          LAB_UNROLL
          for (int e = 0; e < N; ++e) r.acc[h][e] = fmadd(p, key[e], r.acc[h][e]);
        }
      }
    }
  }
  LAB_DEVICE float* stats() const { return sums + kRingWarps * kHeads * kRow; }

  // Merges the warps' softmaxes. If only one split is used the result is final.
  LAB_DEVICE void publish(const TaggedRow<T>& out, const TaggedFloats& partial) {
    for (int i = threadIdx.x; i < group * D; i += kRingThreads) {
      const int head = i / D, d = i % D;
      const int team = head / kHeads;
      float top[kRingWarps], most = -FLT_MAX, total = 0.f, sum = 0.f;
      LAB_UNROLL
      for (int w = 0; w < kRingWarps; ++w) {      // warps of the other team count for nothing
        top[w] = (w & team_bits()) == team ? stats()[row_of(w, head) * 2] : -INFINITY;
        most = fmaxf(most, top[w]);
      }
      LAB_UNROLL
      for (int w = 0; w < kRingWarps; ++w) {
        const float factor = exp2f(top[w] - most);
        sum = fmadd(sums[row_of(w, head) * kRow + d], factor, sum);
        total = fmadd(stats()[row_of(w, head) * 2 + 1], factor, total);
      }
      if (used == 1) {
        store_pair(out, i, sum / total);
      } else {
        const int at = split * group + head;
        partial.store(at * D + d, sum);
        if (d == 0) partial.store(stats_of(at), most);
        if (d == 1) partial.store(stats_of(at) + 1, total);
      }
    }
  }
  LAB_DEVICE int stats_of(int row) const { return kStepSplits * group * D + row * 2; }
  LAB_DEVICE void store_pair(const TaggedRow<T>& out, int i, float mine) const {      // i: of the group's outputs
    const float next = __shfl_down_sync(0xffffffffu, mine, 1);
    if (i % 2 == 0) out.store(kv_head * group * D + i, mine, next);
  }
  LAB_DEVICE static int row_of(int warp, int head) { return warp * kHeads + head % kHeads; }

  // Merges the splits in their order. A block's threads take an output each; the outputs of a group that are more than
  // these go to the next blocks.
  LAB_DEVICE void merge(const TaggedRow<T>& out, const TaggedFloats& partial) {
    constexpr int kTogether = 8;                  // splits whose loads are in flight
    for (int i = split * kRingThreads + threadIdx.x; i < group * D; i += used * kRingThreads) {
      const int head = i / D;
      float most = -FLT_MAX, total = 0.f, sum = 0.f;
      for (int s0 = 0; s0 < used; s0 += kTogether) {
        int at[3 * kTogether];
        float found[3 * kTogether];
        LAB_UNROLL
        for (int j = 0; j < kTogether; ++j) {
          const int row = min(s0 + j, used - 1) * group + head;
          at[j] = row * D + i % D, at[kTogether + j] = stats_of(row), at[2 * kTogether + j] = stats_of(row) + 1;
        }
        partial.wait(found, at);
        float next = most;
        LAB_UNROLL
        for (int j = 0; j < kTogether; ++j) next = fmaxf(next, found[kTogether + j]);
        const float shrink = exp2f(most - next);
        most = next, sum *= shrink, total *= shrink;
        LAB_UNROLL
        for (int j = 0; j < kTogether; ++j) {
          if (s0 + j >= used) continue;
          const float factor = exp2f(found[kTogether + j] - most);
          sum = fmadd(found[j], factor, sum);
          total = fmadd(found[2 * kTogether + j], factor, total);
        }
      }
      store_pair(out, i, sum / total);
    }
  }
};

}  // namespace lab
