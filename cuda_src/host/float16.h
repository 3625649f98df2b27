// __half and __nv_bfloat16 with CUDA's names, sizes and rounding (to nearest even; every NaN becomes 0x7fff).
//
// Conversions have no branches, so that loops over them vectorise. Arithmetic is done in float and rounded
// once, as in hardware.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vector_types.h"

namespace lab {
namespace host {

inline uint32_t float_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  return u;
}
inline float bits_float(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

inline float bf16_to_float(uint16_t bits) { return bits_float(uint32_t(bits) << 16); }

inline uint16_t float_to_bf16(float f) {
  uint32_t u = float_bits(f);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // half a unit in the last place, ties to even
  return (u & 0x7fffffffu) > 0x7f800000u ? uint16_t(0x7fff) : uint16_t(rounded);
}

#if defined(__FLT16_MANT_DIG__) && (defined(__F16C__) || defined(__aarch64__))
inline float half_to_float(uint16_t bits) {
  _Float16 h;
  memcpy(&h, &bits, sizeof h);
  return float(h);
}
inline uint16_t float_to_half(float f) {
  _Float16 h = _Float16(f);
  uint16_t bits;
  memcpy(&bits, &h, sizeof bits);
  return f != f ? uint16_t(0x7fff) : bits;
}
#else
inline float half_to_float(uint16_t bits) {
  uint32_t sign = uint32_t(bits & 0x8000) << 16;
  uint32_t magnitude = bits & 0x7fffu;
  // Normal numbers: move exponent and mantissa to a float's places, with the largest exponent bias that still
  // maps infinity to infinity, then scale back. Subnormals: build 0.5 + m * 2^-24 and subtract 0.5.
  float normal =
      bits_float((magnitude << 13) + (uint32_t(255 - 31) << 23)) * bits_float(uint32_t(127 - 112) << 23);
  float subnormal = bits_float((126u << 23) | magnitude) - 0.5f;
  return bits_float(sign | float_bits(magnitude < 0x400u ? subnormal : normal));
}
inline uint16_t float_to_half(float f) {
  uint32_t u = float_bits(f);
  uint32_t sign = (u >> 16) & 0x8000u;
  uint32_t magnitude = u & 0x7fffffffu;
  // Normal numbers: change the exponent's bias and round off 13 bits; a carry increments the exponent, up to
  // infinity.
  uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormals (below 2^-14): adding 0.5 makes the float addition round to a multiple of 2^-24.
  uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - (126u << 23);
  uint32_t bits = magnitude < 0x38800000u ? subnormal : normal;
  bits = magnitude >= 0x47800000u ? 0x7c00u : bits;  // 65536 and above
  bits = magnitude > 0x7f800000u ? 0x7fffu : (bits | sign);
  return uint16_t(bits);
}
#endif

}  // namespace host
}  // namespace lab

namespace lab {
namespace host {

struct HalfFormat {
  static float decode(uint16_t bits) { return half_to_float(bits); }
  static uint16_t encode(float f) { return float_to_half(f); }
};
struct Bfloat16Format {
  static float decode(uint16_t bits) { return bf16_to_float(bits); }
  static uint16_t encode(float f) { return float_to_bf16(f); }
};

// A 16-bit float: converts from numbers and to float implicitly, as CUDA's two types do.
template <typename Format>
struct Float16 {
  uint16_t bits;

  Float16() = default;
  Float16(float f) : bits(Format::encode(f)) {}
  Float16(double f) : bits(Format::encode(float(f))) {}
  template <typename I, typename = std::enable_if_t<std::is_integral<I>::value>>
  Float16(I i) : bits(Format::encode(float(i))) {}
  operator float() const { return Format::decode(bits); }

  static Float16 from_bits(uint16_t b) {
    Float16 f;
    f.bits = b;
    return f;
  }

  friend Float16 operator+(Float16 a, Float16 b) { return float(a) + float(b); }
  friend Float16 operator-(Float16 a, Float16 b) { return float(a) - float(b); }
  friend Float16 operator*(Float16 a, Float16 b) { return float(a) * float(b); }
  friend Float16 operator/(Float16 a, Float16 b) { return float(a) / float(b); }
  friend Float16 operator-(Float16 a) { return from_bits(uint16_t(a.bits ^ 0x8000)); }
  friend Float16& operator+=(Float16& a, Float16 b) { return a = a + b; }
  friend Float16& operator-=(Float16& a, Float16 b) { return a = a - b; }
  friend Float16& operator*=(Float16& a, Float16 b) { return a = a * b; }
  friend Float16& operator/=(Float16& a, Float16 b) { return a = a / b; }
  friend bool operator==(Float16 a, Float16 b) { return float(a) == float(b); }
  friend bool operator!=(Float16 a, Float16 b) { return float(a) != float(b); }
  friend bool operator<(Float16 a, Float16 b) { return float(a) < float(b); }
  friend bool operator>(Float16 a, Float16 b) { return float(a) > float(b); }
  friend bool operator<=(Float16 a, Float16 b) { return float(a) <= float(b); }
  friend bool operator>=(Float16 a, Float16 b) { return float(a) >= float(b); }

  friend Float16 __hadd(Float16 a, Float16 b) { return a + b; }
  friend Float16 __hsub(Float16 a, Float16 b) { return a - b; }
  friend Float16 __hmul(Float16 a, Float16 b) { return a * b; }
  friend Float16 __hfma(Float16 a, Float16 b, Float16 c) { return double(float(a)) * float(b) + float(c); }
  friend Float16 __hmax(Float16 a, Float16 b) { return a > b || b != b ? a : b; }
  friend Float16 __hmin(Float16 a, Float16 b) { return a < b || b != b ? a : b; }
};

// A pair, 4 bytes.
template <typename T>
struct alignas(4) Float16x2 {
  T x, y;

  Float16x2() = default;
  Float16x2(T a, T b) : x(a), y(b) {}

  friend Float16x2 operator+(Float16x2 a, Float16x2 b) { return {a.x + b.x, a.y + b.y}; }
  friend Float16x2 operator-(Float16x2 a, Float16x2 b) { return {a.x - b.x, a.y - b.y}; }
  friend Float16x2 operator*(Float16x2 a, Float16x2 b) { return {a.x * b.x, a.y * b.y}; }
  friend Float16x2 __hadd2(Float16x2 a, Float16x2 b) { return a + b; }
  friend Float16x2 __hsub2(Float16x2 a, Float16x2 b) { return a - b; }
  friend Float16x2 __hmul2(Float16x2 a, Float16x2 b) { return a * b; }
  friend Float16x2 __hfma2(Float16x2 a, Float16x2 b, Float16x2 c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
  }
  friend float __low2float(Float16x2 v) { return v.x; }
  friend float __high2float(Float16x2 v) { return v.y; }
};

}  // namespace host
}  // namespace lab

using __half = lab::host::Float16<lab::host::HalfFormat>;
using __half2 = lab::host::Float16x2<__half>;
using __nv_bfloat16 = lab::host::Float16<lab::host::Bfloat16Format>;
using __nv_bfloat162 = lab::host::Float16x2<__nv_bfloat16>;
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline float __half2float(__half h) { return float(h); }
inline __half __float2half(float f) { return __half(f); }
inline __half __float2half_rn(float f) { return __half(f); }
inline __half2 __float2half2_rn(float f) { return {__half(f), __half(f)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half2 __half2half2(__half a) { return {a, a}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline __half __ushort_as_half(unsigned short u) { return __half::from_bits(u); }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }

inline float __bfloat162float(__nv_bfloat16 b) { return float(b); }
inline __nv_bfloat16 __float2bfloat16(float f) { return __nv_bfloat16(f); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return __nv_bfloat16(f); }
inline __nv_bfloat162 __float2bfloat162_rn(float f) { return {__nv_bfloat16(f), __nv_bfloat16(f)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__nv_bfloat16(a), __nv_bfloat16(b)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {float(v.x), float(v.y)}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return {a, a}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) { return __nv_bfloat16::from_bits(u); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
