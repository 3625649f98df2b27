// CUDA kernels on a machine without a GPU: common.cuh includes this file when the compiler is not nvcc.
//
// Every CUDA thread runs as a fiber: a stack of its own, and the scheduler switches between fibers in a few
// nanoseconds. A fiber runs until it must wait: at a barrier, a shuffle, an mbarrier. The blocks of a grid
// are distributed over OS threads; the threads of one block (or cluster) share one OS thread, so nothing in a
// block runs truly in parallel. Threads that never wait run one after the other on one stack, as in a plain
// loop.
//
// Where a GPU would let an error pass, this layer is strict, so that wrong kernels fail here and not by
// chance later:
//   - shared memory starts as NaN (all bits set) and is followed by a page that must not be accessed;
//   - cp.async and bulk copies write their destination only when they are waited for, and only then does
//     wgmma multiply;
//   - a barrier that some threads never reach, even because they returned early, is an error that names the
//     threads that wait, and where;
//   - a kernel launched with programmatic dependent launch that never calls pdl_wait() is an error;
//   - LAB_HOST_SEED and LAB_HOST_AHEAD vary the order of threads and blocks; builds with -fsanitize=thread
//     report data races.
// It says nothing about speed on a GPU, weak memory order, tensor-core rounding or approximate math.
//
// The files, in reading order:
//   vector_types.h, float16.h    float4, uint4 ...; __half, __nv_bfloat16
//   runtime.h                    for kernels and scheduler: Thread, Warp, functions in which a thread waits
//   intrinsics.h                 __syncthreads, shuffles, votes, atomics, math
//   gpu_features.h               common.cuh's names on a CPU: reductions, cp.async, mma, mbarriers, clusters
//   wgmma.h                      core/wgmma.cuh's names on a CPU
//   fiber.h, .cpp                stacks and the context switch
//   scheduler.h, .cpp            one cluster of blocks: who runs next, deadlock reports
//   waiting.cpp                  barriers and warp collectives
//   launch.cpp, options.cpp      a grid over OS threads
//   async_copy.cpp               cp.async, mbarriers, bulk copies
//   shapes.h                     launches with the shapes of a CPU or with those of a GPU
//   fault.h, .cpp                turns an invalid memory access in a kernel into an error of the launch
//   sanitizer.h                  ThreadSanitizer and AddressSanitizer
//
// Flags that this layer needs:
//   kernels (*.cu)   -x c++ -std=c++17 -O2 -fno-strict-aliasing -fno-math-errno -fno-trapping-math
//                    -fvisibility=hidden, and -mavx2 -mfma -mf16c where the CPU has them (four times the
//                    speed; nothing depends on them)
//   host/*.cpp       -std=c++17 -O2 -fvisibility=hidden, linked with -pthread
//   race detector    kernels: add -g -O1 -fsanitize=thread; host/*.cpp: add -DLAB_HOST_TSAN and NOT
//                    -fsanitize=thread; link with -fsanitize=thread
//   address checks   everything: add -g -O1 -fsanitize=address
//
// Options, read once from the environment and changed by lab::host::set_options:
//   LAB_HOST_THREADS=n   OS threads (default: the cores this process may use)
//   LAB_HOST_SEED=n      a random but repeatable schedule (default: a fixed order)
//   LAB_HOST_AHEAD=x     lowest or highest: always run the lowest (highest) thread that can run; ignored with
//                        LAB_HOST_SEED
//   LAB_HOST_POISON=0    shared memory starts zeroed instead of NaN (default: 1)
//   LAB_HOST_STACK=n     bytes of stack per thread (default: 65536)
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__
// clang-format off
#define __shared__ _Pragma("GCC error \"use lab::smem<Struct>() instead of __shared__: not __shared__ float x[32]; but struct Shared { float x[32]; }; before the kernel, auto& shared = lab::smem<Shared>(); in it, and launch({grid, block, sizeof(Shared), stream}, ...)\"")
// clang-format on
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

#include "vector_types.h"

#include "float16.h"
#include "runtime.h"

#include "gpu_features.h"
#include "intrinsics.h"
