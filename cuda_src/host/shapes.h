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

constexpr const char* kNoGpuShapes =
    "LAB_HOST_SHAPES asks for the launch shapes of a GPU, which this build for the CPU leaves out: build it "
    "with LAB_HOST_GPU_SHAPES=1 python3 setup.py build_ext --inplace";

}  // namespace lab
