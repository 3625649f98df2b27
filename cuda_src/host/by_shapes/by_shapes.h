// Launchers whose kernels setup.py compiles twice. X.cpp in this folder says that cuda_src/X.cu is such a file:
// it is compiled once with the launch shapes of a CPU and once with those of a GPU (LAB_HOST_PART in sizes.h),
// where setup.py renames the launchers that X.cpp lists, by -D, to launcher_cpu_shapes and launcher_gpu_shapes.
// X.cpp defines the launchers themselves: each calls one of the two.
#pragma once
#include "../../launchers/arguments.h"
#include "../shapes.h"

namespace lab {

// Whether a launch is one with a GPU's shapes. A matrix product of many rows of half precision is, because it
// takes tensor cores on a CPU, too, which emulates them.
template <typename Args>
auto takes_gpu_shapes(const Args& a, int) -> decltype(a.rows > a.w.format) {
  const bool half = a.dtype != int(DType::f32), plain = a.w.format == int(Format::plain);
  return host_takes_gpu_shapes() || (half && plain && a.rows > kMostStreamRowsOfCpu);
}
// Attention, which has neither rows nor weights. In float32 its shape is the same on CPUs and GPUs.
template <typename Args>
bool takes_gpu_shapes(const Args& a, ...) {
  return host_takes_gpu_shapes() && a.dtype != int(DType::f32);
}

}  // namespace lab

// parameters: as the launcher is declared. arguments: their names. Both in parentheses; the first is called a.
#define BY_SHAPES(launcher, parameters, arguments) \
  void launcher##_cpu_shapes parameters;           \
  void launcher##_gpu_shapes parameters;           \
  void launcher parameters {                       \
    if (lab::takes_gpu_shapes(a, 0)) {             \
      launcher##_gpu_shapes arguments;             \
    } else {                                       \
      launcher##_cpu_shapes arguments;             \
    }                                              \
  }
