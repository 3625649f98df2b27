// Sizes: how a launcher divides a problem into blocks, and which access width the alignment of rows allows.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
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

// The host build has the launch shapes of a CPU, and those of a GPU, which take as long to compile again, only
// where setup.py is asked for them (LAB_HOST_GPU_SHAPES=1): `make test` does, for tests alone launch them.
#ifndef LAB_HOST_GPU_SHAPES
#define LAB_HOST_GPU_SHAPES 0
#endif
constexpr bool kHasGpuShapes = !kHost || LAB_HOST_GPU_SHAPES;

// Whether a launcher should use the launch shapes for a CPU.
inline bool cpu_shapes() {
  if (!kHost) return false;
  if (!host_takes_gpu_shapes()) return true;
  if (!kHasGpuShapes) throw std::runtime_error(kNoGpuShapes);
  return false;
}

// Whether the current device has wgmma (core/wgmma.cuh), and this build has the code for it.
inline bool has_wgmma() {
#ifdef __CUDACC__
  return LAB_SM90A && device_major() == 9;
#else
  return host_takes_shapes_of("gpu");
#endif
}

// The most rows of half precision that matrix products take on CUDA cores; more rows go to tensor cores. On
// an H100 16 rows on tensor cores were faster than 4 on CUDA cores (8B's token: 6.34 and 6.51 ms). A CPU would
// have to emulate tensor cores, slowly.
inline int most_stream_rows() { return cpu_shapes() ? std::numeric_limits<int>::max() : 2; }

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
