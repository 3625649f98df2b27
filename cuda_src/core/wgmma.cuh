// Tensor-core instructions of a Hopper warpgroup (wgmma), which multiply operands in shared memory, the left one
// also in registers; on sm_90a only. On a CPU the same names come from host/wgmma.h.
//
// An operand in shared memory is a tile of rows of 64 elements of half precision (128 bytes). It begins at a
// multiple of 1024 bytes, and the 16-byte chunk c of row r is at place c ^ (r % 8): the "128-byte swizzle", which
// spreads a column of chunks over all banks.
#pragma once
#include "../common.cuh"

// 1 where these instructions exist: in code for sm_90a, in nvcc's pass over host code, and in the CPU build.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LAB_WGMMA 1
#else
#define LAB_WGMMA 0
#endif

#ifdef __CUDACC__
namespace lab {

#if LAB_WGMMA
// Makes what this thread has written to shared memory (by cp.async too) visible to wgmma, which reads shared
// memory through another path than ordinary loads (the "async proxy"). It is visible to threads that meet
// this one at a barrier afterwards.
LAB_DEVICE void wgmma_publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Needed between any other use of d and the first wgmma on it.
LAB_DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
LAB_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N committed groups still run. For the others d is complete, and their tiles may be
// overwritten.
template <int N>
LAB_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

namespace detail {
// The matrix descriptor of a tile (PTX ISA, "Matrix descriptor"): eight rows are 1024 bytes, with the
// 128-byte swizzle.
LAB_DEVICE uint64_t wgmma_tile(const void* p) {
  return uint64_t(smem_address(p) >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}
}  // namespace detail

// d += a b^T by a warpgroup (128 threads); returns before it is done. A is 64 x 16, B is N x 16, D is 64 x N
// in float32, with N = 8 * the first extent of d. a and b point into tiles, to row 0 (of 8) at the first of
// their columns (a multiple of 16). Warp i holds the rows 16 i to 16 i + 15 of D; its d[j] has the columns
// from 8 j on, in the layout of mma_m16n8k16.
#define LAB_D(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define LAB_WGMMA_OP(TAG, TYPE, EXTENT, N, REGISTERS, A, B, ...)                                     \
  LAB_DEVICE void wgmma(float (&d)[EXTENT][4], const TAG* a, const TAG* b) {                         \
    asm volatile(                                                                                    \
        "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                               \
        "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, " A ", " B \
        ", add, 1, 1, 0, 0;\n}"                                                                      \
        : __VA_ARGS__                                                                                \
        : "l"(detail::wgmma_tile(a)), "l"(detail::wgmma_tile(b)));                                   \
  }
#define LAB_WGMMA_OPS(TAG, TYPE)                                                                            \
  LAB_WGMMA_OP(TAG, TYPE, 2, "16", LAB_R8, "%8", "%9", LAB_D(0), LAB_D(1))                                  \
  LAB_WGMMA_OP(TAG, TYPE, 4, "32", LAB_R16, "%16", "%17", LAB_D(0), LAB_D(1), LAB_D(2), LAB_D(3))           \
  LAB_WGMMA_OP(TAG, TYPE, 8, "64", LAB_R32, "%32", "%33", LAB_D(0), LAB_D(1), LAB_D(2), LAB_D(3), LAB_D(4), \
               LAB_D(5), LAB_D(6), LAB_D(7))
#define LAB_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LAB_R16 LAB_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LAB_R32 LAB_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
LAB_WGMMA_OPS(half, "f16")
LAB_WGMMA_OPS(bf16, "bf16")

// A place in a tile, for instructions of which many read one tile.
template <typename T>
struct WgmmaPlace {
  uint64_t descriptor;
  explicit LAB_DEVICE WgmmaPlace(const T* p) : descriptor(detail::wgmma_tile(p)) {}
  // elements: a multiple of 8. (The address takes the lowest bits, in units of 16 bytes, and does not overflow.)
  LAB_DEVICE WgmmaPlace operator+(int elements) const {
    WgmmaPlace place = *this;
    place.descriptor += elements / 8;
    return place;
  }
};

// The same with a in registers: a lane's four pairs of a tile of 16 rows, as mma_m16n8k16 takes them, which must
// not change before the wait. add: false begins a sum, whatever d holds.
#define LAB_WGMMA_A_OP(TAG, TYPE, EXTENT, N, REGISTERS, A, B, ADD, ...)                                      \
  LAB_DEVICE void wgmma(float (&d)[EXTENT][4], const uint32_t (&a)[4], WgmmaPlace<TAG> b, bool add = true) { \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD                                                 \
                 ", 0;\n"                                                                                    \
                 "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, {" A      \
                 "}, " B ", add, 1, 1, 0;\n}"                                                                \
                 : __VA_ARGS__                                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor), "r"(int(add)));            \
  }
#define LAB_WGMMA_A_OPS(TAG, TYPE)                                                                    \
  LAB_WGMMA_A_OP(TAG, TYPE, 2, "16", LAB_R8, "%8, %9, %10, %11", "%12", "%13", LAB_D(0), LAB_D(1))    \
  LAB_WGMMA_A_OP(TAG, TYPE, 8, "64", LAB_R32, "%32, %33, %34, %35", "%36", "%37", LAB_D(0), LAB_D(1), \
                 LAB_D(2), LAB_D(3), LAB_D(4), LAB_D(5), LAB_D(6), LAB_D(7))
LAB_WGMMA_A_OPS(half, "f16")
LAB_WGMMA_A_OPS(bf16, "bf16")

// The same wait; d, a sum of what was waited for, may be read after it. (The compiler does not know that the
// instructions run on after they have been issued, and might read d before the wait.)
template <int N, int Extent>
LAB_DEVICE void wgmma_wait(float (&d)[Extent][4]) {
  wgmma_wait<N>();
  LAB_UNROLL
  for (int j = 0; j < Extent; ++j) asm volatile("" : LAB_D(j)::"memory");
}
#undef LAB_WGMMA_A_OPS
#undef LAB_WGMMA_A_OP
#undef LAB_WGMMA_OPS
#undef LAB_WGMMA_OP
#undef LAB_D
#undef LAB_R8
#undef LAB_R16
#undef LAB_R32
#endif  // LAB_WGMMA

}  // namespace lab
#else
#include "../host/wgmma.h"
#endif
