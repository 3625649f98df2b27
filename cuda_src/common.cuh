// The names that kernels use; they are the same on a GPU (nvcc) and on a CPU (g++ or clang++, without the
// CUDA toolkit).
//
// A kernel needs to include only this file. On the GPU each name is a thin wrapper over one PTX instruction
// or one CUDA intrinsic, and all inline PTX of the project is here, except that of wgmma (core/wgmma.cuh). On
// the CPU the same names are defined in host/cuda_on_cpu.h, which also defines CUDA's own names (threadIdx,
// __syncthreads, __shfl_xor_sync, float4 ...).
//
// Three rules let a kernel run on both:
//   - shared memory only through smem<Struct>(), never __shared__;
//   - launches only through launch(), never <<<>>>;
//   - wrap the body of a kernel that uses mbarriers, bulk copies or clusters in `#if LAB_SM90 ... #endif`;
//     these exist for sm_90 and later, and on the CPU (LAB_WGMMA of core/wgmma.cuh: what only sm_90a has).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "trace.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LAB_DEVICE __device__ __forceinline__
#define LAB_DEVICE_ONCE LAB_DEVICE
#define LAB_DEVICE_CALL __device__ __noinline__
#define LAB_HOST_DEVICE __host__ __device__ __forceinline__
#define LAB_UNROLL _Pragma("unroll")
#else
#include "host/cuda_on_cpu.h"
#define LAB_DEVICE inline
// LAB_DEVICE_CALL: a function that is called, not inlined.
// LAB_DEVICE_ONCE: for large functions that a thread calls once: on a CPU they are not inlined, and so
// compiled once, not once more in each kernel.
#define LAB_DEVICE_ONCE inline __attribute__((noinline))
#define LAB_DEVICE_CALL inline __attribute__((noinline))
#define LAB_HOST_DEVICE inline
#define LAB_UNROLL
#endif

// 1 where Hopper's instructions exist: in code for sm_90 and later, in nvcc's pass over host code, and in the
// CPU build.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define LAB_SM90 1
#else
#define LAB_SM90 0
#endif

namespace lab {

using half = __half;
using bf16 = __nv_bfloat16;
using Ptr = std::uintptr_t;  // a device address (or a stream), as Python passes it

// How to launch a kernel. Sizes are in bytes. cluster: blocks per cluster along x.
// pdl: programmatic dependent launch: the kernel may start before the preceding kernel in the stream has
// ended, and must call pdl_wait() before it touches anything that the preceding kernel writes.
// cooperative: all blocks run at the same time and may wait for each other, or the launch fails.
struct Config {
  dim3 grid;
  dim3 block;
  size_t smem_bytes = 0;
  Ptr stream = 0;
  bool pdl = false;
  unsigned cluster = 1;
  bool cooperative = false;
};

// ---- bits, vectors, dtypes (both sides) -------------------------------------------------------------------

template <typename To, typename From>
LAB_HOST_DEVICE To bit_cast(From from) {  // by value: nvcc would load through a reference byte by byte
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// N elements that are loaded or stored in one access; by default 16 bytes (128 bits), the widest access of a
// thread.
template <typename T, int N = 16 / int(sizeof(T))>
struct alignas(N * sizeof(T)) Vec {
  static constexpr int size = N;
  T v[N];
};

namespace detail {
template <int Bytes> struct Word;
template <> struct Word<2> { using type = uint16_t; };
template <> struct Word<4> { using type = uint32_t; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };
}  // namespace detail

// load(p): 16 bytes; load<N>(p): N elements. p must be aligned to the access.
template <int N, typename T>
LAB_DEVICE Vec<T, N> load(const T* p) {
  using Word = typename detail::Word<(N * int(sizeof(T)))>::type;
#ifdef __CUDACC__
  return bit_cast<Vec<T, N>>(*reinterpret_cast<const Word*>(p));
#else
  (void)sizeof(Word);
  return *reinterpret_cast<const Vec<T, N>*>(p);
#endif
}
template <typename T>
LAB_DEVICE Vec<T> load(const T* p) {
  return load<Vec<T>::size>(p);
}

template <typename T, int N>
LAB_DEVICE void store(T* p, const Vec<T, N>& value) {
#ifdef __CUDACC__
  using Word = typename detail::Word<(N * int(sizeof(T)))>::type;
  *reinterpret_cast<Word*>(p) = bit_cast<Word>(value);
#else
  *reinterpret_cast<Vec<T, N>*>(p) = value;
#endif
}

LAB_DEVICE float to_float(float x) { return x; }
LAB_DEVICE float to_float(half x) { return __half2float(x); }
LAB_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }

// from_float<T>(x): rounds to nearest even.
template <typename T> LAB_DEVICE T from_float(float x);
template <> LAB_DEVICE float from_float<float>(float x) { return x; }
template <> LAB_DEVICE half from_float<half>(float x) { return __float2half_rn(x); }
template <> LAB_DEVICE bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

// a * b + c, rounded once where the target has an instruction for it (elsewhere fmaf would be a slow library
// call).
LAB_DEVICE float fmadd(float a, float b, float c) {
#if defined(__CUDACC__) || defined(__FP_FAST_FMAF)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

template <typename T>
inline T* as(Ptr p) {
  return reinterpret_cast<T*>(p);
}

// Calls f with a value of the element type that a dtype code stands for: f32 = 0, f16 = 1, bf16 = 2.
// In f: `using T = decltype(tag);`
template <typename F>
inline void by_dtype(int code, F&& f) {
  switch (code) {
    case 0: f(float{}); break;
    case 1: f(half{}); break;
    case 2: f(bf16{}); break;
    default:
      throw std::invalid_argument("unknown dtype code " + std::to_string(code) +
                                  " (f32 = 0, f16 = 1, bf16 = 2)");
  }
}

#ifdef __CUDACC__
// ============================================================================================== the GPU side

constexpr bool kHost = false;

// ---- shared memory and loads ------------------------------------------------------------------------------

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];

// The block's dynamic shared memory as an S. Launch with smem_bytes = sizeof(S), or more if S ends with an
// array whose size is known only at run time.
template <typename S>
LAB_DEVICE S& smem() {
  return *reinterpret_cast<S*>(dynamic_shared_memory);
}

LAB_DEVICE uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Loads 16 bytes of read-only data that are used only once (weights), without displacing what L1 holds.
template <typename T>
LAB_DEVICE Vec<T> load_stream(const T* p) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return bit_cast<Vec<T>>(r);
}

// Loads one read-only float here and not, as the compiler might choose, where it is used.
LAB_DEVICE float load_now(const float* p) {
  float value;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(p));
  return value;
}

// Prefetches the cache line of p into L2. Only a hint: p may be any valid global address.
LAB_DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Asynchronous 16-byte copy from global to shared memory, past L1; L2 fetches whole lines of 128 bytes. If
// !valid, zeros are written (src is not read, but must still be a legal address). The data are visible to
// this thread after cp_async_wait, and to other threads after a barrier as well.
LAB_DEVICE void cp_async16(void* dst, const void* src, bool valid = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem_address(dst)), "l"(src),
               "r"(valid ? 16 : 0)
               : "memory");
}
LAB_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's committed groups are still in flight.
template <int N>
LAB_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- barriers and reductions ------------------------------------------------------------------------------

// Barrier `id` (1 to 15; 0 is __syncthreads) of `threads` threads, a multiple of 32.
LAB_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Sum (or maximum) over groups of W consecutive lanes, W a power of two up to 32; every lane gets the result.
// All 32 lanes of the warp must call it. Both on a GPU and on a CPU the order is that of a butterfly: lanes
// W/2 apart first, then W/4, ...
template <int W>
LAB_DEVICE float group_sum(float v) {
  LAB_UNROLL
  for (int s = W / 2; s > 0; s >>= 1) v += __shfl_xor_sync(0xffffffffu, v, s);
  return v;
}
// N independent sums in one call: on the CPU the lanes meet only once, on the GPU the N sums overlap.
template <int W, int N>
LAB_DEVICE void group_sum(float (&v)[N]) {
  LAB_UNROLL
  for (int s = W / 2; s > 0; s >>= 1) {
    LAB_UNROLL
    for (int i = 0; i < N; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], s);
  }
}
template <int W>
LAB_DEVICE float group_max(float v) {
  LAB_UNROLL
  for (int s = W / 2; s > 0; s >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, s));
  return v;
}
template <int W, int N>
LAB_DEVICE void group_max(float (&v)[N]) {
  LAB_UNROLL
  for (int s = W / 2; s > 0; s >>= 1) {
    LAB_UNROLL
    for (int i = 0; i < N; ++i) v[i] = fmaxf(v[i], __shfl_xor_sync(0xffffffffu, v[i], s));
  }
}

// (word & Mask) | Bits in one instruction. Without it the compiler takes two, because an instruction holds one
// constant only; here it keeps the other in a register.
template <uint32_t Mask, uint32_t Bits>
LAB_DEVICE uint32_t cut_into(uint32_t word) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "n"(Mask), "n"(Bits));
  return result;
}

// ---- tensor cores -----------------------------------------------------------------------------------------

// d += a b for one warp: A 16 x 16 row-major, B 16 x 8 column-major, D 16 x 8 float32.
// With g = lane / 4, t = lane % 4:
//   a[0] = A[g][2t..], a[1] = A[g+8][2t..], a[2] = A[g][2t+8..], a[3] = A[g+8][2t+8..]   (two elements each)
//   b[0] = B[2t..][g], b[1] = B[2t+8..][g];   d[0..1] = D[g][2t..], d[2..3] = D[g+8][2t..]
LAB_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
LAB_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 tiles of 16-bit elements from shared memory: lane l passes the address of row l % 8 of tile l /
// 8 (16 bytes, 16-byte aligned); r[i] holds elements 2t, 2t+1 of row g of tile i. _trans: of the transposed
// tile.
LAB_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}
LAB_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}

// ---- programmatic dependent launch: nothing below sm_90 ---------------------------------------------------

// Waits until the preceding kernel in the stream has ended and its writes are visible.
LAB_DEVICE void pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Allows the dependent kernel (the next in the stream) to launch once every block has called this or ended.
// If a block calls it before pdl_wait(), the dependent kernel may even run while kernels before this one
// still run; then its prologue may read nothing but weights.
LAB_DEVICE void pdl_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- Hopper: mbarriers, bulk copies, clusters: for the bodies of kernels in `#if LAB_SM90` ----------------

using mbarrier = uint64_t;  // in shared memory, 8-byte aligned

// A phase of the barrier completes when it has had `arrivals` arrivals and all expected bytes have arrived.
// One thread initialises the barrier, then calls mbarrier_fence_init(), then the block synchronises.
LAB_DEVICE void mbarrier_init(mbarrier* bar, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(bar)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the cluster and to the hardware that performs bulk copies.
LAB_DEVICE void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
LAB_DEVICE void mbarrier_arrive(mbarrier* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(bar)) : "memory");
}
// Arrives, and adds `bytes` to the bytes that the current phase waits for.
LAB_DEVICE void mbarrier_arrive_expect_tx(mbarrier* bar, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(bar)), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity has completed; parities are 0 for the first phase, then 1, 0, ... On a
// fresh barrier a wait for parity 1 returns at once, as if a phase had preceded the first.
LAB_DEVICE void mbarrier_wait(mbarrier* bar, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "LAB_WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra LAB_DONE;\n"
      "bra LAB_WAIT;\n"
      "LAB_DONE:\n"
      "}" ::"r"(smem_address(bar)),
      "r"(parity)
      : "memory");
}

// Bulk copy of contiguous bytes from global memory to this block's shared memory; when they arrive, they count
// towards what bar expects. One thread issues it. Addresses and size are multiples of 16. Once: nobody reads
// these bytes again, and L2 evicts them first.
template <bool Once = true>
LAB_DEVICE void bulk_copy_g2s(void* dst, const void* src, unsigned bytes, mbarrier* bar) {
  if constexpr (!Once) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            smem_address(dst)),
        "l"(src), "r"(bytes), "r"(smem_address(bar))
        : "memory");
    return;
  }
  asm volatile(
      "{\n"
      ".reg .b64 once;\n"
      "createpolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], once;\n"
      "}" ::"r"(smem_address(dst)),
      "l"(src), "r"(bytes), "r"(smem_address(bar))
      : "memory");
}
// Prefetches a range into L2; address and size are multiples of 16.
LAB_DEVICE void bulk_prefetch_l2(const void* p, unsigned bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
}

// Barrier of all threads of all blocks of the cluster that have not ended. Writes to shared memory before it
// are visible to the other blocks after it.
LAB_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}
LAB_DEVICE unsigned cluster_size() {
  unsigned size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
LAB_DEVICE unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// The address in the shared memory of block `rank` of the cluster that corresponds to p in this block's.
template <typename T>
LAB_DEVICE T* cluster_peer(T* p, unsigned rank) {
  uint64_t peer;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(peer) : "l"(reinterpret_cast<uint64_t>(p)), "r"(rank));
  return reinterpret_cast<T*>(peer);
}

// ---- launch -----------------------------------------------------------------------------------------------

namespace detail {
inline void check(cudaError_t status, const char* kernel) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // clears an earlier error, so that this launch is judged on its own
    throw std::runtime_error("kernel " + std::string(kernel) + ": " + cudaGetErrorString(status));
  }
}

// An attribute of the current device, queried once; 0 if there is no device.
template <cudaDeviceAttr Attribute>
inline int device_attribute() {
  static std::atomic<int> cached[64];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return 0;
  int value = cached[device].load(std::memory_order_relaxed);
  if (value == 0) {
    cudaDeviceGetAttribute(&value, Attribute, device);
    cached[device].store(value, std::memory_order_relaxed);
  }
  return value;
}
inline int device_major() { return device_attribute<cudaDevAttrComputeCapabilityMajor>(); }
}  // namespace detail

// Launches kernel(args...) and traces its name; while launches are recorded (trace.h), only notes it. Throws
// std::runtime_error naming the kernel if the launch fails. Errors inside the kernel appear at the next
// synchronisation, as everywhere in CUDA.
template <typename... Params, typename... Args>
inline void launch(const Config& config, const char* name, void (*kernel)(Params...), Args&&... args) {
  if (trace::recorded_multiprocessors()) {  // noted, not run: there may be no GPU
    return trace::record_launch(name, reinterpret_cast<std::uintptr_t>(kernel), config);
  }
  if (config.smem_bytes > 48 * 1024) {
    detail::check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.smem_bytes)),
                  name);
  }
  cudaLaunchAttribute attributes[3];
  unsigned count = 0;
  if (config.pdl && detail::device_major() >= 9) {
    // Kernels that overlap must divide a multiprocessor's memory into L1 and shared memory in the same way:
    // the division cannot change while it is in use.
    detail::check(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        name);
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (config.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = config.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  if (config.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  cudaLaunchConfig_t launch_config = {};
  launch_config.gridDim = config.grid;
  launch_config.blockDim = config.block;
  launch_config.dynamicSmemBytes = config.smem_bytes;
  launch_config.stream = reinterpret_cast<cudaStream_t>(config.stream);
  launch_config.attrs = attributes;
  launch_config.numAttrs = count;
  trace::record(name);
  detail::check(cudaLaunchKernelEx(&launch_config, kernel, static_cast<Params>(args)...), name);
}
#else
// ============================================================================================== the CPU side
// The rest is in host/gpu_features.h; the functions below need the definitions above.

template <typename T>
inline Vec<T> load_stream(const T* p) {
  return load(p);
}

template <typename... Params, typename... Args>
inline void launch(const Config& config, const char* name, void (*kernel)(Params...), Args&&... args) {
  if (trace::recorded_multiprocessors()) {  // noted, not run: there may be no GPU
    return trace::record_launch(name, reinterpret_cast<std::uintptr_t>(kernel), config);
  }
  auto run_thread = [&] { kernel(static_cast<Params>(args)...); };
  trace::record(name);
  // A cooperative launch is run as one cluster, whose blocks are all run by one worker, so that they can wait
  // for each other.
  host::run({name, config.grid, config.block, config.smem_bytes,
             config.cooperative ? config.grid.x : config.cluster,
             [](const void* call) { (*static_cast<const decltype(run_thread)*>(call))(); }, &run_thread,
             config.pdl});
}
#endif  // __CUDACC__

// ---- built from the above (both sides) --------------------------------------------------------------------

// Multiprocessors of the current device; on a CPU a small number, so that there, too, a block handles several
// sets of outputs.
inline int multiprocessors() {
  if (const int recorded = trace::recorded_multiprocessors()) return recorded;
#ifdef __CUDACC__
  const int count = detail::device_attribute<cudaDevAttrMultiProcessorCount>();
  return count ? count : 132;
#else
  return 4;
#endif
}

#ifdef __CUDACC__
// The major compute capability of the current device, or of the one that launches are recorded for.
inline int device_major() {
  return trace::recorded_multiprocessors() ? trace::recorded_major() : detail::device_major();
}
#endif

// Whether the current device has clusters of blocks: sm_90 and later, and the host build.
inline bool has_clusters() {
#ifdef __CUDACC__
  return device_major() >= 9;
#else
  return true;
#endif
}

// x rounded to T. A bf16 is the upper half of a float, so packing it above a zero does the whole conversion:
// one fast instruction.
template <typename T>
LAB_DEVICE float rounded(float x) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bf16>) return bit_cast<float>(__floats2bfloat162_rn(0.f, x));
#endif
  return to_float(from_float<T>(x));
}

// One element of rmsnorm's output: rounded to T before and after the multiply with its weight, as the
// contract says. scale: 1 / rms of the row.
template <typename T>
LAB_DEVICE T normed_element(float x, float scale, float weight) {
  return from_float<T>(rounded<T>(x * scale) * weight);
}

// silu(gate) * up.
LAB_DEVICE float activate(float gate, float up) { return gate / (1.f + expf(-gate)) * up; }

// The most shared memory of a block on the current device, in bytes; while launches are recorded, and on a
// CPU, that of a Hopper GPU.
inline int most_shared_bytes() {
#ifdef __CUDACC__
  if (!trace::recorded_multiprocessors())
    return detail::device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>();
#endif
  return 227 * 1024;
}

// Adds 1 to *counter and returns the value before. Everything that this thread has seen before, including
// stores of its block before a barrier, becomes visible to the block that takes a later ticket, after a
// barrier there. One thread of a block calls it.
LAB_DEVICE unsigned take_ticket(unsigned* counter) {
#ifdef __CUDACC__
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
#else
  // Not atomicAdd between two fences: the race detector counts each fence as both release and acquire, so it
  // would not notice if one of them were missing.
  return __atomic_fetch_add(counter, 1u, __ATOMIC_ACQ_REL);
#endif
}

// Stores two 32-bit values in one 64-bit access, past L1, to be read by other blocks. If one of the two tells
// whether the other is up to date, blocks need no fence and no barrier between them.
LAB_DEVICE void store_word(uint64_t* p, uint64_t word) {
#ifdef __CUDACC__
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(word) : "memory");
#else
  __atomic_store_n(p, word, __ATOMIC_RELAXED);
#endif
}
// Loads N contiguous words, 16-byte aligned if N >= 2; each word is read in one access. Call spin_pause()
// between two polls.
template <int N>
LAB_DEVICE void load_words(uint64_t (&words)[N], const uint64_t* p) {
#ifdef __CUDACC__
  static_assert(N == 1 || N % 2 == 0, "pairs are one access each");
  if constexpr (N == 1) {
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(words[0]) : "l"(p) : "memory");
  } else {
    LAB_UNROLL
    for (int i = 0; i < N; i += 2) {
      asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                   : "=l"(words[i]), "=l"(words[i + 1])
                   : "l"(p + i)
                   : "memory");
    }
  }
#else
  for (int i = 0; i < N; ++i) words[i] = __atomic_load_n(p + i, __ATOMIC_RELAXED);
#endif
}
LAB_DEVICE void spin_pause() {
#ifndef __CUDACC__
  __nanosleep(0);  // a CPU thread runs until it lets others run
#endif
}
// The same for words that another GPU reads or writes. Two words are one access, each of them whole.
LAB_DEVICE void store_peer_words(uint64_t* p, uint64_t first, uint64_t second) {
#ifdef __CUDACC__
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(p), "l"(first), "l"(second) : "memory");
#else
  __atomic_store_n(p, first, __ATOMIC_RELAXED);
  __atomic_store_n(p + 1, second, __ATOMIC_RELAXED);
#endif
}
LAB_DEVICE void load_peer_words(uint64_t (&words)[2], const uint64_t* p) {
#ifdef __CUDACC__
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(words[0]), "=l"(words[1])
               : "l"(p)
               : "memory");
#else
  for (int i = 0; i < 2; ++i) words[i] = __atomic_load_n(p + i, __ATOMIC_RELAXED);
#endif
}
LAB_DEVICE void store_peer_word(uint64_t* p, uint64_t word) {
#ifdef __CUDACC__
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(word) : "memory");
#else
  __atomic_store_n(p, word, __ATOMIC_RELAXED);
#endif
}
LAB_DEVICE uint64_t load_peer_word(const uint64_t* p) {
#ifdef __CUDACC__
  uint64_t word;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(word) : "l"(p) : "memory");
  return word;
#else
  return __atomic_load_n(p, __ATOMIC_RELAXED);
#endif
}
// Between two polls of a word of another rank. polls: how many there were. After some minutes the kernel fails,
// so that a rank whose peer has gone does not wait for ever.
LAB_DEVICE void peer_pause(uint32_t polls, int rank) {
#ifdef __CUDACC__
  (void)rank;
  if (polls == 1u << 28) __trap();
#else
  (void)polls;
  host::wait_for_rank(rank);
#endif
}
// Waits for about this many GPU cycles; does nothing on a CPU.
LAB_DEVICE void wait_cycles(unsigned cycles) {
#ifdef __CUDACC__
  for (const unsigned start = clock(); unsigned(clock()) - start < cycles;) {}
#else
  (void)cycles;
#endif
}

// Sum over a block of Threads threads (a multiple of 32), in a fixed order; every thread gets it. scratch:
// Threads / 32 floats of shared memory, which the next call may use again. All threads must call it.
template <int Threads>
LAB_DEVICE float block_sum(float v, float* scratch) {
  static_assert(Threads % 32 == 0 && Threads <= 1024, "whole warps only");
  v = group_sum<32>(v);
  if constexpr (Threads > 32) {
    __syncthreads();  // a previous call's readers are done with scratch
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    v = scratch[0];
    LAB_UNROLL
    for (int warp = 1; warp < Threads / 32; ++warp) v += scratch[warp];
  }
  return v;
}

}  // namespace lab
