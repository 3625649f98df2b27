// Where the fused ops put normalised rows when they pass them from rmsnorm's kernel to a tensor-core kernel.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lab {

// The address of at least `bytes` bytes on the current device, the same at every call unless it has to grow; the first
// call takes 4 MiB, enough for 64 rows of 32768. Kernels on one stream may share it, for each waits for the one before;
// on two streams at once they may not. Throws std::runtime_error where it would have to grow while a graph is captured.
std::uintptr_t normed_scratch(size_t bytes, std::uintptr_t stream);

}  // namespace lab
