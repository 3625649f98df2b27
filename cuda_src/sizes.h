// Sizes: how a launcher divides a problem into blocks, and which access width the alignment of rows allows.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "common.cuh"
#include "host/shapes.h"

#ifndef LAB_SM90A
// setup.py defines this as 1 when it compiles code for sm_90a.
#define LAB_SM90A 0
#endif

namespace lab {

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// setup.py compiles the large kernels of the host build twice, which takes less time than once:
// LAB_HOST_PART=1 is optimised and has the launch shapes of a CPU alone, LAB_HOST_PART=2 is less optimised and
// has those of a GPU alone. host/by_shapes/ chooses between the two at each launch. All other files, and what
// nvcc compiles, are compiled once (0).
#ifndef LAB_HOST_PART
#define LAB_HOST_PART 0
#endif
constexpr bool kHasCpuShapes = kHost && LAB_HOST_PART != 2;
constexpr bool kHasGpuShapes = !kHost || LAB_HOST_PART != 1;

// Whether a launcher should use the launch shapes for a CPU. Static, as all that depends on the part: the two
// parts are linked into one extension, where inline functions of one name become one function.
static inline bool cpu_shapes() { return kHasCpuShapes && !(kHasGpuShapes && host_takes_gpu_shapes()); }

// Whether the current device has wgmma (core/wgmma.cuh), and this build has the code for it.
inline bool has_wgmma() {
#ifdef __CUDACC__
  return LAB_SM90A && device_major() == 9;
#else
  return host_takes_shapes_of("gpu");
#endif
}

// The most rows of half precision that matrix products take on CUDA cores; more rows go to tensor cores. On
// an H100 16 rows on tensor cores were faster than 4 on CUDA cores (8B's token: 6.34 and 6.51 ms). On a CPU,
// which emulates tensor cores slowly, the limit is higher.
static inline int most_stream_rows() { return cpu_shapes() ? kMostStreamRowsOfCpu : 2; }

inline int log2_of(int power_of_two) {
  int shift = 0;
  while (1 << shift < power_of_two) ++shift;
  return shift;
}

// Blocks of `threads` threads for `items` items, one thread each.
inline unsigned blocks_for(int64_t items, int threads) { return unsigned((items + threads - 1) / threads); }

// Calls f with the elements per access as a compile-time constant: 16 bytes if every stride (in elements) is
// a multiple of 16 bytes, else one element. In f: `constexpr int N = decltype(width)::value;`
template <typename T, typename F, typename... Strides>
inline void by_width(F&& f, Strides... strides) {
  constexpr int kVector = 16 / int(sizeof(T));
  if (((strides % kVector == 0) && ...)) {
    f(std::integral_constant<int, kVector>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

}  // namespace lab
