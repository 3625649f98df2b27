// What the weight formats have in common: the layout of packed codes, scales, and arithmetic on pairs of
// 16-bit numbers.
//
// The layout is written out in lab/formats/format.py. In short: codes of a row come in segments of 64 bytes;
// of each run of 32 columns lane t of four has 8 codes, of the columns 4 t .. 4 t + 3 and 16 + 4 t .. 16 + 4 t
// + 3. A format is a struct that says how these 8 codes, in one word (4 bits) or two (8 bits), become numbers:
//
//   kBits       of a code: 4 or 8
//   kGroup      columns that share a scale; 0: the whole row
//   kSecond     whether a scale has a second entry, a minimum or a zero; kMinimum: it is a minimum
//   Scale       the type of an entry of `scales`
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

// The inputs of a product: y[b, j] = x[b] . w[j], x [rows, k], w [n, k] (or Parts * n rows of w).
template <typename T>
struct PackedProduct {
  const T* x;
  PackedWeights w;
  int rows, n, k;
};

constexpr int kSegmentBytes = 64, kRunColumns = 32, kBlockRows = 8;

// Where a row's first segment lies, of `bytes` bytes; the next ones are kBlockRows * bytes further on each.
LAB_HOST_DEVICE size_t segment_place(size_t row, int segments, int bytes) {
  return (row / kBlockRows * segments * kBlockRows + row % kBlockRows) * bytes;
}

template <typename F>
struct Layout {
  static constexpr int kWords = F::kBits / 4;           // 32-bit words of 8 codes
  static constexpr int kRuns = 4 / kWords;              // runs in a segment
  static constexpr int kColumns = kRuns * kRunColumns;  // columns in a segment
  static constexpr int kEntries = F::kSecond ? 2 : 1;
  static constexpr int kScaleBytes = kEntries * int(sizeof(typename F::Scale));
  // Scales of one segment of a row, in bytes; 0 if the whole row has one.
  static constexpr int kGroups = F::kGroup ? kColumns / F::kGroup : 0;
  static constexpr int kSegmentScales = kGroups * kScaleBytes;
  static constexpr int kRunsPerGroup = F::kGroup ? F::kGroup / kRunColumns : 0;
};

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
// The same from memory. which: 0 is the scale of a group, 1 its minimum or zero.
template <typename F>
LAB_DEVICE float load_scale(const uint8_t* scales, int group, int which) {
  using Scale = typename F::Scale;
  using Bits = std::conditional_t<sizeof(Scale) == 1, uint8_t,
                                  std::conditional_t<sizeof(Scale) == 2, uint16_t, uint32_t>>;
  return scale_of<Scale>(reinterpret_cast<const Bits*>(scales)[group * Layout<F>::kEntries + which]);
}

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
