// Attention of one sequence inside decode_step: a block takes a split of one KV head's context. Its warps share the
// split's tokens and keep running softmaxes in registers (base 2, as in split_attention.cuh); K and V come straight from
// global memory, the first of them before the barrier that the query waits for.
#pragma once
#include "rotation.cuh"
#include "split_attention.cuh"
#include "weight_ring.cuh"

namespace lab {

#if LAB_SM90

constexpr int kStepSplits = 64;                   // MAX_SPLITS of the contract
constexpr int kStepGroup = 8;                     // MAX_GROUP

template <typename T, int D>
struct StepAttentionSmem {
  alignas(16) T q[kStepGroup][D], new_k[D], new_v[D];
  int last;
};

// The shape of a step's attention: what all its layers have in common.
struct StepHeads {
  int q_heads, kv_heads, page_shift, max_pages;
  float eps, scale_log2;
};

template <typename T, int D>
struct StepAttention {
  static constexpr int N = Vec<T>::size, L = lanes_per_token(D / N);  // D / N of L lanes have 16 bytes of a token each
  static constexpr int kSlots = 32 / L;           // tokens that a warp takes at once
  static constexpr int kAhead = 4;                // such steps whose loads are in flight
  static constexpr int kHeads = 4;                // query heads at a time
  static constexpr int kTokens = kRingWarps * kSlots * kAhead;  // of the block in flight
  static constexpr int kRow = D + 4;              // floats of a head's sums in shared memory; the 4 spare bank conflicts
  static constexpr int kSumsBytes = kRingWarps * kHeads * (kRow + 2) * int(sizeof(float));

  StepAttentionSmem<T, D>& shared;
  float* sums;                                    // [kRingWarps][kHeads][kRow], then maxima and weights [..][2]
  const StepHeads heads;
  const int* table;
  const int position, group, splits;
  int kv_head, split, used, begin, end;           // of the present item; tokens [begin, end), the new one among them
  T *k_cache, *v_cache;                           // of the present layer
  Packed<T, N> k[kAhead], v[kAhead];

  LAB_DEVICE StepAttention(StepAttentionSmem<T, D>& shared_, float* sums_, const StepHeads& heads_, const int* table_,
                           int position_)
      : shared(shared_), sums(sums_), heads(heads_), table(table_), position(position_),
        group(heads_.q_heads / heads_.kv_heads), splits(splits_of(heads_)) {}

  // Item i is split i % splits of KV head i / splits; a block takes items blockIdx.x, + gridDim.x, ...
  LAB_DEVICE static int splits_of(const StepHeads& h) {
    return max(1, min(kStepSplits, int(gridDim.x) / h.kv_heads));
  }
  // Finds the tokens of an item; false if there are none. No split has fewer than a block takes at once by half: a merge
  // would cost more than it saves.
  LAB_DEVICE bool locate(int item) {
    constexpr int kUnit = kTokens / 2;
    kv_head = item / splits, split = item % splits;
    const int length = position + 1, wanted = (length + splits - 1) / splits;
    const int chunk = (wanted + kUnit - 1) / kUnit * kUnit;
    used = (length + chunk - 1) / chunk;
    begin = split * chunk, end = min(length, begin + chunk);
    return kv_head < heads.kv_heads && begin < end;
  }
  LAB_DEVICE size_t place(int token) const {
    const int page = table[token >> heads.page_shift], slot = token & ((1 << heads.page_shift) - 1);
    return (((size_t(page) * heads.kv_heads + kv_head) << heads.page_shift) + slot) * D;
  }

  // Asks L2 for the first tokens of this block's item, in pages. For one thread.
  LAB_DEVICE void prefetch(const T* k_layer, const T* v_layer) {
    if (!locate(blockIdx.x)) return;
    const int page = 1 << heads.page_shift;
    for (int t = begin / page * page; t < min(position, min(end, begin + 512)); t += page) {
      const size_t at = place(t);
      bulk_prefetch_l2(k_layer + at, page * D * unsigned(sizeof(T)));
      bulk_prefetch_l2(v_layer + at, page * D * unsigned(sizeof(T)));
    }
  }

  // Sends for the first tokens of the block's first item: what is in the cache depends on no other block.
  LAB_DEVICE void start(T* k_layer, T* v_layer) {
    k_cache = k_layer, v_cache = v_layer;
    if (locate(blockIdx.x)) fetch(begin);
  }

  // qkv [(q_heads + 2 kv_heads) D] -> out [q_heads D]; norms [D], which may be null.
  LAB_DEVICE void run(const T* qkv, const T* q_norm, const T* k_norm, const float* cos_sin_row, T* out, float* partial,
                      unsigned* tickets) {
    for (int item = blockIdx.x; item < heads.kv_heads * splits; item += gridDim.x) {
      if (!locate(item)) continue;
      if (item != blockIdx.x) {
        ring_sync();                              // all are done with the item before
        fetch(begin);
      }
      rotate(qkv, q_norm, k_norm, cos_sin_row);
      ring_sync();
      for (int head0 = 0; head0 < group; head0 += kHeads) {
        if (head0 > 0) fetch(begin);
        attend(head0);
        publish(head0, out, partial);
      }
      if (used > 1) merge(out, partial, tickets + kv_head);
    }
  }

 private:
  LAB_DEVICE int lane() const { return threadIdx.x % 32; }
  LAB_DEVICE int warp() const { return threadIdx.x / 32; }
  LAB_DEVICE int token_of(int first, int j) const {
    return first + (j * kRingWarps + warp()) * kSlots + lane() / L;
  }
  LAB_DEVICE bool live() const { return lane() % L * N < D; }

  LAB_DEVICE void fetch(int first) {
    LAB_UNROLL
    for (int j = 0; j < kAhead; ++j) {
      const int token = token_of(first, j);
      k[j] = v[j] = Packed<T, N>{};
      if (!live() || token >= min(end, position)) continue;
      const size_t from = place(token) + lane() % L * N;
      k[j] = load_packed<N>(k_cache + from);
      v[j] = load_packed<N>(v_cache + from);
    }
  }

  // The group's queries into shared memory, normed and rotated; by the split that has it, the new token into shared
  // memory and the cache. L lanes take a head; after the group's comes the new key.
  LAB_DEVICE void rotate(const T* qkv, const T* q_norm, const T* k_norm, const float* cos_sin_row) {
    const Rotation<T, D> rotation(cos_sin_row);
    const bool owner = position < end;
    const int i = rotation.c * N;
    for (int first = 0; first <= group; first += kRingThreads / L) {
      const int head = first + threadIdx.x / L;
      const bool query = head < group, valid = rotation.live && (query || (head == group && owner));
      const T* from = qkv + (query ? kv_head * group + head : heads.q_heads + kv_head) * D;
      const Vec<T> turned = rotation.turn(from, valid, query ? q_norm : k_norm, heads.eps);
      if (!valid) continue;
      if (query) {
        store(&shared.q[head][i], turned);
      } else {
        const Vec<T> value = load(qkv + (heads.q_heads + heads.kv_heads + kv_head) * D + i);
        const size_t to = place(position) + i;
        store(&shared.new_k[i], turned);
        store(&shared.new_v[i], value);
        store(k_cache + to, turned);
        store(v_cache + to, value);
      }
    }
  }

  // The running softmaxes of kHeads heads over the split's tokens; then the warp's are merged into its place in `sums`.
  LAB_DEVICE void attend(int head0) {
    float query[kHeads][N], acc[kHeads][N] = {}, top[kHeads], weight[kHeads] = {};
    LAB_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      const bool valid = live() && head0 + h < group;
      unpack<T>(query[h], valid ? load_packed<N>(&shared.q[head0 + h][lane() % L * N]) : Packed<T, N>{});
      LAB_UNROLL
      for (int e = 0; e < N; ++e) query[h][e] *= heads.scale_log2;
      top[h] = -FLT_MAX;
    }
    for (int first = begin; first < end; first += kTokens) {
      float scores[kAhead * kHeads] = {}, values[kAhead][N];
      LAB_UNROLL
      for (int j = 0; j < kAhead; ++j) {
        if (token_of(first, j) == position && position < end && live()) {
          k[j] = load_packed<N>(&shared.new_k[lane() % L * N]);
          v[j] = load_packed<N>(&shared.new_v[lane() % L * N]);
        }
        float key[N];
        unpack<T>(key, k[j]);
        unpack<T>(values[j], v[j]);
        LAB_UNROLL
        for (int h = 0; h < kHeads; ++h) {
          LAB_UNROLL
          for (int e = 0; e < N; ++e) scores[j * kHeads + h] = fmadd(query[h][e], key[e], scores[j * kHeads + h]);
        }
      }
      if (first + kTokens < end) fetch(first + kTokens);
      group_sum<L>(scores);
      LAB_UNROLL
      for (int h = 0; h < kHeads; ++h) {
        float most = top[h];
        LAB_UNROLL
        for (int j = 0; j < kAhead; ++j) {
          float& score = scores[j * kHeads + h];
          if (token_of(first, j) >= end) score = -INFINITY;
          most = fmaxf(most, score);
        }
        const float shrink = exp2f(top[h] - most);
        top[h] = most;
        weight[h] *= shrink;
        LAB_UNROLL
        for (int e = 0; e < N; ++e) acc[h][e] *= shrink;
        LAB_UNROLL
        for (int j = 0; j < kAhead; ++j) {
          const float p = exp2f(scores[j * kHeads + h] - most);
          weight[h] += p;
          LAB_UNROLL
          for (int e = 0; e < N; ++e) acc[h][e] = fmadd(p, values[j][e], acc[h][e]);
        }
      }
    }
    LAB_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      float most = top[h];
      for (int s = L; s < 32; s *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, s));
      const float shrink = exp2f(top[h] - most);
      weight[h] *= shrink;
      for (int s = L; s < 32; s *= 2) weight[h] += __shfl_xor_sync(0xffffffffu, weight[h], s);
      LAB_UNROLL
      for (int e = 0; e < N; ++e) {
        acc[h][e] *= shrink;
        for (int s = L; s < 32; s *= 2) acc[h][e] += __shfl_xor_sync(0xffffffffu, acc[h][e], s);
      }
      const int row = warp() * kHeads + h;
      if (lane() < L && live()) {
        LAB_UNROLL
        for (int e = 0; e < N; e += 4) {
          store(sums + row * kRow + lane() * N + e, Vec<float>{{acc[h][e], acc[h][e + 1], acc[h][e + 2], acc[h][e + 3]}});
        }
      }
      if (lane() == 0) store(stats() + row * 2, Vec<float, 2>{{most, weight[h]}});
    }
    ring_sync();
  }
  LAB_DEVICE float* stats() const { return sums + kRingWarps * kHeads * kRow; }

  // Merges the warps' softmaxes of kHeads heads. If only one split is used the result is final, else it goes to partial,
  // whose part for this KV head holds the sums [kStepSplits][group][D] and then maxima and weights [kStepSplits][group][2].
  LAB_DEVICE void publish(int head0, T* out, float* partial) {
    for (int i = threadIdx.x; i < min(kHeads, group - head0) * D; i += kRingThreads) {
      const int h = i / D, d = i % D, head = head0 + h;
      float most = -FLT_MAX, total = 0.f, sum = 0.f;
      LAB_UNROLL
      for (int w = 0; w < kRingWarps; ++w) most = fmaxf(most, stats()[(w * kHeads + h) * 2]);
      LAB_UNROLL
      for (int w = 0; w < kRingWarps; ++w) {
        const int row = w * kHeads + h;
        const float factor = exp2f(stats()[row * 2] - most);
        sum = fmadd(sums[row * kRow + d], factor, sum);
        total = fmadd(stats()[row * 2 + 1], factor, total);
      }
      if (used == 1) {
        out[(kv_head * group + head) * D + d] = from_float<T>(sum / total);
      } else {
        float* mine = published(partial);
        mine[(split * group + head) * D + d] = sum;
        if (d == 0) store(mine + kStepSplits * group * D + (split * group + head) * 2, Vec<float, 2>{{most, total}});
      }
    }
    ring_sync();                                  // `sums` may be written again, and all of the block has published
  }
  LAB_DEVICE float* published(float* partial) const { return partial + size_t(kv_head) * kStepSplits * group * (D + 2); }

  // The last of the head's blocks merges the splits in their order and leaves the ticket at zero.
  LAB_DEVICE void merge(T* out, float* partial, unsigned* ticket) {
    if (threadIdx.x == 0) shared.last = take_ticket(ticket) == unsigned(used - 1);
    ring_sync();
    if (!shared.last) return;
    constexpr int kTogether = 16;                 // splits whose loads are in flight
    const float* mine = published(partial);
    for (int i = threadIdx.x; i < group * D; i += kRingThreads) {
      const int head = i / D;
      float most = -FLT_MAX, total = 0.f, sum = 0.f;
      for (int s0 = 0; s0 < used; s0 += kTogether) {
        float part[kTogether];
        Vec<float, 2> stat[kTogether];
        LAB_UNROLL
        for (int j = 0; j < kTogether; ++j) {
          const int s = min(s0 + j, used - 1);
          part[j] = mine[s * group * D + i];
          stat[j] = load<2>(mine + kStepSplits * group * D + (s * group + head) * 2);
        }
        float next = most;
        LAB_UNROLL
        for (int j = 0; j < kTogether; ++j) next = fmaxf(next, stat[j].v[0]);
        const float shrink = exp2f(most - next);
        most = next, sum *= shrink, total *= shrink;
        LAB_UNROLL
        for (int j = 0; j < kTogether; ++j) {
          if (s0 + j >= used) continue;
          const float factor = exp2f(stat[j].v[0] - most);
          sum = fmadd(part[j], factor, sum);
          total = fmadd(stat[j].v[1], factor, total);
        }
      }
      out[kv_head * group * D + i] = from_float<T>(sum / total);
    }
    if (threadIdx.x == 0) atomicExch(ticket, 0u);
  }
};

#endif  // LAB_SM90

}  // namespace lab
