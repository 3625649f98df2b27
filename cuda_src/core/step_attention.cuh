// Attention of one sequence inside decode_step. A block takes one split of one KV head's context; K and V
// arrive through the same ring of tiles as the weights (weight_ring.cuh). The warps share the tokens of a
// tile and keep running softmaxes in registers (base 2, as in split_attention.cuh). Tensor cores multiply
// because they need few dependent instructions: a split has few tokens, and the other blocks wait for this
// one's result, so latency is what counts. P is rounded to T.
#pragma once
#include <climits>

#include "rotation.cuh"
#include "split_attention.cuh"
#include "tagged_row.cuh"
#include "weight_ring.cuh"

namespace lab {

constexpr int kStepSplits = 64;  // MAX_SPLITS of the contract
constexpr int kStepGroup = 8;    // MAX_GROUP of the contract

// The values that are the same for all layers. C: what the cache stores (kv_codes.cuh).
template <typename C>
struct StepHeads {
  int q_heads, kv_heads, page_shift;
  float eps, scale_log2;
  const int* table;  // the block table
  int64_t layer;     // elements between the K of a layer and that of the next
  C *k_cache, *v_cache;
};

template <typename T, int D, typename C>
struct StepAttentionSmem : NewScales<C> {
  alignas(16) float cos_sin[D];
  // Padded: two heads at a time touch every bank once.
  T q[kStepGroup][D % 64 ? D : D + 32];
  C new_k[D], new_v[D];  // as the cache stores them
};

// Codes (C) come into the tiles as they are and become pairs of numbers in registers. Their scales are applied as
// in mma_attention.cuh.
template <typename T, int D, typename C = T>
struct StepAttention {
  using P = std::conditional_t<kIsInt8<C>, bf16, T>;  // of the multiply by V
  // D / N of the L lanes hold 16 bytes of a token each.
  static constexpr int N = Vec<T>::size, L = lanes_per_token(D / N);
  // Warps that share the same 8 tokens; each multiplies a part of V's columns.
  static constexpr int kHalves = D > 64 ? 2 : 1;
  // Tokens of a tile, which has the K of all and then the V of all; in int8 then the scales of K and of V.
  static constexpr int kParts = kRingWarps / kHalves, kTokens = kParts * 8;
  // Steps over a token's K; chunks of 8 elements in a warp's part of its V.
  static constexpr int kSteps = D / 32, kChunks = D / 8 / kHalves;
  static constexpr bool kExchange = D % 64 == 0;  // all rows of tokens begin at the same bank
  // Units u and u + kOther share one operand A: see add_tokens().
  static constexpr int kOther = kExchange ? 2 : 1;
  // Floats of a head's results in shared memory: sums [kParts][D], then maxima and weights [kParts][2]; 4
  // more avoid bank conflicts.
  static constexpr int kPlace = kParts * (D + 2) + 4;
  static constexpr int sums_bytes(int group) { return group * kPlace * int(sizeof(float)); }
  static_assert(kRingThreads / L >= kStepGroup + 2,
                "a pass of all lanes takes a group's queries, key and value");
  static_assert(2 * kTokens * D * sizeof(T) <= kTileBytes, "K and V of a tile's tokens fit");

  StepAttentionSmem<T, D, C>& shared;
  float* sums;  // [group][kPlace]
  const StepHeads<C>& heads;
  const KvScales<C> scales;  // of all layers
  const int position, group, splits;
  // Of the present item; its tokens are [begin, end), the new one among them.
  int kv_head, split, used, begin, end;
  size_t new_place = 0;  // offset of the new token in a layer's cache
  // Of the present layer's cache in fp8: see SplitAttention.
  float keys_scale = 1.f, values_scale = 1.f;

  LAB_DEVICE StepAttention(StepAttentionSmem<T, D, C>& shared_, float* sums_, const StepHeads<C>& heads_,
                           const KvScales<C>& scales_, int position_)
      : shared(shared_), sums(sums_), heads(heads_), scales(scales_), position(position_),
        group(heads_.q_heads / heads_.kv_heads),
        splits(max(1, min(kStepSplits, int(gridDim.x) / heads_.kv_heads))) {
    locate(blockIdx.x);
  }

  // Issues the bulk copies of one layer's K and V for this block's items.
  template <typename Ring>
  LAB_DEVICE void issue(Ring& ring, int layer) {
    const C *k = heads.k_cache + layer * heads.layer, *v = heads.v_cache + layer * heads.layer;
    constexpr int kPerElement = sizeof(T) / sizeof(C);  // so many tiles of codes have the bytes of one of T
    each_item([&] {
      const int last = min(end, position);  // the new token is not in the cache yet
      for (int first = begin; first < last; first += kTokens) {
        const int tokens = min(kTokens, last - first);
        ring.begin(2 * (tokens * kTokenBytes + scale_bytes(tokens)), ring.few * kPerElement);
        C* tile = reinterpret_cast<C*>(ring.tile());
        for (int t = 0; t < tokens;) {  // one copy for all tokens that are neighbours in a page
          const int left = (1 << heads.page_shift) - ((first + t) & ((1 << heads.page_shift) - 1));
          const int run = min(left, tokens - t);
          const size_t from = place(first + t);
          copy(ring, tile + t * D, k + from, run * kTokenBytes);
          copy(ring, tile + (kTokens + t) * D, v + from, run * kTokenBytes);
          if constexpr (kIsInt8<C>) {
            const size_t row = (layer * heads.layer + from) / D;
            copy(ring, tile_scales(tile) + t, scales.k + row, scale_bytes(run));
            copy(ring, tile_scales(tile) + kTokens + t, scales.v + row, scale_bytes(run));
          }
          t += run;
        }
        ring.advance();
      }
    });
  }

  // qkv [(q_heads + 2 kv_heads) D] -> out [q_heads D]. The norms' weights [D] may be null. partial: for each
  // KV head the sums [kStepSplits][group][D], then maxima and weights [kStepSplits][group][2].
  template <typename Ring>
  LAB_DEVICE void run(Ring& ring, int layer, const TaggedRow<T>& qkv, const T* q_norm, const T* k_norm,
                      const TaggedRow<T>& out, TaggedFloats partial) {
    if constexpr (kIsFp8<C>) keys_scale = scales.k[layer], values_scale = scales.v[layer];
    each_item([&] {
      ring.shared.waits();
      rotate(layer, qkv, q_norm, k_norm);
      ring_sync();
      ring.shared.arrived();
      attend(ring);
      ring_sync();
      TaggedFloats mine = partial;
      mine.words += size_t(kv_head) * kStepSplits * group * (D + 2);
      publish(out, mine);
      ring.shared.waits();
      if (used > 1) merge(out, mine);
      ring_sync();  // no thread still reads `sums`
      ring.shared.arrived();
    });
  }

 private:
  static constexpr unsigned kTokenBytes = D * sizeof(C);
  // Bytes of the scales of that many tokens' keys, or values: those of 8 tokens are the least that is copied.
  LAB_DEVICE static unsigned scale_bytes(int tokens) { return kIsInt8<C> ? (tokens + 7) / 8 * 16 : 0; }
  // Behind a tile's K and V: [2][kTokens].
  LAB_DEVICE static half* tile_scales(C* tile) { return reinterpret_cast<half*>(tile + 2 * kTokens * D); }
  template <typename Ring, typename E>
  LAB_DEVICE static void copy(Ring& ring, E* to, const E* from, unsigned bytes) {
    ring.copy(reinterpret_cast<T*>(to), reinterpret_cast<const T*>(from), bytes);
  }
  LAB_DEVICE int lane() const { return threadIdx.x % 32; }
  LAB_DEVICE int warp() const { return threadIdx.x / 32; }

  // Item i is split i % splits of KV head i / splits. A block takes the items blockIdx.x, blockIdx.x +
  // gridDim.x, ...; it has more than one only where there are more KV heads than blocks. With codes it locates even
  // the first one anew in each layer: kept over the matrix products, these values were 100 bytes of spills.
  template <typename F>
  LAB_DEVICE void each_item(F f) {
    const int items = heads.kv_heads * splits;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      if (kIsCode<C> || item != int(blockIdx.x)) locate(item);
      if (begin < end) f();
    }
    if (!kIsCode<C> && items > int(gridDim.x)) locate(blockIdx.x);
  }
  // Sets the tokens of an item. A context of up to kAlone tiles is not split, because a merge would cost more
  // than it saves. An item without tokens has begin >= end.
  LAB_DEVICE void locate(int item) {
    constexpr int kAlone = 4;
    const int length = position + 1, tiles = (length + kTokens - 1) / kTokens;
    const int chunk = (tiles <= kAlone ? tiles : (tiles + splits - 1) / splits) * kTokens;
    kv_head = item / splits, split = item % splits;
    used = (length + chunk - 1) / chunk;
    begin = split * chunk, end = kv_head < heads.kv_heads ? min(length, begin + chunk) : begin;
    if (begin <= position && position < end) new_place = place(position);
  }
  LAB_DEVICE size_t place(int token) const {
    const int page = heads.table[token >> heads.page_shift], slot = token & ((1 << heads.page_shift) - 1);
    return (((size_t(page) * heads.kv_heads + kv_head) << heads.page_shift) + slot) * D;
  }

  // Normalises and rotates the group's queries into shared memory; the block whose split has the new token
  // also writes the new key and value to shared memory and to the cache. L lanes take one head; after the
  // group's heads come the new key and the new value.
  LAB_DEVICE void rotate(int layer, const TaggedRow<T>& qkv, const T* q_norm, const T* k_norm) {
    const int head = threadIdx.x / L;
    const bool query = head < group, key = head == group, value = head == group + 1;
    const Rotation<T, D> rotation(shared.cos_sin);
    const bool valid = rotation.live && (query || ((key || value) && position < end));
    const int i = rotation.c * N;
    const int of = query ? kv_head * group + head : heads.q_heads + (value ? heads.kv_heads : 0) + kv_head;
    const size_t to = layer * heads.layer + new_place + i;
    Vec<T> plain[1];
    qkv.wait(plain, of * D + i, 0, valid ? INT_MAX : 0);
    const Vec<T> turned = rotation.turn(plain[0], valid, query ? q_norm : k_norm, heads.eps);
    if constexpr (kIsCode<C>) {
      if (query && valid) store(&shared.q[head][i], turned);
      // By words: a choice between two objects would put both into memory.
      const auto as_key = bit_cast<Vec<uint32_t>>(turned), as_value = bit_cast<Vec<uint32_t>>(plain[0]);
      Vec<uint32_t> x;
      LAB_UNROLL
      for (int w = 0; w < 4; ++w) x.v[w] = !valid ? 0 : key ? as_key.v[w] : as_value.v[w];
      if (position < end) append(bit_cast<Vec<T>>(x), i, key, valid && !query, to);
      return;
    } else {
      if (!valid) return;
      store(query ? &shared.q[head][i]
            : key ? &shared.new_k[i]
                  : &shared.new_v[i],
            value ? plain[0] : turned);
      if (key) store(heads.k_cache + to, turned);
      if (value) store(heads.v_cache + to, plain[0]);
    }
  }
  // Writes the new key, or value, as codes to shared memory and to the cache, if valid. L lanes have N elements
  // each, from element i on; `to` is the offset of these. All lanes of the warp must call it, with zeros if not
  // valid.
  LAB_DEVICE void append(const Vec<T>& x, int i, bool key, bool valid, size_t to) {
    Vec<C, N> codes;
    [[maybe_unused]] const half scale = head_codes<L>(codes, x, key ? keys_scale : values_scale);
    if (!valid) return;
    store(key ? &shared.new_k[i] : &shared.new_v[i], codes);
    store((key ? heads.k_cache : heads.v_cache) + to, codes);
    if constexpr (kIsInt8<C>) {
      if (i == 0) shared.new_scales[key ? 0 : 1] = (key ? scales.k : scales.v)[to / D] = scale;
    }
  }

  // The queries as operand A of the multiplies in add_tokens(). Lane (g, t) loads 16 bytes of head g at a
  // time. Load s has the elements 32 s + 8 t to 32 s + 8 t + 7, in four words of two elements each: words 0
  // and 1 belong to unit 2 s, words 2 and 3 to unit 2 s + 1. A unit is the 16 elements that four lanes hold
  // of it together; they are the k of one multiply.
  //
  //   load s of lanes t = 0 .. 3     | 0 1 2 3 | 0 1 2 3 | 0 1 2 3 | 0 1 2 3 |     words
  //   unit 2 s                         a b       a b       a b       a b
  //   unit 2 s + 1                         a b       a b       a b       a b
  //
  //   A of a multiply, a lane's words    k: words a   k: words b
  //   rows 0 to 7: heads, of unit u        word 0       word 2
  //   rows 8 to 15: of unit u + kOther     word 1       word 3
  struct QueryPlace { int product, word; };
  LAB_DEVICE static QueryPlace query_place(int s, int i) {
    const int unit = 2 * s + i / 2, b = i % 2;
    // Of each 2 * kOther units the first kOther are in rows 0 to 7 of A, the others in rows 8 to 15.
    const int pair = unit / (2 * kOther), other = unit / kOther % 2;
    return {pair * kOther + unit % kOther, b * 2 + other};
  }
  // The unit in rows 0 to 7 of multiply number `product`: the inverse of query_place().
  LAB_DEVICE static int unit_of(int product) { return product / kOther * (2 * kOther) + product % kOther; }

  // A warp's running softmaxes, as lane (g, t) = (lane / 4, lane % 4) holds them: those of head g.
  struct Running {
    uint32_t query[kSteps][4];           // in the layout of operand A: see query_place()
    float acc[4][4] = {};                // for V's chunks t and t + kChunks / 2
    float top = -FLT_MAX, weight = 0.f;  // weight: of this lane's tokens alone
  };

  // Goes over the split's tokens, a tile at a time; then stores the warp's results in `sums`.
  template <typename Ring>
  LAB_DEVICE void attend(Ring& ring) {
    const int g = lane() / 4, t = lane() % 4, part = warp() / kHalves, half = warp() % kHalves;
    Running r;
    LAB_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      Vec<uint32_t> q = {};
      if (g < group) q = bit_cast<Vec<uint32_t>>(load(&shared.q[g][s * 32 + t * 8]));
      if constexpr (kIsCode<C>) q = in_order_of_codes(q);
      LAB_UNROLL
      for (int i = 0; i < 4; ++i) {
        const QueryPlace place = query_place(s, i);
        r.query[place.product][place.word] = q.v[i];
      }
    }
    for (int first = begin; first < end; first += kTokens) {
      const int cached = position - first;  // index of the new token, which is not in the tile
      if (cached > 0) ring.wait();
      add_tokens(r, reinterpret_cast<C*>(ring.tile()), cached);
      if (cached > 0) ring.release();
    }
    const float weight = group_sum<4>(r.weight);
    if (g >= group) return;
    if (half == 0 && t == 0) store(stats_at(g) + part * 2, Vec<float, 2>{{r.top, weight}});
    if (t >= kChunks / 2) return;
    float* to = sums + g * kPlace + part * D + (half * kChunks + t) * 8;
    if constexpr (kIsCode<C>) {
      // The elements of four pairs: 0 and 2, 1 and 3, 4 and 6, 5 and 7 of a chunk.
      LAB_UNROLL
      for (int j = 0; j < 4; j += 2) {
        const float (&a)[4] = r.acc[j], (&b)[4] = r.acc[j + 1];
        store(to + j * 2, Vec<float>{{a[0] * values_scale, b[0] * values_scale, a[2] * values_scale,
                                      b[2] * values_scale}});
        store(to + kChunks * 4 + j * 2, Vec<float>{{a[1] * values_scale, b[1] * values_scale,
                                                    a[3] * values_scale, b[3] * values_scale}});
      }
      return;
    }
    LAB_UNROLL
    for (int j = 0; j < 4; j += 2) {
      store(to + j * 2, Vec<float>{{r.acc[j][0], r.acc[j][2], r.acc[j + 1][0], r.acc[j + 1][2]}});
      store(to + kChunks * 4 + j * 2,
            Vec<float>{{r.acc[j][1], r.acc[j][3], r.acc[j + 1][1], r.acc[j + 1][3]}});
    }
  }

  // 8 elements of a query in the order in which pairs_of() gives those of a key.
  LAB_DEVICE static Vec<uint32_t> in_order_of_codes(const Vec<uint32_t>& q) {
    Vec<uint32_t> pairs;
    LAB_UNROLL
    for (int i = 0; i < 4; i += 2) {
      pairs.v[i] = (q.v[i] & 0xffffu) | q.v[i + 1] << 16;
      pairs.v[i + 1] = q.v[i] >> 16 | (q.v[i + 1] & 0xffff0000u);
    }
    return pairs;
  }

  // Attends to this warp's 8 of the tile's tokens. Token `cached` is the new one, which is not in the tile.
  // Only the split that has the new token can have a tile with fewer tokens. There the tokens after the new
  // one are replaced by the new one, with a weight of zero, because the tile may hold a NaN in their place.
  //   scores  A = queries, B = K: a token is a column. As in WeightRing::add_products() a lane's 16 bytes are
  //           its part of two multiplies, of a unit of 16 elements each. Rows 8 to 15 of A are the queries'
  //           unit u + kOther, so that one A serves two units of K. Each unit's sums are then in one half of
  //           the rows; the other half is ignored. kExchange: odd tokens load these two units in the other
  //           order, so that two tokens at a time touch every bank once; their sums are in the other half
  //   sums    A = P, B = V, without a shuffle: a lane has the scores of tokens 2 t and 2 t + 1, and loads a
  //           chunk of 8 elements of each. The two elements of a pair take two neighbouring k: in rows 0 to
  //           7 A has zero for the odd one, in rows 8 to 15 for the even one
  //   codes   as with K and V in T, but for the order of the 8 elements of a lane: the query has that of the
  //           codes' pairs, and attend() puts the sums into their places
  LAB_DEVICE void add_tokens(Running& r, C* tile, int cached) const {
    const int g = lane() / 4, t = lane() % 4, first = warp() / kHalves * 8, token = first + 2 * t;
    const C* k_at = (first + g < cached ? tile + (first + g) * D : shared.new_k) + t * 8;
    Vec<uint32_t> key[kSteps], value[2];
    LAB_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      const C* from = k_at + (kExchange ? s ^ g % 2 : s) * 32;
      if constexpr (kIsCode<C>) {
        const auto codes = bit_cast<Vec<uint32_t, 2>>(load<8>(from));
        key[s].v[0] = codes.v[0], key[s].v[1] = codes.v[1];
      } else {
        key[s] = bit_cast<Vec<uint32_t>>(load(from));
      }
    }
    // Column g is assigned the chunk with which lane t gets the sums of two chunks that lie kChunks / 2
    // apart: then its stores touch every bank once. For D = 96 columns 6 and 7 are not needed. Odd lanes load
    // the two 8-byte parts of a chunk in the other order: each bank is then read twice. Loading the same 16
    // bytes of four tokens at a time would read it four times.
    const int column = min(g, kChunks - 1),
              chunk = warp() % kHalves * kChunks + column / 2 + column % 2 * (kChunks / 2);
    LAB_UNROLL
    for (int i = 0; i < 2; ++i) {
      const C* v_at = (token + i < cached ? tile + (kTokens + token + i) * D : shared.new_v) + chunk * 8;
      if constexpr (kIsCode<C>) {
        const auto codes = bit_cast<Vec<uint32_t, 2>>(load<8>(v_at));
        value[i].v[0] = codes.v[0], value[i].v[1] = codes.v[1];
      } else {
        const auto one = bit_cast<Vec<uint32_t, 2>>(load<4>(v_at + t % 2 * 4));
        const auto other = bit_cast<Vec<uint32_t, 2>>(load<4>(v_at + 4 - t % 2 * 4));
        LAB_UNROLL
        for (int j = 0; j < 2; ++j) {
          value[i].v[j] = t % 2 ? other.v[j] : one.v[j];
          value[i].v[2 + j] = t % 2 ? one.v[j] : other.v[j];
        }
      }
    }
    // What the scores of tokens 2 t and 2 t + 1 are multiplied by, and in int8 their weights.
    float of_keys[2] = {heads.scale_log2, heads.scale_log2}, of_values[2] = {};
    if constexpr (kIsFp8<C>) of_keys[0] = of_keys[1] = heads.scale_log2 * keys_scale;
    if constexpr (kIsInt8<C>) {
      LAB_UNROLL
      for (int i = 0; i < 2; ++i) {
        // As with K and V, those of the new token stand for those of the tokens after it.
        const bool in_tile = token + i < cached;
        const half* from = tile_scales(tile) + token + i;
        of_keys[i] *= to_float(in_tile ? from[0] : shared.new_scales[0]);
        of_values[i] = to_float(in_tile ? from[kTokens] : shared.new_scales[1]);
      }
    }
    __syncwarp();  // without it nvcc loads V only after the scores are known
    if constexpr (kIsCode<C>) {
      LAB_UNROLL
      for (int s = 0; s < kSteps; ++s) pairs_of<C, T>(key[s].v, key[s].v[0], key[s].v[1]);
    }
    float products[2][4] = {};
    const auto add = [&](float (&sums)[4], int i, int unit) {
      const int at = unit % 2 * 2;
      mma_m16n8k16(sums, r.query[i], {key[unit / 2].v[at], key[unit / 2].v[at + 1]}, T{});
    };
    LAB_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      const int unit = unit_of(i);
      add(products[0], i, unit), add(products[1], i, unit + kOther);
    }
    // Where the sum of token 2 t + 1 is, in the first multiply's result.
    constexpr int kOdd = kExchange ? 3 : 1;
    const float low = token <= cached ? (products[0][0] + products[1][2]) * of_keys[0] : -INFINITY;
    const float high = token < cached ? (products[0][kOdd] + products[1][4 - kOdd]) * of_keys[1] : -INFINITY;
    const float most = fmaxf(r.top, group_max<4>(fmaxf(low, high))), shrink = exp2f(r.top - most);
    const float p_low = exp2f(low - most), p_high = exp2f(high - most);
    const uint32_t p = kIsInt8<C> ? TaggedRow<P>::pack(p_low * of_values[0], p_high * of_values[1])
                                  : TaggedRow<P>::pack(p_low, p_high);
    r.top = most;
    r.weight = fmadd(r.weight, shrink, p_low + p_high);
    if constexpr (kIsCode<C>) {
      LAB_UNROLL
      for (int i = 0; i < 2; ++i) pairs_of<C, P>(value[i].v, value[i].v[0], value[i].v[1]);
    }
    LAB_UNROLL
    for (int j = 0; j < 4; ++j) {
      LAB_UNROLL
      for (int e = 0; e < 4; ++e) r.acc[j][e] *= shrink;
      mma_m16n8k16(r.acc[j], {p & 0xffffu, p << 16, p >> 16, p & 0xffff0000u}, {value[0].v[j], value[1].v[j]},
                   P{});
    }
  }
  LAB_DEVICE float* stats_at(int head) const { return sums + head * kPlace + kParts * D; }

  // Merges the warps' softmaxes; a thread takes a pair of elements. If only one split is used the result is
  // final.
  LAB_DEVICE void publish(const TaggedRow<T>& out, const TaggedFloats& partial) {
    for (int i = threadIdx.x * 2; i < group * D; i += kRingThreads * 2) {
      const int head = i / D, d = i % D;
      float top[kParts], weight[kParts], most = -FLT_MAX, total = 0.f, low = 0.f, high = 0.f;
      LAB_UNROLL
      for (int w = 0; w < kParts; w += 2) {
        const Vec<float> two = load(stats_at(head) + w * 2);
        top[w] = two.v[0], weight[w] = two.v[1], top[w + 1] = two.v[2], weight[w + 1] = two.v[3];
        most = fmaxf(most, fmaxf(top[w], top[w + 1]));
      }
      LAB_UNROLL
      for (int w = 0; w < kParts; ++w) {
        const float factor = exp2f(top[w] - most);
        const Vec<float, 2> sum = load<2>(sums + head * kPlace + w * D + d);
        low = fmadd(sum.v[0], factor, low), high = fmadd(sum.v[1], factor, high);
        total = fmadd(weight[w], factor, total);
      }
      if (used == 1) {
        const float factor = 1.f / total;
        out.store(kv_head * group * D + i, low * factor, high * factor);
      } else {
        const int at = split * group + head;
        partial.store(at * D + d, low, high);
        if (d == 0) partial.store(stats_of(at), most, total);
      }
    }
  }
  LAB_DEVICE int stats_of(int row) const { return kStepSplits * group * D + row * 2; }

  // Merges the splits, in their order. Each thread of a block takes one output; where a group has more
  // outputs than a block has threads, the next blocks take the rest.
  LAB_DEVICE void merge(const TaggedRow<T>& out, const TaggedFloats& partial) {
    constexpr int kTogether = 8;  // splits whose loads are in flight at once
    for (int i = split * kRingThreads + threadIdx.x; i < group * D; i += used * kRingThreads) {
      const int head = i / D;
      float most = -FLT_MAX, total = 0.f, sum = 0.f;
      for (int s0 = 0; s0 < used; s0 += kTogether) {
        int at[3 * kTogether];
        float found[3 * kTogether];
        LAB_UNROLL
        for (int j = 0; j < kTogether; ++j) {
          const int row = min(s0 + j, used - 1) * group + head;
          at[j] = row * D + i % D, at[kTogether + j] = stats_of(row),
          at[2 * kTogether + j] = stats_of(row) + 1;
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
      const float mine = sum / total, next = __shfl_down_sync(0xffffffffu, mine, 1);
      if (i % 2 == 0) out.store(kv_head * group * D + i, mine, next);
    }
  }
};

}  // namespace lab
