// sample: the next token of each row: the argmax, or a seeded draw after temperature, top-k, top-p and min-p
//
//   logits [rows, vocab] float32   positions [rows] int32   out [rows] int32
//   mapping   one block per row; thread i takes vectors i, i + threads, ... of it
//   traffic   logits once when greedy; again for each digit of a threshold and for the draw, mostly
//             from L2
//   contract  lab/ops/sample.py          twin  triton_kernels/sample.py
//
// Draw: l = logit / temperature. Top-k keeps l >= the k-th largest. Of those, top-p keeps l >= t, with the
// largest t for which the kept mass is at least top_p of their mass. Of those, min-p keeps l >= max(l) +
// log(min_p). The token is the argmax over the kept of l + g, where g = -log(-log(u)) (the Gumbel-max trick).
// Noise: Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).
//
// Thresholds are found digit by digit on integers that order as the floats do, and sums are integers: this is
// exact, and the same in every order of additions.
#include "common.cuh"
#include "core/candidate.cuh"
#include "launchers/sample.h"
#include "sizes.h"

using namespace lab;

constexpr int kThreads = kHost ? 128 : 512;
constexpr int kAhead = 8;         // vectors that a thread has on the way when greedy
constexpr int kTableColumns = 6;  // of a row's own parameters: see lab/ops/sample.py
constexpr int kDigits = 256;      // a key is four digits of 8 bits
// Of each counter: the lanes of a warp seldom add to the same one.
constexpr int kCopies = 8;

struct SampleSmem {
  // 64-bit counters in two parts: atomics in shared memory are 32 bits wide.
  uint32_t low[kCopies * kDigits], high[kCopies * kDigits];
  uint64_t best[kThreads / 32];
  uint64_t above;  // weight of all keys above the digit found
  uint64_t target;
  uint32_t prefix;  // the digits found so far
};

// The largest of the threads' values; every thread gets it.
LAB_DEVICE uint64_t block_largest(uint64_t v, SampleSmem& s) {
  v = warp_best(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.best[threadIdx.x / 32] = v;
  __syncthreads();
  for (int warp = 0; warp < kThreads / 32; ++warp) v = s.best[warp] > v ? s.best[warp] : v;
  return v;
}

LAB_DEVICE void add_weight(SampleSmem& s, uint32_t digit, uint64_t weight) {
  const uint32_t counter = threadIdx.x % kCopies * kDigits + digit;
  const uint32_t low = uint32_t(weight), before = atomicAdd(&s.low[counter], low);
  const uint32_t high = uint32_t(weight >> 32) + (before + low < before);  // with the carry
  if (high != 0) atomicAdd(&s.high[counter], high);
}

// Finds the largest key t for which the weights of all keys >= t sum to at least target(total weight).
// visit(add) must call add(key, weight) for every element of this thread. All threads must call it; all get
// t.
template <typename Visit, typename Target>
LAB_DEVICE uint32_t select_threshold(SampleSmem& s, Visit visit, Target target) {
  if (threadIdx.x == 0) {
    s.prefix = 0;
    s.above = 0;
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < kCopies * kDigits; i += kThreads) s.low[i] = s.high[i] = 0;
    __syncthreads();
    const uint32_t prefix = s.prefix;
    visit([&](uint32_t key, uint64_t weight) {
      if (shift == 24 || key >> (shift + 8) == prefix) add_weight(s, key >> shift & 255, weight);
    });
    __syncthreads();
    // One warp finds the digit: lane i owns 8 digits, and gets the weight above them from a sum over the
    // higher lanes.
    if (threadIdx.x < 32) {
      constexpr int kOwn = kDigits / 32;
      const int lane = threadIdx.x;
      uint64_t weights[kOwn], own = 0;
      for (int i = 0; i < kOwn; ++i) {
        weights[i] = 0;
        for (int copy = 0; copy < kCopies; ++copy) {
          const int counter = copy * kDigits + lane * kOwn + i;
          weights[i] += (uint64_t(s.high[counter]) << 32) + s.low[counter];
        }
        own += weights[i];
      }
      uint64_t from_here = own;  // the weight of this lane and of all higher ones
      for (int distance = 1; distance < 32; distance <<= 1) {
        const uint64_t other = __shfl_down_sync(0xffffffffu, from_here, distance);
        if (lane + distance < 32) from_here += other;
      }
      const uint64_t total = __shfl_sync(0xffffffffu, from_here, 0);
      const uint64_t wanted = shift == 24 ? target(total) : s.target;
      uint64_t above = (shift == 24 ? 0 : s.above) + from_here - own;
      __syncwarp();  // all lanes have read what one of them overwrites below
      if (lane == 0) s.target = wanted;
      bool found = false;
      for (int i = kOwn - 1; i >= 0; --i) {
        if (!found && above < wanted && above + weights[i] >= wanted) {
          s.prefix = prefix << 8 | uint32_t(lane * kOwn + i);
          s.above = above;
          found = true;
        }
        above += weights[i];
      }
    }
    __syncthreads();
  }
  const uint32_t found = s.prefix;
  __syncthreads();  // all threads have read it
  return found;
}

// Calls f(token, logit) for each of this thread's tokens of a row, in rising order. `Ahead` vectors are loaded
// before the first of them is used: with one at a time the only block of a row waits for memory.
template <int N, int Ahead, typename F>
LAB_DEVICE void each_token(const float* row, int vocab, F f) {
  constexpr int kStep = kThreads * N;
  for (int i = threadIdx.x * N; i < vocab; i += Ahead * kStep) {
    Vec<float, N> ahead[Ahead];
    LAB_UNROLL
    for (int a = 0; a < Ahead; ++a)
      if (a * kStep < vocab - i) ahead[a] = load<N>(row + i + a * kStep);
    LAB_UNROLL
    for (int a = 0; a < Ahead; ++a)
      if (a * kStep < vocab - i) {
        LAB_UNROLL
        for (int e = 0; e < N; ++e) f(i + a * kStep + e, ahead[a].v[e]);
      }
  }
}

// Word 0 of Philox4x32-10.
LAB_DEVICE uint32_t philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  LAB_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// -log(-log(u)), u = ((r >> 8) + 0.5) / 2^24. Above a half, u has no exact float32, but 1 - u has.
LAB_DEVICE float gumbel(uint32_t r) {
  const uint32_t m = r >> 8;
  const float inner = m < (1u << 23) ? -logf((float(m) + 0.5f) * 0x1p-24f)
                                     : -log1pf(-(float((1u << 24) - m) - 0.5f) * 0x1p-24f);
  return -logf(inner);
}

template <int N>
__global__ void __launch_bounds__(kThreads, 1)
    sample_kernel(const float* logits, const int* positions, int* out, const int* table, int vocab,
                  float temperature, int top_k, float top_p, float min_p, uint64_t seed) {
  // 1. Locate: block r owns row r. pass(f) calls f with each token of this thread and its scaled logit l.
  auto& s = smem<SampleSmem>();
  const int row = blockIdx.x;
  logits += size_t(row) * vocab;
  const auto pass = [&](auto f) {
    each_token<N, 1>(logits, vocab, [&](int token, float logit) { f(token, logit / temperature); });
  };
  pdl_wait();
  if (table != nullptr) {
    const int* own = table + size_t(row) * kTableColumns;
    temperature = bit_cast<float>(own[0]);
    top_k = own[1];
    top_p = bit_cast<float>(own[2]);
    min_p = bit_cast<float>(own[3]);
    seed = uint64_t(uint32_t(own[5])) << 32 | uint32_t(own[4]);
  }

  // 2. Greedy: the largest value, of equals the one with the lowest index. NaN counts as the largest and
  // gives no token.
  uint32_t largest = 0;
  int first = 0;
  const auto compare = [&](int token, float l) {  // tokens rise, so of equal ones the first stays
    const uint32_t key = order_key(l);
    if (key > largest) {
      largest = key;
      first = token;
    }
  };
  if (temperature > 0.f)
    pass(compare);
  else
    each_token<N, kAhead>(logits, vocab, compare);
  uint64_t best = block_largest(uint64_t(largest) << 32 | uint32_t(~first), s);
  const uint32_t top = uint32_t(best >> 32);
  if (temperature == 0.f || top == 0xffffffffu) {
    if (threadIdx.x == 0) out[row] = top == 0xffffffffu ? -1 : candidate_index(best);
    return;
  }

  // 3. Top-k threshold: each token weighs 1, and a weight of k is wanted; all tokens with the k-th largest
  // value are kept.
  uint32_t lowest = 0;
  if (0 < top_k && top_k < vocab) {
    lowest = select_threshold(
        s, [&](auto add) { pass([&](int, float l) { add(order_key(l), 1); }); },
        [&](uint64_t) { return uint64_t(top_k); });
  }

  // 4. Top-p threshold: a token weighs exp(l - max) in units of 2^-40; wanted is top_p of the weight that
  // top-k has kept.
  if (top_p < 1.f) {
    const float maximum = key_value(top);
    lowest = select_threshold(
        s,
        [&](auto add) {
          pass([&](int, float l) {
            const uint32_t key = order_key(l);
            const float mass = key < lowest ? 0.f : key == top ? 1.f : expf(l - maximum);
            if (mass > 0x1p-41f) add(key, uint64_t(mass * 0x1p40f + 0.5f));
          });
        },
        [&](uint64_t total) {
          const uint64_t wanted = uint64_t(ceil(double(top_p) * double(total)));
          return wanted < 1 ? uint64_t(1) : wanted > total ? total : wanted;
        });
  }

  // 5. Min-p threshold: tokens at least min_p as likely as the likeliest stay.
  if (min_p > 0.f) {
    const uint32_t likely = order_key(key_value(top) + logf(min_p));
    lowest = likely > lowest ? likely : lowest;
  }

  // 6. Draw: the argmax of l + Gumbel noise over the kept tokens is distributed as their softmax.
  best = 0;
  const uint32_t position = uint32_t(positions[row]), counter = table != nullptr ? 0 : row;
  pass([&](int token, float l) {
    if (order_key(l) < lowest) return;
    const uint64_t mine = candidate(l + gumbel(philox(seed, token, position, counter, 0)), token);
    best = mine > best ? mine : best;
  });
  best = block_largest(best, s);
  if (threadIdx.x == 0) out[row] = candidate_index(best);
}

void sample(const SampleArgs& a) {
  if (a.rows == 0) return;
  by_width<float>(
      [&](auto width) {
        launch({dim3(a.rows), dim3(kThreads), sizeof(SampleSmem), a.stream, true}, "sample_kernel",
               sample_kernel<decltype(width)::value>, as<const float>(a.logits), as<const int>(a.positions),
               as<int>(a.out), as<const int>(a.table), a.vocab, a.temperature, a.top_k, a.top_p, a.min_p,
               a.seed);
      },
      a.vocab);
}
