// common.cuh's names on a CPU: each is computed for a whole warp at once, by the last lane that arrives. What
// each name means, and its arguments, is documented there.
#pragma once
#include "float16.h"
#include "intrinsics.h"
#include "runtime.h"

namespace lab {

constexpr bool kHost = true;

// ---- shared memory ----------------------------------------------------------------------------------------

template <typename S>
LAB_NO_TSAN inline S& smem() {
  static_assert(alignof(S) <= 128, "shared memory is aligned to 128 bytes");
  const host::BlockInfo* block = host::current->block;
  if (sizeof(S) > block->smem_bytes) {
    host::fail("smem<S>() needs %zu bytes of shared memory, the launch gave %zu", sizeof(S),
               block->smem_bytes);
  }
  return *reinterpret_cast<S*>(block->smem);
}

inline void prefetch_l2(const void*) {}

inline void cp_async16(void* dst, const void* src, bool valid = true, host::Site site = host::Site::here()) {
  host::cp_async(dst, src, 16, valid ? 16 : 0, site);
}
inline void cp_async_commit() { host::cp_async_commit(); }
template <int N>
inline void cp_async_wait() {
  host::cp_async_wait(N);
}

// ---- barriers and reductions ------------------------------------------------------------------------------

inline void named_barrier(int id, int threads, host::Site site = host::Site::here()) {
  host::barrier(id, threads, 0, "named_barrier", site);
}

namespace host {

struct AddFloat {
  static float apply(float a, float b) { return a + b; }
};
struct MaxFloat {
  static float apply(float a, float b) { return lab_host_fmaxf(a, b); }
};

// The butterfly of xor-shuffles: at distance W/2, W/4 ... 1, each lane combines its value with that of its
// partner.
template <int W, int N, typename Op>
LAB_NO_TSAN inline void combine_butterfly(Warp& warp, uint32_t) {
  float now[32][N], next[32][N];
  for (int lane = 0; lane < 32; ++lane) memcpy(now[lane], warp.in[lane].bytes, sizeof now[lane]);
  for (int distance = W / 2; distance > 0; distance /= 2) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < N; ++i) next[lane][i] = Op::apply(now[lane][i], now[lane ^ distance][i]);
    }
    memcpy(now, next, sizeof now);
  }
  for (int lane = 0; lane < 32; ++lane) memcpy(warp.out[lane].bytes, now[lane], sizeof now[lane]);
}

template <int W, typename Op, int N>
LAB_NO_TSAN inline void reduce(float* v, const char* op, Site site) {
  static_assert(W >= 1 && W <= 32 && (W & (W - 1)) == 0, "groups are a power of two of lanes");
  constexpr int kChunk = N < 16 ? N : 16;  // as many as fit in a slot
  if constexpr (W > 1) {
    struct Values { float v[kChunk]; };
    Values values;
    memcpy(&values, v, sizeof values);
    values = exchange<Values>(0xffffffffu, values, combine_butterfly<W, kChunk, Op>, op, site);
    memcpy(v, &values, sizeof values);
    if constexpr (N > kChunk) reduce<W, Op, N - kChunk>(v + kChunk, op, site);
  }
}

}  // namespace host

template <int W>
inline float group_sum(float v, host::Site site = host::Site::here()) {
  host::reduce<W, host::AddFloat, 1>(&v, "group_sum", site);
  return v;
}
template <int W, int N>
inline void group_sum(float (&v)[N], host::Site site = host::Site::here()) {
  host::reduce<W, host::AddFloat, N>(v, "group_sum", site);
}
template <int W>
inline float group_max(float v, host::Site site = host::Site::here()) {
  host::reduce<W, host::MaxFloat, 1>(&v, "group_max", site);
  return v;
}
template <int W, int N>
inline void group_max(float (&v)[N], host::Site site = host::Site::here()) {
  host::reduce<W, host::MaxFloat, N>(v, "group_max", site);
}

// ---- tensor cores -----------------------------------------------------------------------------------------

namespace host {

struct MmaFragments {
  float d[4];
  uint32_t a[4], b[2];
};
struct MmaResult { float d[4]; };

template <typename T>
LAB_NO_TSAN inline void combine_mma(Warp& warp, uint32_t) {
  float a[16][16], b[16][8], d[16][8];
  auto element = [](uint32_t pair, int which) { return float(T::from_bits(uint16_t(pair >> (16 * which)))); };
  for (int lane = 0; lane < 32; ++lane) {
    MmaFragments f = get<MmaFragments>(warp.in[lane]);
    int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      a[g][t + i] = element(f.a[0], i);
      a[g + 8][t + i] = element(f.a[1], i);
      a[g][t + 8 + i] = element(f.a[2], i);
      a[g + 8][t + 8 + i] = element(f.a[3], i);
      b[t + i][g] = element(f.b[0], i);
      b[t + 8 + i][g] = element(f.b[1], i);
      d[g][t + i] = f.d[i];
      d[g + 8][t + i] = f.d[2 + i];
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int col = 0; col < 8; ++col) d[row][col] += a[row][k] * b[k][col];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    int g = lane / 4, t = lane % 4 * 2;
    put(warp.out[lane], MmaResult{{d[g][t], d[g][t + 1], d[g + 8][t], d[g + 8][t + 1]}});
  }
}

// in: each lane's address of one row of one tile.
template <bool Transposed>
LAB_NO_TSAN inline void combine_ldmatrix(Warp& warp, uint32_t) {
  for (int lane = 0; lane < 32; ++lane) {
    uint32_t r[4];
    int g = lane / 4, t = lane % 4 * 2;
    for (int tile = 0; tile < 4; ++tile) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        int row = Transposed ? t + i : g, col = Transposed ? g : t + i;
        memcpy(&pair[i], get<const char*>(warp.in[tile * 8 + row]) + 2 * col, 2);
      }
      r[tile] = pair[0] | uint32_t(pair[1]) << 16;
    }
    memcpy(warp.out[lane].bytes, r, sizeof r);
  }
}

template <bool Transposed>
LAB_NO_TSAN inline void ldmatrix(uint32_t (&r)[4], const void* row, Site site) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    fail("ldmatrix at %s:%d: a row must be 16-byte aligned", site.file, site.line);
  }
  struct Registers { uint32_t r[4]; };
  read_shared(row, 16);
  Registers out = exchange<Registers>(0xffffffffu, row, combine_ldmatrix<Transposed>, "ldmatrix", site);
  memcpy(r, out.r, sizeof out.r);
}

template <typename T>
LAB_NO_TSAN inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  MmaFragments f;
  memcpy(f.d, d, sizeof f.d);
  memcpy(f.a, a, sizeof f.a);
  memcpy(f.b, b, sizeof f.b);
  MmaResult result = exchange<MmaResult>(0xffffffffu, f, combine_mma<T>, "mma_m16n8k16", site);
  memcpy(d, result.d, sizeof result.d);
}

}  // namespace host

inline float load_now(const float* p) { return *p; }

template <uint32_t Mask, uint32_t Bits>
inline uint32_t cut_into(uint32_t word) {
  return (word & Mask) | Bits;
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half,
                         host::Site site = host::Site::here()) {
  host::mma<__half>(d, a, b, site);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16,
                         host::Site site = host::Site::here()) {
  host::mma<__nv_bfloat16>(d, a, b, site);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, host::Site site = host::Site::here()) {
  host::ldmatrix<false>(r, row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, host::Site site = host::Site::here()) {
  host::ldmatrix<true>(r, row, site);
}

// ---- Hopper -----------------------------------------------------------------------------------------------

inline void pdl_wait() { host::pdl_wait(); }
inline void pdl_launch_dependents() {}

using mbarrier = uint64_t;

inline void mbarrier_init(mbarrier* bar, unsigned arrivals, host::Site site = host::Site::here()) {
  host::mbarrier_init(bar, arrivals, site);
}
inline void mbarrier_fence_init() {}
inline void mbarrier_arrive(mbarrier* bar, host::Site site = host::Site::here()) {
  host::mbarrier_arrive(bar, 0, site);
}
inline void mbarrier_arrive_expect_tx(mbarrier* bar, unsigned bytes, host::Site site = host::Site::here()) {
  host::mbarrier_arrive(bar, bytes, site);
}
inline void mbarrier_wait(mbarrier* bar, unsigned parity, host::Site site = host::Site::here()) {
  host::mbarrier_wait(bar, parity, site);
}
template <bool Once = true>
inline void bulk_copy_g2s(void* dst, const void* src, unsigned bytes, mbarrier* bar,
                          host::Site site = host::Site::here()) {
  host::bulk_copy(dst, src, bytes, bar, site);
}
inline void bulk_prefetch_l2(const void*, unsigned) {}

inline void cluster_sync(host::Site site = host::Site::here()) { host::cluster_barrier(site); }
inline unsigned cluster_size() { return host::current->block->cluster_size; }
inline unsigned cluster_rank() { return host::current->block->cluster_rank; }
template <typename T>
inline T* cluster_peer(T* p, unsigned rank) {
  return static_cast<T*>(host::cluster_peer(p, rank));
}

}  // namespace lab
