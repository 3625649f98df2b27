// Whose launch shapes the host build takes: those of a CPU, if LAB_HOST_SHAPES does not say otherwise.
#pragma once
#include <cstdlib>
#include <cstring>

namespace lab {

// LAB_HOST_SHAPES=gpu makes the host build use the launch shapes of a Hopper GPU, and LAB_HOST_SHAPES=sm_80
// those of older GPUs, so that tests and the race detector reach them without a GPU.
inline bool host_takes_shapes_of(const char* gpu) {
  const char* shapes = std::getenv("LAB_HOST_SHAPES");
  return shapes && std::strcmp(shapes, gpu) == 0;
}
inline bool host_takes_gpu_shapes() { return host_takes_shapes_of("gpu") || host_takes_shapes_of("sm_80"); }

// The most rows of half precision that matrix products take on emulated CUDA cores; see most_stream_rows().
constexpr int kMostStreamRowsOfCpu = 8;

}  // namespace lab
