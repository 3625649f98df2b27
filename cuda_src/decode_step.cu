// decode_step: one token of one sequence in one launch: embedding; for every layer norm + qkv, norm + rope +
// append + attention, o + residual, norm + gate and up + silu * mul, down + residual; norm + lm_head + argmax
//
//   ids, positions, out [1] int32   table [layers, 10] addresses (LAYER of the contract); with packed weights 15
//   columns (MATRICES), or 19 (APART)
//   logits [1, vocab] float32
//   caches [layers, pages, kv_heads, page_size, D], their scales (lab/formats/kv.py)   block_table [1, max_pages]
//   cos_sin [max_positions, D] float32
//   words: the rows that blocks pass to each other: h, qkv, attention, act and the results of attention's
//   splits
//   mapping   one block per multiprocessor, which stays until the end. It owns a share of every matrix's
//             rows and a split of one KV head's context. One thread issues bulk copies into a ring of tiles,
//             eight warps multiply them (core/weight_ring.cuh). Between two phases a block waits for the
//             others' results (core/tagged_row.cuh); the copies of weights continue meanwhile
//   traffic   every weight and the context's K and V once; the rest is small
//   ranks     if several GPUs divide the model, each runs this kernel. A block sends its sums of o and down to
//             the other ranks and adds theirs, before it passes the residual to the other blocks
//   contract  lab/ops/decode_step.py          twin  triton_kernels/decode_step.py
#include <algorithm>

#include "common.cuh"
#include "core/candidate.cuh"
#include "core/exchange.cuh"
#include "core/mixed_ring.cuh"
#include "core/step_attention.cuh"
#include "launchers/decode_step.h"
#include "sizes.h"

using namespace lab;

// One row of `table`: the addresses of a layer's tensors.
template <typename T>
struct StepLayer {
  const T *attn_norm, *wqkv, *bqkv, *q_norm, *k_norm, *wo, *bo, *mlp_norm, *w_gate_up, *w_down;
};

// The same of a model with packed weights, whose matrices are codes.
template <typename T>
struct PackedStepLayer : StepLayer<T> {
  const uint8_t *wqkv_scales, *wo_scales, *w_gate_up_scales, *w_down_scales;
  uint64_t formats;  // a byte for each of the four

  LAB_DEVICE int format(int matrix) const { return int(formats >> (8 * matrix) & 0xff); }
};

// The same of a model whose q, k and v may be stored apart. wqkv is then q's, and the bytes 4 and 5 of `formats`
// are for k and v.
template <typename T>
struct MixedStepLayer : PackedStepLayer<T> {
  MoreMatrices<T> wk_and_wv;
};

// How the weights of a model are stored. packed: some in a weight format whose scales belong to one segment each.
// mixed: in any formats, and q, k and v may be apart.
enum class Stored { plain, packed, mixed };

// What differs between these models.
template <typename T, Stored>
struct StepTypes {
  using Layer = StepLayer<T>;
  using Ring = WeightRing<T>;
  using StepMatrix = Matrix<T>;
  static constexpr int kTile = kTileBytes, kSpan = 0;  // kSpan: columns; x is filled up to a multiple of it
};
template <typename T>
struct StepTypes<T, Stored::packed> {
  using Layer = PackedStepLayer<T>;
  using Ring = PackedRing<T>;
  using StepMatrix = PackedMatrix<T>;
  static constexpr int kTile = kPackedTileBytes, kSpan = kMostColumns<false>;
};
template <typename T>
struct StepTypes<T, Stored::mixed> {
  using Layer = MixedStepLayer<T>;
  using Ring = MixedRing<T>;
  using StepMatrix = MixedMatrix<T>;
  static constexpr int kTile = kPackedTileBytes, kSpan = kMostColumns<true>;
};

// C: what the cache stores.
template <typename T, typename C>
struct StepValues : StepTrace::Argument {
  const int *ids, *positions;
  PackedWeights embed, lm_head;  // codes: the elements of a plain matrix
  const void* table;
  int columns;  // of table
  const T* final_norm;
  const float* cos_sin;
  float* logits;
  int* out;
  uint64_t *h, *qkv, *attention, *act, *partial;  // rows that pass between blocks: core/tagged_row.cuh
  unsigned* counters;
  int layers, vocab, hidden, intermediate, tiles, row_bytes;
  // Up to this many bytes of a layer's K and V, one tile is in flight, not two.
  int64_t few_up_to;
  StepHeads<C> heads;
  // At the end: in the midst it moved the others, and the kernel spilled registers.
  PeerWords peers;
  int head_rows;  // of lm_head, of which a rank has a share
};
// With the scales of all layers behind them, if the cache has any.
template <typename T, typename C = T>
struct StepArguments : StepValues<T, C>, KvScales<C> {};

// The values that are added to a sum: an element of the residual, in its word, and a bias.
template <typename T>
struct Base {
  uint64_t word;
  T bias;
};

enum Counter { kBest = 0, kTicket = 2, kTag = 3 };  // indices in `counters`, as in the contract

// The start of a block's shared memory. Behind it follow: the tiles; a norm's weight; a row of x, whose
// memory attention uses for its sums as well; the table.
template <typename T, int D, typename C>
struct alignas(128) StepSmem {
  RingSmem ring;
  StepAttentionSmem<T, D, C> attention;
  alignas(16) float squares[kRingWarps];
  uint64_t best[kRingWarps];
};

// The phases with a matrix product, in the order of a step: four in each layer, then the last one. Attention,
// between kQkv and kO, is a phase as well, but has no name here: it runs before kO's product.
// The last is 4 for a reason: the others are the numbers of a layer's matrices (MATRICES of the contract).
enum StepPhase { kQkv, kO, kGateUp, kDown, kLmHead };

// Brings a row of x into shared memory, where the matrix products read it. Span: with packed weights x has zeros
// from k to the end of the last span; 0 with plain ones.
template <typename T, int Span>
struct StepRow {
  static constexpr int N = 8, kStep = kRingThreads * N;
  T *x, *weight;  // [k] in shared memory; weight: of the next norm
  float* squares;
  float mean;  // 1 / k of the rows that are normalised

  // Issues the copy of the next norm's weight, a phase before its use: otherwise its latency would add to the
  // wait for the row. A thread copies the columns that it will scale.
  LAB_DEVICE void start(const T* norm_w, int k) {
    // A block without a share of the last normalised product calls this instead.
    cp_async_wait<0>();
    for (int col = threadIdx.x * N; col < k; col += kStep) cp_async16(weight + col, norm_w + col);
    cp_async_commit();
  }
  // Calls f(column, 8 elements) for this thread's columns of a row [k], once they have arrived.
  template <typename F>
  LAB_DEVICE static void each(const TaggedRow<T>& row, int k, F f) {
    if (k <= kStep) return each<1>(row, k, f);
    each<4>(row, k, f);
  }
  template <int kAhead, typename F>  // kAhead: how many times 8 elements are loaded at once
  LAB_DEVICE static void each(const TaggedRow<T>& row, int k, F f) {
    for (int first = threadIdx.x * N; first < k; first += kAhead * kStep) {
      Vec<T> values[kAhead];
      row.wait(values, first, kStep, k);
      LAB_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        if (first + i * kStep < k) f(first + i * kStep, values[i]);
      }
    }
  }
  LAB_DEVICE void pad(int k) {
    if constexpr (Span > 0) {
      const int end = (k + Span - 1) / Span * Span;
      for (int col = k + threadIdx.x; col < end; col += kRingThreads) x[col] = from_float<T>(0.f);
    }
  }
  LAB_DEVICE void copy(const TaggedRow<T>& row, int k, StepTrace& trace) {
    each(row, k, [&](int col, const Vec<T>& v) { store(x + col, v); });
    pad(k);
    ring_sync();
    trace.arrived();
  }
  // x = T(T(row * rsqrt(mean(row^2) + eps)) * weight): rmsnorm's rounding points.
  LAB_DEVICE void norm(const TaggedRow<T>& row, int k, float eps, StepTrace& trace) {
    float f[N], factor[N], sum = 0.f;
    each(row, k, [&](int col, const Vec<T>& v) {
      unpack<T>(f, bit_cast<Packed<T, N>>(v));
      LAB_UNROLL
      for (int e = 0; e < N; ++e) sum = fmadd(f[e], f[e], sum);
      store(x + col, v);
    });
    pad(k);
    sum = group_sum<32>(sum);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
    ring_sync();
    trace.arrived();
    const float scale = rsqrtf(sum_of_warps(squares) * mean + eps);
    cp_async_wait<0>();
    // Each thread scales the columns it stored.
    for (int col = threadIdx.x * N; col < k; col += kStep) {
      unpack<T>(factor, load_packed<N>(weight + col));
      unpack<T>(f, load_packed<N>(x + col));
      Vec<T> v;
      LAB_UNROLL
      for (int e = 0; e < N; ++e) v.v[e] = normed_element<T>(f[e], scale, factor[e]);
      store(x + col, v);
    }
    ring_sync();
  }
};

// The ranks that divide the model. The tag of the words that they exchange counts exchanges, two in each layer;
// launches[0] counts launches.
template <bool OfARank>
struct StepPeers : PeerSlots {
  LAB_DEVICE StepPeers(const PeerWords& peers, int layers)
      : PeerSlots(peers, peers.ranks > 1 ? *reinterpret_cast<uint32_t*>(peers.launches) * 2 * layers : 0) {}
  LAB_DEVICE void next() { ++tag; }
  LAB_DEVICE void finish(const PeerWords& peers) const {
    if (ranks > 1) ++*reinterpret_cast<uint32_t*>(peers.launches);
  }
};
template <>
struct StepPeers<false> {
  LAB_DEVICE StepPeers(const PeerWords&, int) {}
  LAB_DEVICE void next() {}
  LAB_DEVICE void finish(const PeerWords&) const {}
};

// The epilogue of a phase's matrix product: what is added to its sums, and where the results go.
//
//   phase     added to the sum              finished by          stored in
//   kQkv      the bias, if there is one                          the row qkv
//   kO        the bias, and the residual                         the residual h
//   kGateUp                                 silu(gate) * up      the row act
//   kDown     the residual                                       the residual h
//   kLmHead   NaN, if the token id is invalid                    logits, and the best so far
//
// If ranks divide the model, the sum of kO (with the bias) and that of kDown are added up over all ranks before
// the residual is added.
template <typename T, bool OfARank>
struct StepEpilogue {
  StepPhase phase;
  bool normed;  // a phase with a normalised input adds no residual
  const T* bias;
  float poison;
  TaggedRow<T> h, to;
  float* logits;
  uint64_t& best;
  StepPeers<OfARank> peers;

  // load() is called before the multiply; its result is unpacked in finish(), after it.
  LAB_DEVICE Base<T> load(int n) const {
    return {normed ? 0 : h.own(n), bias ? bias[n] : from_float<T>(0.f)};
  }
  LAB_DEVICE float finish(int n, const Base<T>& base, float sum, float second) const {
    if (phase == kGateUp) return activate(sum, second);
    if (phase == kLmHead) return sum + poison;
    if constexpr (OfARank) {
      if (!normed && peers.ranks > 1) {
        return peers.total(n, sum + to_float(base.bias)) + TaggedRow<T>::element(base.word, n);
      }
    }
    return sum + (TaggedRow<T>::element(base.word, n) + to_float(base.bias));
  }
  LAB_DEVICE void store(int n, float mine, float next) const {
    if (phase == kLmHead) {
      logits[n] = mine;
      const uint64_t other = candidate(mine, n);
      best = other > best ? other : best;
    } else if (n % 2 == 0) {
      to.store(n, mine, next);
    }
  }
};

// Elements n and n + 1 of the embedding of a token; n is even. row: where the token's elements are, unless the
// embedding is packed.
template <bool Packed, typename T, typename C>
LAB_DEVICE void token_elements(float (&two)[2], const StepArguments<T, C>& a, const T* row, int token,
                               int n) {
  if (!Packed || a.embed.format == int(Format::plain)) {
    two[0] = to_float(row[n]), two[1] = to_float(row[n + 1]);
    return;
  }
  const FormatSizes sizes(a.embed.format, a.hidden);
  const int col = n % sizes.columns, half = col % kRunColumns / 16;
  float unit[kMostUnitColumns];
  unpack_unit(unit, a.embed, sizes, token, n / sizes.columns * 4 + col % 16 / 4);
  const int first = col / kRunColumns * 8 + half * 4 + col % 4;
  two[0] = unit[first], two[1] = unit[first + 1];
}

template <typename T, int D, Stored Form, bool OfARank, typename C>
__global__ void __launch_bounds__(kRingThreads + 32, 1) decode_step_kernel(const StepArguments<T, C> a) {
#if LAB_SM90
  // 1. Locate: the token and its position; an idle row has none.
  auto& shared = smem<StepSmem<T, D, C>>();
  unsigned char* tiles = reinterpret_cast<unsigned char*>(&shared + 1);
  using Types = StepTypes<T, Form>;
  using Layer = typename Types::Layer;
  constexpr bool Packed = Form != Stored::plain;
  constexpr int kAddresses = sizeof(Layer) / 8;
  unsigned char* norm_weight = tiles + a.tiles * Types::kTile;
  unsigned char* row = norm_weight + a.hidden * sizeof(T);  // hidden is a multiple of 8
  auto* layers = reinterpret_cast<Layer*>(row + a.row_bytes);
  const int position = a.positions[0], id = a.ids[0], width = (a.heads.q_heads + 2 * a.heads.kv_heads) * D;
  if (position < 0) return;
  const int token = id >= 0 && id < a.vocab ? id : 0;
  const T* token_row = reinterpret_cast<const T*>(a.embed.codes) + size_t(token) * a.hidden;
  // Added to the logits: NaN if the token id is invalid.
  const float poison = id >= 0 && id < a.vocab ? 0.f : NAN;
  for (int i = threadIdx.x; i < a.layers * kAddresses; i += blockDim.x) {
    const int column = i % kAddresses;  // the table may have fewer, since one kernel serves all on a CPU
    const bool there = !Packed || column < a.columns;
    reinterpret_cast<uint64_t*>(layers)[i] =
        there ? static_cast<const uint64_t*>(a.table)[Packed ? i / kAddresses * a.columns + column : i] : 0;
  }
  for (int i = threadIdx.x; i < D; i += blockDim.x)
    shared.attention.cos_sin[i] = a.cos_sin[size_t(position) * D + i];
  // Bytes of a layer's K and V in the cache.
  const int64_t kv_bytes = int64_t(position) * 2 * a.heads.kv_heads * D * int(sizeof(C));
  typename Types::Ring ring(shared.ring, tiles, a.tiles, kv_bytes <= a.few_up_to ? 1 : 2);
  StepAttention<T, D, C> attention(shared.attention, reinterpret_cast<float*>(row), a.heads, a, position);
  StepTrace& trace = shared.ring;
  if (threadIdx.x == 0) ring.init(), trace.start(a, a.layers);
  __syncthreads();

  // For each phase: its matrix (w, the number of outputs, k, and how many rows of w an output has); then the
  // bias that it adds, and the row that its results go to.
  const auto matrix_of = [&](int i, StepPhase phase) -> typename Types::StepMatrix {
    const auto plain = [&]() -> Matrix<T> {
      switch (phase) {
        case kQkv: return {layers[i].wqkv, width, a.hidden, 1};
        case kO: return {layers[i].wo, a.hidden, a.heads.q_heads * D, 1};
        case kGateUp: return {layers[i].w_gate_up, a.intermediate, a.hidden, 2};
        case kDown: return {layers[i].w_down, a.hidden, a.intermediate, 1};
        default:
          return {reinterpret_cast<const T*>(a.lm_head.codes), OfARank ? a.head_rows : a.vocab, a.hidden, 1};
      }
    };
    if constexpr (!Packed) {
      return plain();
    } else {
      const auto packed = [&]() -> PackedMatrix<T> {
        if (phase == kLmHead) return {plain(), a.lm_head.scales, a.lm_head.format};
        return {plain(), (&layers[i].wqkv_scales)[phase], layers[i].format(phase)};
      };
      typename Types::StepMatrix m{packed()};
      if constexpr (Form == Stored::mixed) {
        if (phase == kQkv && layers[i].wk_and_wv.w[0]) {
          m.n = a.heads.q_heads * D;
          m.more = &layers[i].wk_and_wv, m.more_rows = a.heads.kv_heads * D;
          m.more_formats = uint32_t(layers[i].formats >> 32);
        }
      }
      return m;
    }
  };
  const auto bias_of = [&](const Layer& layer, StepPhase phase) -> const T* {
    if (phase == kQkv) return layer.bqkv;
    return phase == kO ? layer.bo : nullptr;
  };
  const auto output_of = [&](StepPhase phase) -> uint64_t* {
    if (phase == kQkv) return a.qkv;
    return phase == kGateUp ? a.act : a.h;
  };
  const auto phase_at = [&](int product) {
    return product == 4 * a.layers ? kLmHead : StepPhase(product % 4);
  };

  // 2. Load ahead: one thread issues the copies of everything that the step reads, as tiles of the ring
  // become free.
  if (threadIdx.x >= kRingThreads) {
    if (threadIdx.x > kRingThreads) return;
    for (int product = 0; product <= 4 * a.layers; ++product) {
      const int i = product / 4;  // the layer
      const StepPhase phase = phase_at(product);
      if (phase == kO) attention.issue(ring, i);
      // The norms' weights are few bytes, but without the prefetch each would be a wait for DRAM.
      if (phase == kQkv && blockIdx.x == 0 && i + 1 < a.layers) {
        bulk_prefetch_l2(layers[i + 1].attn_norm, a.hidden * sizeof(T));
        bulk_prefetch_l2(layers[i + 1].mlp_norm, a.hidden * sizeof(T));
      }
      ring.issue(matrix_of(i, phase));
    }
    return;
  }

  // 3. Layers: all blocks that take part in a phase wait for the row that the phase before wrote. A block
  // without a share of a phase's outputs must not read that row, because the row may be overwritten without
  // waiting for such a block. All matrix products use one copy of the code: five copies are more than the
  // instruction cache holds.
  uint32_t tag = a.counters[kTag];  // the last tag of the launch before
  StepPeers<OfARank> peers(a.peers, a.layers);
  const TaggedRow<T> h{a.h, ++tag};  // the residual
  TaggedRow<T> last = h;             // the row that was written last
  StepRow<T, Types::kSpan> x{reinterpret_cast<T*>(row), reinterpret_cast<T*>(norm_weight), shared.squares,
                             1.f / a.hidden};
  uint64_t best = 0;
  const Share owned = ring.share(a.hidden);  // of the embedding
  for (int n = owned.first + 2 * int(threadIdx.x); n < owned.last; n += 2 * kRingThreads) {
    float two[2];
    token_elements<Packed>(two, a, token_row, token, n);
    h.store(n, two[0], two[1]);
  }
  ring_sync();  // own() reads what other threads wrote
  trace.end_phase();
  x.start(layers[0].attn_norm, a.hidden);
  for (int product = 0; product <= 4 * a.layers; ++product) {
    const int i = product / 4;  // the layer
    const StepPhase phase = phase_at(product);
    const Layer& layer = layers[phase == kLmHead ? 0 : i];
    if (phase == kO) {
      const TaggedRow<T> heads{a.attention, ++tag};
      attention.run(ring, i, last, layer.q_norm, layer.k_norm, heads, {a.partial, tag});
      last = heads;
      trace.end_phase();
    }
    const auto m = matrix_of(i, phase);
    const Share share = ring.share(m.n);
    const TaggedRow<T> to{output_of(phase), ++tag};
    const bool normed = phase != kO && phase != kDown;
    if (phase == kO) x.start(layer.mlp_norm, a.hidden);
    if (!normed) peers.next();
    if (phase == kDown) x.start(i + 1 < a.layers ? layers[i + 1].attn_norm : a.final_norm, a.hidden);
    if (!share.empty()) {
      const StepEpilogue<T, OfARank> epilogue{phase, normed, bias_of(layer, phase), poison, h, to, a.logits,
                                              best,  peers};
      const int n = share.first + int(threadIdx.x);
      const Base<T> base = n < share.last ? epilogue.load(n) : Base<T>{};
      // If DRAM is the limit, the row never arrives sooner than this, and polling for it costs L2 bandwidth:
      // 1B at 32 tokens takes 845 us without this pause, 834 with it, on an H100. (A pause between two polls
      // costs more than it saves.)
      if (ring.few > 1) wait_cycles(600);
      normed ? x.norm(last, m.k, a.heads.eps, trace) : x.copy(last, m.k, trace);
      ring.multiply(m, share, x.x, base, epilogue);
    }
    trace.end_phase();
    last = to;
  }

  // 4. Argmax in the last block: each block raises the best so far by its own best (a maximum is the same in
  // every order). The last block resets the best and the ticket to zero, and keeps the tag from which the
  // next launch counts on.
  best = warp_best(best);
  if (threadIdx.x % 32 == 0) shared.best[threadIdx.x / 32] = best;
  ring_sync();
  if (threadIdx.x > 0) return;

  for (int warp = 1; warp < kRingWarps; ++warp) best = shared.best[warp] > best ? shared.best[warp] : best;
  auto* top = reinterpret_cast<unsigned long long*>(a.counters + kBest);
  atomicMax(top, static_cast<unsigned long long>(best));
  if (take_ticket(a.counters + kTicket) != gridDim.x - 1) return trace.finish();
  const uint64_t winner = atomicExch(top, 0ull);
  a.out[0] = winner >> 32 == 0xffffffffu ? -1 : candidate_index(winner);
  atomicExch(a.counters + kTicket, 0u);
  a.counters[kTag] = tag;
  peers.finish(a.peers);
  trace.finish();
#endif
}

template <typename F>
static void by_half(int dtype, F f) {
  if (dtype == int(DType::f16)) return f(half{});
  if (dtype == int(DType::bf16)) return f(bf16{});
  throw std::invalid_argument("decode_step takes float16 and bfloat16");
}

template <typename T, int D, Stored Form, bool OfARank, typename C>
static void launch_step(const DecodeStepArgs& a) {
  const auto packed_weights = [](const Weights& w) {
    return PackedWeights{as<const uint8_t>(w.data), as<const uint8_t>(w.scales), w.format};
  };
  using Types = StepTypes<T, Form>;
  const int longest = std::max({a.sizes.hidden, a.sizes.intermediate, a.q_heads * D});
  const int columns = Types::kSpan > 0 ? round_up(longest, Types::kSpan) : longest;
  const int row_bytes = std::max(round_up(columns * int(sizeof(T)), 16),
                                 StepAttention<T, D, C>::sums_bytes(a.q_heads / a.cache.kv_heads));
  const int fixed = int(sizeof(StepSmem<T, D, C>)) + a.sizes.hidden * int(sizeof(T)) + row_bytes +
                    a.sizes.layers * int(sizeof(typename Types::Layer));
  const int tiles = std::min(kMostTiles, (most_shared_bytes() - fixed) / Types::kTile);
  if (tiles < kMostInFlight) {
    throw std::invalid_argument(
        "decode_step: rows of " + std::to_string(longest) +
        " elements leave this GPU's shared memory no room for tiles (use --plan fused)");
  }
  // Two tiles in flight in each block keep an H100's DRAM busy. If a layer is not much larger than the
  // rings, the chain of phases takes longer than DRAM, and with one tile in flight its loads and stores
  // queue less behind the copies (Qwen3-0.6B at 1024 tokens: 650 us with two, 630 with one). At 8192
  // tokens, where K and V have as many bytes as the weights, one tile is too few.
  const int64_t few_up_to = int64_t(tiles) * Types::kTile * multiprocessors() * 3 / 2 - a.sizes.layer_bytes;
  StepArguments<T, C> s{};
  s.ids = as<const int>(a.ids);
  s.positions = as<const int>(a.positions);
  s.embed = packed_weights(a.weights.embed);
  s.table = as<const void>(a.weights.layers);
  s.columns = a.weights.columns;
  s.final_norm = as<const T>(a.weights.final_norm);
  s.lm_head = packed_weights(a.weights.lm_head);
  s.cos_sin = as<const float>(a.weights.cos_sin);
  s.logits = as<float>(a.logits);
  s.out = as<int>(a.out);
  s.h = as<uint64_t>(a.exchange.words);  // the rows follow each other; a word has two elements
  s.qkv = s.h + a.sizes.hidden / 2;
  s.attention = s.qkv + (a.q_heads + 2 * a.cache.kv_heads) * D / 2;
  s.act = s.attention + a.q_heads * D / 2;
  s.partial = s.act + a.sizes.intermediate / 2;
  s.counters = as<unsigned>(a.exchange.counters);
  if constexpr (kStepTrace) {
    s.trace = as<int64_t>(a.exchange.trace);
  } else if (a.exchange.trace) {
    throw std::invalid_argument("decode_step: this build records no times: see lab ledger --inside");
  }
  s.layers = a.sizes.layers;
  s.vocab = a.sizes.vocab;
  s.head_rows = a.sizes.head_rows;
  s.hidden = a.sizes.hidden;
  s.intermediate = a.sizes.intermediate;
  s.tiles = tiles;
  s.row_bytes = row_bytes;
  s.few_up_to = few_up_to;
  s.heads.q_heads = a.q_heads;
  s.heads.kv_heads = a.cache.kv_heads;
  s.heads.page_shift = log2_of(a.cache.page_size);
  s.heads.eps = a.eps;
  s.heads.scale_log2 = a.scale * 1.4426950408889634f;
  s.heads.table = as<const int>(a.cache.block_table);
  s.heads.layer = int64_t(a.cache.pages) * a.cache.kv_heads * a.cache.page_size * D;
  s.heads.k_cache = as<C>(a.cache.k);
  s.heads.v_cache = as<C>(a.cache.v);
  static_cast<KvScales<C>&>(s) = kv_scales<C>(a.cache);
  s.peers = a.peers;
  Config config{dim3(multiprocessors()), dim3(kRingThreads + 32), size_t(fixed + tiles * Types::kTile),
                a.stream};
  if (a.exchange.trace && int(config.grid.x) > kTraceBlocks)
    throw std::invalid_argument("decode_step: more blocks than its records have room for");
  config.cooperative = true;  // all blocks run at once, or the launch fails
  launch(config, "decode_step_kernel", decode_step_kernel<T, D, Form, OfARank, C>, s);
}

// Which kernels a launch chooses from: those for weights in any formats, or the others.
constexpr Stored kMixed = Stored::mixed, kPlainOrPacked = Stored::plain;

template <typename T, int D, Stored Form, bool OfARank, typename C>
static void launch_for_weights(const DecodeStepArgs& a) {
  if constexpr (Form == Stored::mixed) {
    // With a quantised cache one kernel serves a model on one GPU and one that several divide.
    launch_step<T, D, Stored::mixed, OfARank || kIsCode<C>, C>(a);
  } else {
    // Ranks that have a quantised cache have one kernel for plain and packed weights.
    if constexpr (!(OfARank && kIsCode<C>)) {
      if (a.weights.columns == kPlainColumns) return launch_step<T, D, Stored::plain, OfARank, C>(a);
    }
    launch_step<T, D, Stored::packed, OfARank, C>(a);
  }
}

// With activations in T and a cache that stores C: T, or the codes of a quantised cache.
template <typename T, typename C, Stored Form>
void step_of(const DecodeStepArgs& a) {
  const auto with_dim = [&](auto dim) {
    constexpr int D = decltype(dim)::value;
    // A model that several GPUs divide has a kernel of its own, because the code that adds up sums over all
    // ranks would slow the other one. On a CPU it serves both.
    if constexpr (!kHost) {
      if (a.peers.ranks <= 1) return launch_for_weights<T, D, Form, false, C>(a);
    }
    launch_for_weights<T, D, Form, true, C>(a);
  };
  switch (a.head_dim) {
    case 64: return with_dim(std::integral_constant<int, 64>{});
    case 96: return with_dim(std::integral_constant<int, 96>{});
    case 128: return with_dim(std::integral_constant<int, 128>{});
  }
  throw std::invalid_argument("decode_step: head_dim " + std::to_string(a.head_dim) +
                              " is not 64, 96 or 128");
}

// The parts that nvcc compiles one by one: setup.py finds them here, and LAB_PART is one of them.
#ifdef LAB_PART
extern template void step_of<half, half, kPlainOrPacked>(const DecodeStepArgs&);
extern template void step_of<half, half, kMixed>(const DecodeStepArgs&);
extern template void step_of<half, Fp8Code, kPlainOrPacked>(const DecodeStepArgs&);
extern template void step_of<half, Fp8Code, kMixed>(const DecodeStepArgs&);
extern template void step_of<half, Int8Code, kPlainOrPacked>(const DecodeStepArgs&);
extern template void step_of<half, Int8Code, kMixed>(const DecodeStepArgs&);
extern template void step_of<bf16, bf16, kPlainOrPacked>(const DecodeStepArgs&);
extern template void step_of<bf16, bf16, kMixed>(const DecodeStepArgs&);
extern template void step_of<bf16, Fp8Code, kPlainOrPacked>(const DecodeStepArgs&);
extern template void step_of<bf16, Fp8Code, kMixed>(const DecodeStepArgs&);
extern template void step_of<bf16, Int8Code, kPlainOrPacked>(const DecodeStepArgs&);
extern template void step_of<bf16, Int8Code, kMixed>(const DecodeStepArgs&);
template void step_of<LAB_PART>(const DecodeStepArgs&);
#endif

// weak: every part has this function, and the linker takes one of them.
__attribute__((weak)) void decode_step(const DecodeStepArgs& a) {
  if (!has_clusters())
    throw std::runtime_error("decode_step needs bulk copies (sm_90): use --plan fused on this GPU");
  by_half(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    by_cache<T>(a.cache.format, [&](auto code) {
      // On a CPU one kernel serves all weights, which saves compile time.
      if constexpr (!kHost) {
        if (a.weights.columns <= kPackedColumns) return step_of<T, decltype(code), kPlainOrPacked>(a);
      }
      step_of<T, decltype(code), kMixed>(a);
    });
  });
}
