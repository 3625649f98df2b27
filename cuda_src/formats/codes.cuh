// What the weight formats have in common: the layout of packed codes, scales, and arithmetic on pairs of
// 16-bit numbers.
//
// The layout is written out in lab/formats/format.py. In short: codes of a row come in segments; of each run of
// 32 columns lane t of four has 8 codes, of the columns 4 t .. 4 t + 3 and 16 + 4 t .. 16 + 4 t + 3. A format is a
// struct that says how these 8 codes, in one word (4 bits) or two (8 bits; 6 bits: the lower four of each code,
// and the upper two), become numbers:
//
//   kBits       of a code: 4, 6 or 8
//   kGroup      columns that share a scale; 0: the whole row
//   kSecond     whether a scale has a second entry, a minimum or a zero; kMinimum: it is a minimum
//   Scale       the type of an entry of `scales`; or Scales, if scales are stored in another way: see PlainScales
//   numbers<T>  8 codes as 4 pairs of T, exactly: the operand of a tensor core. `zero` as zero_pair() made it
//   values      8 codes as floats, before zero, scale and minimum; a loop that a CPU's compiler vectorises
#pragma once
#include "../common.cuh"
#include "../launchers/arguments.h"

namespace lab {

// The weights of a product as a kernel takes them.
struct PackedWeights {
  const uint8_t *codes, *scales;
  int format;
};

// The inputs of a product: y[b, j] = x[b] . w[j], x [rows, k], w [n, k] (or Parts * n rows of w). tiled: workspace
// for more than 8 rows (launchers/linear.h).
template <typename T>
struct PackedProduct {
  const T* x;
  T* tiled;
  PackedWeights w;
  int rows, n, k;
};

constexpr int kRunColumns = 32, kBlockRows = 8;

// Where a row's first segment (or span) lies, of `bytes` bytes; the next ones are kBlockRows * bytes further on
// each.
LAB_HOST_DEVICE size_t segment_place(size_t row, int segments, int bytes) {
  return (row / kBlockRows * segments * kBlockRows + row % kBlockRows) * bytes;
}

template <typename F>
struct PlainScales;
template <typename F, typename = void>
struct ScalesOf {
  using type = PlainScales<F>;
};
template <typename F>
struct ScalesOf<F, std::void_t<typename F::Scales>> {
  using type = typename F::Scales;
};

template <typename F>
struct Layout {
  using Scales = typename ScalesOf<F>::type;
  static constexpr int kColumns = F::kBits == 8 ? 64 : 128;  // columns in a segment
  static constexpr int kRuns = kColumns / kRunColumns;       // runs in a segment
  static constexpr int kSegmentBytes = kColumns * F::kBits / 8;
  static constexpr int kUnitWords = kSegmentBytes / 16;  // 32-bit words that a lane has of a segment
  static constexpr int kPart = F::kGroup == 0 || F::kGroup > kColumns ? kColumns : F::kGroup;
  static constexpr int kGroups = F::kGroup ? kColumns / kPart : 0;  // scales that a segment needs
  static constexpr int kRunsPerGroup = kPart / kRunColumns;         // 0: two groups share a run
  static constexpr int kSpan = Scales::kSpan;                       // segments in a span

  static LAB_HOST_DEVICE int segments(int k) {
    constexpr int kSpanColumns = kSpan * kColumns;
    return (k + kSpanColumns - 1) / kSpanColumns * kSpan;
  }
};

// What lane t has of a segment.
template <typename F>
struct UnitWords {
  uint32_t v[Layout<F>::kUnitWords];
};
// from: the segment and 16 t bytes. Shared: in shared memory; else in global memory, and read only once.
template <typename F, bool Shared = false>
LAB_DEVICE UnitWords<F> load_unit(const uint8_t* from, int t) {
  const auto* first = reinterpret_cast<const uint32_t*>(from);
  const auto words = Shared ? load(first) : load_stream(first);
  if constexpr (F::kBits == 6) {
    const auto high = load<2>(reinterpret_cast<const uint32_t*>(from + (64 - 8 * t)));
    return {{words.v[0], words.v[1], words.v[2], words.v[3], high.v[0], high.v[1]}};
  } else {
    return {{words.v[0], words.v[1], words.v[2], words.v[3]}};
  }
}
// The words of the 8 codes of a run, of those that load_unit() loaded.
template <typename F>
LAB_DEVICE Vec<uint32_t, 2> run_words(const UnitWords<F>& unit, int run) {
  if constexpr (F::kBits == 8) return {{unit.v[2 * run], unit.v[2 * run + 1]}};
  if constexpr (F::kBits == 6) return {{unit.v[run], unit.v[4 + run / 2] >> (run % 2 * 8)}};
  return {{unit.v[run], 0}};
}

// An entry of a scale from the low bits of a word.
template <typename Scale>
LAB_DEVICE float scale_of(uint32_t bits) {
  if constexpr (std::is_same_v<Scale, uint8_t>) {  // an exponent; 0 is the subnormal 2^-127
    return bit_cast<float>(bits & 0xffu ? (bits & 0xffu) << 23 : 0x00400000u);
  } else if constexpr (std::is_same_v<Scale, half>) {
    return to_float(bit_cast<half>(uint16_t(bits)));
  } else {
    return bit_cast<float>(bits);
  }
}

// The scales of one segment of a row, as they are loaded and as they are used. place: of the segment in its span.
// Here: numbers of type Scale, one or two for each group.
template <typename F>
struct PlainScales {
  using Scale = typename F::Scale;
  static constexpr int kColumns = F::kBits == 8 ? 64 : 128, kEntries = F::kSecond ? 2 : 1;
  static constexpr int kSpan = F::kGroup > kColumns ? F::kGroup / kColumns : 1;
  // Of a span of a row; if the whole row has one scale, of the row.
  static constexpr int kBytes =
      (F::kGroup ? kColumns * kSpan / F::kGroup : 1) * kEntries * int(sizeof(Scale));
  // In words; see PackedType in unpack.cuh for why not in smaller elements.
  using Word = std::conditional_t<kBytes == 2, uint16_t, uint32_t>;
  Vec<Word, kBytes / int(sizeof(Word))> words;

  // at: the span's scales.
  LAB_DEVICE void load_from(const uint8_t* at, int) {
    words = load<kBytes / int(sizeof(Word))>(reinterpret_cast<const Word*>(at));
  }
  LAB_DEVICE float scale(int group, int) const { return entry(group * kEntries); }
  LAB_DEVICE float second(int group, int) const { return entry(group * kEntries + 1); }

 private:
  LAB_DEVICE float entry(int i) const {
    constexpr int kBits = 8 * int(sizeof(Scale)), kPerWord = int(sizeof(Word) / sizeof(Scale));
    return scale_of<Scale>(uint32_t(words.v[i / kPerWord]) >> (i % kPerWord * kBits));
  }
};

// ---- pairs of 16-bit numbers ------------------------------------------------------------------------------

// a - b and a * b of both numbers of a pair, each rounded to T (exact in all uses here).
template <typename T>
LAB_DEVICE uint32_t subtract_pair(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, half>) {
    return bit_cast<uint32_t>(__hsub2(bit_cast<__half2>(a), bit_cast<__half2>(b)));
  } else {
    return bit_cast<uint32_t>(__hsub2(bit_cast<__nv_bfloat162>(a), bit_cast<__nv_bfloat162>(b)));
  }
#else
  const auto x = bit_cast<Vec<T, 2>>(a), y = bit_cast<Vec<T, 2>>(b);
  return bit_cast<uint32_t>(Vec<T, 2>{{from_float<T>(to_float(x.v[0]) - to_float(y.v[0])),
                                       from_float<T>(to_float(x.v[1]) - to_float(y.v[1]))}});
#endif
}
template <typename T>
LAB_DEVICE uint32_t multiply_pair(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, half>) {
    return bit_cast<uint32_t>(__hmul2(bit_cast<__half2>(a), bit_cast<__half2>(b)));
  } else {
    return bit_cast<uint32_t>(__hmul2(bit_cast<__nv_bfloat162>(a), bit_cast<__nv_bfloat162>(b)));
  }
#else
  const auto x = bit_cast<Vec<T, 2>>(a), y = bit_cast<Vec<T, 2>>(b);
  return bit_cast<uint32_t>(Vec<T, 2>{{from_float<T>(to_float(x.v[0]) * to_float(y.v[0])),
                                       from_float<T>(to_float(x.v[1]) * to_float(y.v[1]))}});
#endif
}

// Both numbers of a pair the same.
template <typename T>
LAB_DEVICE uint32_t pair_of(T x) {
  return bit_cast<uint32_t>(Vec<T, 2>{{x, x}});
}

// An integer in the low bits of a float whose exponent makes the last bit worth 1: kMagic + q is then one OR.
// float16 has 10 bits for q, bfloat16 has 7.
template <typename T>
struct Magic {
  static constexpr uint32_t kPair = std::is_same_v<T, half> ? 0x64006400u : 0x43004300u;
  static constexpr float kValue = std::is_same_v<T, half> ? 1024.f : 128.f;
};

}  // namespace lab
