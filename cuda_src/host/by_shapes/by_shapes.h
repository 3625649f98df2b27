// Launchers whose kernels setup.py compiles twice. X.cpp in this folder says that cuda_src/X.cu is such a file:
// it is compiled once with the launch shapes of a CPU and once with those of a GPU (LAB_HOST_PART in sizes.h),
// where setup.py renames the launchers that X.cpp lists, by -D, to launcher_cpu_shapes and launcher_gpu_shapes.
// X.cpp defines the launchers themselves: each calls one of the two.
#pragma once
#include "../../launchers/arguments.h"
#include "../shapes.h"

namespace lab {

// Matrix products of many rows of half precision take tensor cores. On a CPU, which emulates them, too: so a
// launch of these is always one with a GPU's shapes.
template <typename Args>
auto takes_tensor_cores(const Args& a, int) -> decltype(a.rows > a.w.format) {
  return a.rows > kMostStreamRowsOfCpu && a.dtype != int(DType::f32) && a.w.format == int(Format::plain);
}
template <typename Args>
bool takes_tensor_cores(const Args&, ...) {  // attention, which has neither rows nor weights
  return false;
}

template <typename Args>
bool takes_gpu_shapes(const Args& a) {
  return host_takes_gpu_shapes() || takes_tensor_cores(a, 0);
}

}  // namespace lab

// parameters: as the launcher is declared. arguments: their names. Both in parentheses; the first is called a.
#define BY_SHAPES(launcher, parameters, arguments) \
  void launcher##_cpu_shapes parameters;           \
  void launcher##_gpu_shapes parameters;           \
  void launcher parameters {                       \
    if (lab::takes_gpu_shapes(a)) {                \
      launcher##_gpu_shapes arguments;             \
    } else {                                       \
      launcher##_cpu_shapes arguments;             \
    }                                              \
  }
