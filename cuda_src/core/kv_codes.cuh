// A quantised KV cache: its codes and scales, and how numbers become codes and codes numbers. The formats are
// described in lab/formats/kv.py. How codes become numbers of 16 bits is in formats/fp8.cuh and int8.cuh.
#pragma once
#include "../formats/fp8.cuh"
#include "../formats/int8.cuh"

namespace lab {

// What a cache stores: T, the dtype of the heads, or one of these codes.
struct Fp8Code { uint8_t bits; };
struct Int8Code { int8_t bits; };
template <typename C> constexpr bool kIsFp8 = std::is_same_v<C, Fp8Code>;
template <typename C> constexpr bool kIsInt8 = std::is_same_v<C, Int8Code>;
template <typename C> constexpr bool kIsCode = kIsFp8<C> || kIsInt8<C>;

// The scales of a cache: none, one number for all of K and one for all of V, or [pages, kv_heads, page_size].
template <typename C>
struct KvScales {};
template <>
struct KvScales<Fp8Code> {
  const float *k, *v;
};
template <>
struct KvScales<Int8Code> {
  half *k, *v;
};

// cache: the argument of a launcher that names a cache, such as CachePages.
template <typename C, typename Cache>
KvScales<C> kv_scales(const Cache& cache) {
  if constexpr (kIsFp8<C>) {
    return {as<const float>(cache.k_scales), as<const float>(cache.v_scales)};
  } else if constexpr (kIsInt8<C>) {
    return {as<half>(cache.k_scales), as<half>(cache.v_scales)};
  } else {
    return {};
  }
}

// Calls f with a value of the type that a cache of heads in T stores. In f: `using C = decltype(code);`
template <typename T, typename F>
inline void by_cache(int format, F&& f) {
  switch (KvFormat(format)) {
    case KvFormat::plain: return f(T{});
    case KvFormat::fp8: return f(Fp8Code{});
    case KvFormat::int8: return f(Int8Code{});
  }
  throw std::invalid_argument("unknown format of a KV cache: " + std::to_string(format));
}

// ---- codes to numbers -------------------------------------------------------------------------------------

// 8 codes, in two words, as 4 pairs of T: of each word first bytes 0 and 2, then bytes 1 and 3.
template <typename C, typename T>
LAB_DEVICE void pairs_of(uint32_t (&pairs)[4], uint32_t first, uint32_t second) {
  const uint32_t words[2] = {first, second};
  if constexpr (kIsFp8<C>) {
    Fp8<0>::numbers<T>(pairs, words, 0);
  } else {
    Int8<0>::numbers<T>(pairs, words, 0);
  }
}
LAB_DEVICE float number_of(Fp8Code code) {
  const uint32_t bits = code.bits;
  return bit_cast<float>((bits & 0x80u) << 24 | (bits & 0x7fu) << 20) * 0x1p120f;
}
LAB_DEVICE float number_of(Int8Code code) { return float(code.bits); }

// ---- numbers to codes -------------------------------------------------------------------------------------

// x / scale as e4m3, rounded to nearest even; +-448 where it is larger or NaN.
LAB_DEVICE Fp8Code fp8_code(float x, float scale) {
  float y = x / scale;
  y = y < 448.f ? y : 448.f;
  y = y > -448.f ? y : -448.f;
  const uint32_t bits = bit_cast<uint32_t>(y), magnitude = bits & 0x7fffffffu;
  // Numbers with a leading one: the exponent's bias is 7, not 127, and 20 bits of the mantissa are rounded off.
  const uint32_t normal = (magnitude - (120u << 23) + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
  // The others are multiples of 2^-9: that is what the sum with 2^14 is rounded to.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 16384.f) - 0x46800000u;
  return {uint8_t((magnitude < 0x3c800000u ? subnormal : normal) | (bits >> 24 & 0x80u))};
}

// |x| as an integer. Integers compare as the numbers do, and NaN is above all numbers.
LAB_DEVICE uint32_t magnitude_of(float x) { return bit_cast<uint32_t>(x) & 0x7fffffffu; }
// The scale of a head whose numbers have magnitudes up to `most` in this lane: of W consecutive lanes.
template <int W>
LAB_DEVICE half int8_scale(uint32_t most) {
  LAB_UNROLL
  for (int s = W / 2; s > 0; s >>= 1) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, most, s);
    most = most > other ? most : other;
  }
  return from_float<half>(bit_cast<float>(most) / 127.f);
}
// x / scale as an integer within +-127, rounded to nearest even; 0 where the scale is 0, infinite or NaN.
LAB_DEVICE Int8Code int8_code(float x, half scale) {
  const float divisor = to_float(scale);
  const bool usable = divisor > 0.f && divisor < INFINITY;
  const float y = usable ? x / divisor : 0.f;
  // In the sum with 1.5 * 2^23 the last bit counts 1.
  const int rounded = int(bit_cast<uint32_t>(y + 12582912.f) - 0x4b400000u);
  return {int8_t(rounded > 127 ? 127 : rounded < -127 ? -127 : rounded)};
}
// Codes of a head, of which each of L consecutive lanes has N numbers x: in fp8 by the layer's scale; in int8 by
// one of the head's own, which is returned. All lanes of the warp must call it.
template <int L, typename C, typename T, int N>
LAB_DEVICE half head_codes(Vec<C, N>& codes, const Vec<T, N>& x, [[maybe_unused]] float of_layer) {
  half scale{};
  if constexpr (kIsFp8<C>) {
    LAB_UNROLL
    for (int e = 0; e < N; ++e) codes.v[e] = fp8_code(to_float(x.v[e]), of_layer);
  } else {
    uint32_t most = 0;
    LAB_UNROLL
    for (int e = 0; e < N; ++e) most = max(most, magnitude_of(to_float(x.v[e])));
    scale = int8_scale<L>(most);
    LAB_UNROLL
    for (int e = 0; e < N; ++e) codes.v[e] = int8_code(to_float(x.v[e]), scale);
  }
  return scale;
}

}  // namespace lab
