// CUDA's intrinsics and built-in variables, under their own names.
//
// Functions in which a thread waits have a hidden last argument, the place from which they were called, for
// reports.
#pragma once
#include <math.h>
#include <stdio.h>

#include <time.h>
#include <type_traits>

#include "float16.h"
#include "runtime.h"

#define threadIdx (::lab::host::current->index)
#define blockIdx (::lab::host::current->block->index)
#define blockDim (::lab::host::current->block->block_dim)
#define gridDim (::lab::host::current->block->grid_dim)
static constexpr int warpSize = 32;

// ---- barriers and fences ----------------------------------------------------------------------------------

inline void __syncthreads(lab::host::Site site = lab::host::Site::here()) {
  lab::host::barrier(0, 0, 0, "__syncthreads", site);
}
inline int __syncthreads_count(int predicate, lab::host::Site site = lab::host::Site::here()) {
  return lab::host::barrier(0, 0, predicate != 0, "__syncthreads_count", site);
}
inline int __syncthreads_or(int predicate, lab::host::Site site = lab::host::Site::here()) {
  return lab::host::barrier(0, 0, predicate != 0, "__syncthreads_or", site) != 0;
}
inline int __syncthreads_and(int predicate, lab::host::Site site = lab::host::Site::here()) {
  return lab::host::barrier(0, 0, predicate == 0, "__syncthreads_and", site) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, lab::host::Site site = lab::host::Site::here()) {
  lab::host::collective(mask, "__syncwarp", nullptr, true, site);
}
inline void __threadfence() { lab::host::thread_fence(); }
inline void __threadfence_block() { lab::host::thread_fence(); }
inline void __threadfence_system() { lab::host::thread_fence(); }
inline void __nanosleep(unsigned, lab::host::Site site = lab::host::Site::here()) {
  lab::host::spin_yield(site);
}
[[noreturn]] inline void __trap(lab::host::Site site = lab::host::Site::here()) {
  lab::host::fail("__trap() at %s:%d", site.file, site.line);
}

// ---- shuffles ---------------------------------------------------------------------------------------------

namespace lab {
namespace host {

template <typename T>
struct Shuffled {
  T value;
  int source;
};

template <typename T>
LAB_NO_TSAN inline void combine_shuffle(Warp& warp, uint32_t mask) {
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    int source = get<Shuffled<T>>(warp.in[lane]).source;
    memcpy(warp.out[lane].bytes, warp.in[source].bytes, sizeof(T));
    if (!(mask >> source & 1)) memset(warp.out[lane].bytes, 0xff, sizeof(T));  // undefined on a GPU: NaN here
  }
}

template <typename T>
LAB_NO_TSAN inline T shuffle(unsigned mask, T value, int source, const char* op, Site site) {
  return exchange<T>(mask, Shuffled<T>{value, source}, combine_shuffle<T>, op, site);
}

}  // namespace host
}  // namespace lab

// Lanes are shuffled within segments of `width` lanes, a power of two.
template <typename T>
LAB_NO_TSAN inline T __shfl_sync(unsigned mask, T value, int source, int width = 32,
                                 lab::host::Site site = lab::host::Site::here()) {
  int lane = lab::host::current->lane;
  return lab::host::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), "__shfl_sync", site);
}
template <typename T>
LAB_NO_TSAN inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                                     lab::host::Site site = lab::host::Site::here()) {
  int lane = lab::host::current->lane;
  int source = lane ^ lane_mask;
  if ((source & ~(width - 1)) > (lane & ~(width - 1))) source = lane;
  return lab::host::shuffle(mask, value, source, "__shfl_xor_sync", site);
}
template <typename T>
LAB_NO_TSAN inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                      lab::host::Site site = lab::host::Site::here()) {
  int lane = lab::host::current->lane;
  int source = (lane & (width - 1)) + int(delta) < width ? lane + int(delta) : lane;
  return lab::host::shuffle(mask, value, source, "__shfl_down_sync", site);
}
template <typename T>
LAB_NO_TSAN inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                    lab::host::Site site = lab::host::Site::here()) {
  int lane = lab::host::current->lane;
  int source = (lane & (width - 1)) >= int(delta) ? lane - int(delta) : lane;
  return lab::host::shuffle(mask, value, source, "__shfl_up_sync", site);
}

// ---- votes and integer reductions -------------------------------------------------------------------------

namespace lab {
namespace host {

LAB_NO_TSAN inline void combine_ballot(Warp& warp, uint32_t mask) {
  uint32_t votes = 0;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    if (get<int>(warp.in[lane]) != 0) votes |= 1u << lane;
  }
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) put(warp.out[__builtin_ctz(rest)], votes);
}

LAB_NO_TSAN inline void combine_match(Warp& warp, uint32_t mask) {
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    uint32_t equal = 0;
    for (uint32_t others = mask; others != 0; others &= others - 1) {
      int other = __builtin_ctz(others);
      if (get<uint64_t>(warp.in[other]) == get<uint64_t>(warp.in[lane])) equal |= 1u << other;
    }
    put(warp.out[lane], equal);
  }
}

template <typename T, typename Op>
LAB_NO_TSAN inline void combine_reduce(Warp& warp, uint32_t mask) {
  T result = get<T>(warp.in[__builtin_ctz(mask)]);
  for (uint32_t rest = mask & (mask - 1); rest != 0; rest &= rest - 1) {
    result = Op::apply(result, get<T>(warp.in[__builtin_ctz(rest)]));
  }
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) put(warp.out[__builtin_ctz(rest)], result);
}

struct Add {
  template <typename T> static T apply(T a, T b) { return a + b; }
};
struct Min {
  template <typename T> static T apply(T a, T b) { return b < a ? b : a; }
};
struct Max {
  template <typename T> static T apply(T a, T b) { return a < b ? b : a; }
};
struct And {
  template <typename T> static T apply(T a, T b) { return a & b; }
};
struct Or {
  template <typename T> static T apply(T a, T b) { return a | b; }
};
struct Xor {
  template <typename T> static T apply(T a, T b) { return a ^ b; }
};

}  // namespace host
}  // namespace lab

inline unsigned __ballot_sync(unsigned mask, int predicate, lab::host::Site site = lab::host::Site::here()) {
  return lab::host::exchange<uint32_t>(mask, int(predicate != 0), lab::host::combine_ballot, "__ballot_sync",
                                       site);
}
inline int __any_sync(unsigned mask, int predicate, lab::host::Site site = lab::host::Site::here()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, lab::host::Site site = lab::host::Site::here()) {
  return __ballot_sync(mask, predicate, site) == mask;
}
template <typename T>
inline unsigned __match_any_sync(unsigned mask, T value, lab::host::Site site = lab::host::Site::here()) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return lab::host::exchange<uint32_t>(mask, bits, lab::host::combine_match, "__match_any_sync", site);
}

#define LAB_WARP_REDUCE(name, Op)                                                              \
  template <typename T>                                                                        \
  inline T name(unsigned mask, T value, lab::host::Site site = lab::host::Site::here()) {      \
    return lab::host::exchange<T>(mask, value, lab::host::combine_reduce<T, Op>, #name, site); \
  }
LAB_WARP_REDUCE(__reduce_add_sync, lab::host::Add)
LAB_WARP_REDUCE(__reduce_min_sync, lab::host::Min)
LAB_WARP_REDUCE(__reduce_max_sync, lab::host::Max)
LAB_WARP_REDUCE(__reduce_and_sync, lab::host::And)
LAB_WARP_REDUCE(__reduce_or_sync, lab::host::Or)
LAB_WARP_REDUCE(__reduce_xor_sync, lab::host::Xor)
#undef LAB_WARP_REDUCE

// ---- atomics: relaxed, as on the GPU; ordering takes a fence ----------------------------------------------

namespace lab {
namespace host {

template <typename T>
struct Same {  // excludes a parameter from template deduction: atomicAdd(&u, 1) finds T from the pointer
  using type = T;
};

// *p = f(*p) as one atomic step; returns the old value.
template <typename T, typename F>
inline T atomic_update(T* p, F f) {
  T old, next;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    next = f(old);
  } while (!__atomic_compare_exchange(p, &old, &next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace host
}  // namespace lab

template <typename T>
inline T atomicAdd(T* p, typename lab::host::Same<T>::type v) {
  return lab::host::atomic_update(p, [v](T old) { return T(old + v); });
}
template <typename T>
inline T atomicSub(T* p, typename lab::host::Same<T>::type v) {
  return lab::host::atomic_update(p, [v](T old) { return T(old - v); });
}
template <typename T>
inline T atomicMin(T* p, typename lab::host::Same<T>::type v) {
  return lab::host::atomic_update(p, [v](T old) { return v < old ? v : old; });
}
template <typename T>
inline T atomicMax(T* p, typename lab::host::Same<T>::type v) {
  return lab::host::atomic_update(p, [v](T old) { return old < v ? v : old; });
}
template <typename T>
inline T atomicAnd(T* p, typename lab::host::Same<T>::type v) {
  return lab::host::atomic_update(p, [v](T old) { return T(old & v); });
}
template <typename T>
inline T atomicOr(T* p, typename lab::host::Same<T>::type v) {
  return lab::host::atomic_update(p, [v](T old) { return T(old | v); });
}
template <typename T>
inline T atomicXor(T* p, typename lab::host::Same<T>::type v) {
  return lab::host::atomic_update(p, [v](T old) { return T(old ^ v); });
}
template <typename T>
inline T atomicExch(T* p, typename lab::host::Same<T>::type v) {
  return lab::host::atomic_update(p, [v](T) { return v; });
}
template <typename T>
inline T atomicCAS(T* p, typename lab::host::Same<T>::type expected, typename lab::host::Same<T>::type v) {
  T seen = expected;
  __atomic_compare_exchange(p, &seen, &v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return seen;
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return lab::host::atomic_update(p, [limit](unsigned old) { return old >= limit ? 0u : old + 1; });
}
inline unsigned atomicDec(unsigned* p, unsigned limit) {
  return lab::host::atomic_update(
      p, [limit](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}

// ---- loads and stores with cache hints: hints mean nothing here -------------------------------------------

template <typename T> inline T __ldg(const T* p) { return *p; }
template <typename T> inline T __ldcg(const T* p) { return *p; }
template <typename T> inline T __ldca(const T* p) { return *p; }
template <typename T> inline T __ldcs(const T* p) { return *p; }
template <typename T> inline T __ldcv(const T* p) { return *p; }
template <typename T> inline void __stcg(T* p, typename lab::host::Same<T>::type v) { *p = v; }
template <typename T> inline void __stcs(T* p, typename lab::host::Same<T>::type v) { *p = v; }
template <typename T> inline void __stwb(T* p, typename lab::host::Same<T>::type v) { *p = v; }

// ---- math -------------------------------------------------------------------------------------------------

namespace lab {
namespace host {
template <typename A, typename B>
using Common =
    std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value, std::common_type_t<A, B>>;
}  // namespace host
}  // namespace lab

template <typename A, typename B>
constexpr lab::host::Common<A, B> min(A a, B b) {
  using T = lab::host::Common<A, B>;
  return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B>
constexpr lab::host::Common<A, B> max(A a, B b) {
  using T = lab::host::Common<A, B>;
  return T(a) < T(b) ? T(b) : T(a);
}

// The library's fmaxf is a function call; this is two instructions and vectorises. Of NaN and a number the
// result is the number, as in CUDA.
inline float lab_host_fmaxf(float a, float b) { return a > b || b != b ? a : b; }
inline float lab_host_fminf(float a, float b) { return a < b || b != b ? a : b; }
#define fmaxf lab_host_fmaxf
#define fminf lab_host_fminf

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

inline float __uint_as_float(unsigned u) { return lab::host::bits_float(u); }
inline float __int_as_float(int i) { return lab::host::bits_float(unsigned(i)); }
inline unsigned __float_as_uint(float f) { return lab::host::float_bits(f); }
inline int __float_as_int(float f) { return int(lab::host::float_bits(f)); }
inline float __int2float_rn(int i) { return float(i); }
inline float __uint2float_rn(unsigned u) { return float(u); }
inline int __float2int_rn(float f) { return int(lrintf(f)); }
inline int __float2int_rz(float f) { return int(f); }
inline unsigned __float2uint_rz(float f) { return unsigned(f); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x != 0 ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x != 0 ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  x = (x >> 16) | (x << 16);
  x = ((x & 0xff00ff00u) >> 8) | ((x & 0x00ff00ffu) << 8);
  x = ((x & 0xf0f0f0f0u) >> 4) | ((x & 0x0f0f0f0fu) << 4);
  x = ((x & 0xccccccccu) >> 2) | ((x & 0x33333333u) << 2);
  return ((x & 0xaaaaaaaau) >> 1) | ((x & 0x55555555u) << 1);
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline int __mulhi(int a, int b) { return int((int64_t(a) * b) >> 32); }
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift) {
  return unsigned((((uint64_t(hi) << 32) | lo) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
  return unsigned(((uint64_t(hi) << 32) | lo) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  uint64_t bytes = (uint64_t(y) << 32) | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned pick = selector >> (4 * i) & 0xfu;
    unsigned byte = unsigned(bytes >> (8 * (pick & 7u))) & 0xffu;
    if (pick & 8u) byte = byte & 0x80u ? 0xffu : 0u;  // replicate the sign
    result |= byte << (8 * i);
  }
  return result;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += int(int8_t(a >> (8 * i))) * int(int8_t(b >> (8 * i)));
  return c;
}
inline long long clock64() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000ll + now.tv_nsec;
}
