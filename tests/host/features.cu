// Every name of common.cuh at work, against plain C++ on the CPU. `features NAME` runs one check: exit code 0 when all
// values are right, 1 and a line on stderr when not.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common.cuh"

using namespace lab;

namespace {

int wrong = 0;

void expect(bool right, const char* what, double got, double expected) {
  if (right) return;
  if (++wrong <= 5) fprintf(stderr, "%s: got %g, expected %g\n", what, got, expected);
}
void expect_equal(const char* what, double got, double expected) { expect(got == expected, what, got, expected); }
void expect_close(const char* what, double got, double expected, double tolerance) {
  expect(std::fabs(got - expected) <= tolerance, what, got, expected);  // false for NaN
}

template <typename T>
struct Aligned {  // 128-byte aligned storage
  std::vector<unsigned char> bytes;
  T* data;
  explicit Aligned(size_t n) : bytes(n * sizeof(T) + 128) {
    data = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(bytes.data()) + 127) / 128 * 128);
  }
  T& operator[](size_t i) { return data[i]; }
};

Config blocks_of(unsigned blocks, unsigned threads, size_t smem_bytes = 0, unsigned cluster = 1) {
  Config config;
  config.grid = dim3(blocks);
  config.block = dim3(threads);
  config.smem_bytes = smem_bytes;
  config.cluster = cluster;
  return config;
}

// ---- indices --------------------------------------------------------------------------------------------------------

__global__ void index_kernel(int* out) {
  int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * int(blockDim.x * blockDim.y * blockDim.z) + thread] += block * 1000 + thread;
}

void check_indices() {
  std::vector<int> out(2 * 3 * 4 * 5 * 6 * 7, 0);
  Config config;
  config.grid = dim3(2, 3, 4);
  config.block = dim3(5, 6, 7);
  launch(config, "index_kernel", index_kernel, out.data());
  for (int i = 0; i < int(out.size()); ++i) expect_equal("index", out[i], i / 210 * 1000 + i % 210);
}

// ---- shuffles, votes, reductions ------------------------------------------------------------------------------------

__global__ void shuffle_kernel(int* out) {
  int lane = threadIdx.x % 32;
  int* mine = out + threadIdx.x * 16;
  mine[0] = __shfl_sync(~0u, lane, 5, 8);
  mine[1] = __shfl_xor_sync(~0u, lane, 3);
  mine[2] = __shfl_down_sync(~0u, lane, 4, 16);
  mine[3] = __shfl_up_sync(~0u, lane, 1);
  mine[4] = int(__shfl_xor_sync(~0u, double(lane) + 0.5, 16) * 2);
  mine[5] = int(__ballot_sync(~0u, lane % 3 == 0));
  mine[6] = __any_sync(~0u, lane == 31) * 2 + __all_sync(~0u, lane < 31);
  mine[7] = int(__match_any_sync(~0u, lane / 10));
  mine[8] = __reduce_add_sync(~0u, lane);
  mine[9] = __reduce_max_sync(~0u, lane * 7 % 31);
  mine[10] = 0;
  if (lane < 8) {  // two groups of one warp at different calls
    mine[10] = __shfl_xor_sync(0xffu, lane, 1);
  } else {
    mine[10] = __shfl_down_sync(0xffffff00u, lane, 2);
  }
  __syncwarp();
  mine[11] = __syncthreads_count(lane < 3);
  mine[12] = (__syncthreads_or(lane == 7) != 0) * 2 + (__syncthreads_and(lane < 32) != 0);
}

void check_shuffles() {
  std::vector<int> out(64 * 16);
  launch(blocks_of(1, 64), "shuffle_kernel", shuffle_kernel, out.data());
  for (int t = 0; t < 64; ++t) {
    int lane = t % 32;
    const int* mine = &out[t * 16];
    expect_equal("__shfl_sync", mine[0], (lane & ~7) + 5);
    expect_equal("__shfl_xor_sync", mine[1], lane ^ 3);
    expect_equal("__shfl_down_sync", mine[2], lane % 16 < 12 ? lane + 4 : lane);
    expect_equal("__shfl_up_sync", mine[3], lane > 0 ? lane - 1 : 0);
    expect_equal("__shfl_xor_sync of a double", mine[4], (lane ^ 16) * 2 + 1);
    expect_equal("__ballot_sync", unsigned(mine[5]), 0x49249249u);
    expect_equal("__any_sync, __all_sync", mine[6], 2);
    unsigned same = lane < 10 ? 0x3ffu : lane < 20 ? 0xffc00u : lane < 30 ? 0x3ff00000u : 0xc0000000u;
    expect_equal("__match_any_sync", unsigned(mine[7]), same);
    expect_equal("__reduce_add_sync", mine[8], 496);
    expect_equal("__reduce_max_sync", mine[9], 30);
    expect_equal("shuffles of a part of the warp", mine[10], lane < 8 ? lane ^ 1 : lane < 30 ? lane + 2 : lane);
    expect_equal("__syncthreads_count", mine[11], 6);
    expect_equal("__syncthreads_or, _and", mine[12], 3);
  }
}

template <int W>
__global__ void reduce_kernel(const float* x, float* out, float* out_max) {
  struct Shared {
    float scratch[4];
  };
  auto& s = smem<Shared>();
  float values[19];
  for (int i = 0; i < 19; ++i) values[i] = x[threadIdx.x] * float(i + 1);
  float maxima[3] = {values[0], -values[0], values[1]};
  group_sum<W>(values);
  group_max<W>(maxima);
  for (int i = 0; i < 19; ++i) out[threadIdx.x * 24 + i] = values[i];
  out[threadIdx.x * 24 + 19] = group_sum<W>(x[threadIdx.x]);
  for (int i = 0; i < 3; ++i) out_max[threadIdx.x * 8 + i] = maxima[i];
  out_max[threadIdx.x * 8 + 3] = group_max<W>(x[threadIdx.x]);
  for (int round = 0; round < 3; ++round) {  // the scratch is reused at once
    out[threadIdx.x * 24 + 20 + round] = block_sum<128>(x[threadIdx.x] + float(round), s.scratch);
  }
  out_max[threadIdx.x * 8 + 4] = block_max<128>(x[threadIdx.x], s.scratch);
}

template <int W>
void check_reduction() {
  std::vector<float> x(128), out(128 * 24), out_max(128 * 8);
  std::mt19937 random(W);
  for (float& v : x) v = float(int(random() % 1000)) - 500.0f;  // sums are exact
  launch(blocks_of(1, 128, 16), "reduce_kernel", reduce_kernel<W>, x.data(), out.data(), out_max.data());
  double total = 0;
  for (float v : x) total += v;
  for (int t = 0; t < 128; ++t) {
    double sum = 0, low = 1e9, high = -1e9;
    for (int i = t / W * W; i < t / W * W + W; ++i) {
      sum += x[i];
      low = std::min<double>(low, x[i]);
      high = std::max<double>(high, x[i]);
    }
    for (int i = 0; i < 19; ++i) expect_equal("group_sum of an array", out[t * 24 + i], sum * (i + 1));
    expect_equal("group_sum", out[t * 24 + 19], sum);
    expect_equal("group_max of an array", out_max[t * 8], high);
    expect_equal("group_max of an array", out_max[t * 8 + 1], -low);
    expect_equal("group_max", out_max[t * 8 + 3], high);
    for (int round = 0; round < 3; ++round) expect_equal("block_sum", out[t * 24 + 20 + round], total + 128 * round);
    expect_equal("block_max", out_max[t * 8 + 4], *std::max_element(x.begin(), x.end()));
  }
}

void check_reductions() {
  check_reduction<1>();
  check_reduction<2>();
  check_reduction<8>();
  check_reduction<32>();
}

// ---- atomics, a ticket ----------------------------------------------------------------------------------------------

__global__ void atomic_kernel(int* counters, float* sum, unsigned* ticket, float* partial, float* total) {
  struct Shared {
    float scratch[2];
    unsigned last;
  };
  auto& s = smem<Shared>();
  int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&counters[0], 1);
  atomicMax(&counters[1], i);
  atomicMin(&counters[2], -i);
  atomicOr(&counters[3], 1 << (i % 20));
  atomicCAS(&counters[4], i, i + 1);
  atomicAdd(sum, 0.5f);
  // The last block to finish adds up what all have published.
  float mine = block_sum<64>(float(i), s.scratch);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = mine;
    __threadfence();
    s.last = atomicAdd(ticket, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (s.last) {
    __threadfence();
    float v = threadIdx.x < gridDim.x ? partial[threadIdx.x] : 0.0f;
    v = block_sum<64>(v, s.scratch);
    if (threadIdx.x == 0) {
      *total = v;
      atomicExch(ticket, 0);
    }
  }
}

void check_atomics() {
  const int blocks = 37, n = blocks * 64;
  int counters[5] = {0, 0, 0, 0, 0};
  float sum = 0, total = -1, partial[64];
  unsigned ticket = 0;
  launch(blocks_of(blocks, 64, 16), "atomic_kernel", atomic_kernel, counters, &sum, &ticket, partial, &total);
  expect_equal("atomicAdd", counters[0], n);
  expect_equal("atomicMax", counters[1], n - 1);
  expect_equal("atomicMin", counters[2], 1 - n);
  expect_equal("atomicOr", counters[3], (1 << 20) - 1);
  expect("atomicCAS" && counters[4] >= 1, "atomicCAS", counters[4], 1);
  expect_equal("atomicAdd of floats", sum, n * 0.5);
  expect_equal("last block's sum", total, double(n) * (n - 1) / 2);
  expect_equal("ticket", ticket, 0);
}

// ---- tensor cores ---------------------------------------------------------------------------------------------------

// C[16, 8] = A[16, k] B[8, k]^T by one warp; BT: B arrives as [k, 8] and goes through the transposing ldmatrix.
template <typename T>
__global__ void mma_kernel(const T* a, const T* b, const T* bt, float* c, float* c_trans, int k) {
  struct Shared {
    alignas(16) T a[16][24], b[8][24], bt[16][8];
  };
  auto& s = smem<Shared>();
  int lane = threadIdx.x;
  float d[4] = {0, 0, 0, 0}, e[4] = {0, 0, 0, 0};
  for (int k0 = 0; k0 < k; k0 += 16) {
    int row = lane / 2, col = lane % 2 * 8;
    cp_async16(&s.a[row][col], a + row * k + k0 + col);
    if (lane < 16) cp_async16(&s.b[row][col], b + row * k + k0 + col);
    if (lane < 16) cp_async16(&s.bt[lane][0], bt + (k0 + lane) * 8);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    uint32_t fa[4], fb[2], both[4];
    ldmatrix_x4(fa, &s.a[lane % 16][lane / 16 * 8]);
    fb[0] = *reinterpret_cast<const uint32_t*>(&s.b[lane / 4][lane % 4 * 2]);
    fb[1] = *reinterpret_cast<const uint32_t*>(&s.b[lane / 4][lane % 4 * 2 + 8]);
    mma_m16n8k16(d, fa, fb, T());
    ldmatrix_x4_trans(both, &s.bt[lane % 16][0]);
    fb[0] = both[0];
    fb[1] = both[1];
    mma_m16n8k16(e, fa, fb, T());
    __syncwarp();
  }
  for (int i = 0; i < 4; ++i) {
    int at = (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2;
    c[at] = d[i];
    c_trans[at] = e[i];
  }
}

template <typename T>
void check_mma_of(const char* what) {
  const int k = 64;
  Aligned<T> a(16 * k), b(8 * k), bt(k * 8);
  std::vector<float> c(128), c_trans(128);
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (int i = 0; i < 16 * k; ++i) a[i] = from_float<T>(normal(random));
  for (int i = 0; i < 8 * k; ++i) bt[i % k * 8 + i / k] = b[i] = from_float<T>(normal(random));
  launch(blocks_of(1, 32, 2048), "mma_kernel", mma_kernel<T>, a.data, b.data, bt.data, c.data(), c_trans.data(), k);
  for (int i = 0; i < 128; ++i) {
    double sum = 0;
    for (int j = 0; j < k; ++j) sum += double(to_float(a[i / 8 * k + j])) * to_float(b[i % 8 * k + j]);
    expect_close(what, c[i], sum, 1e-4);
    expect_close(what, c_trans[i], sum, 1e-4);
  }
}

void check_mma() {
  check_mma_of<half>("mma of half");
  check_mma_of<bf16>("mma of bf16");
}

// ---- Hopper ---------------------------------------------------------------------------------------------------------

// One producer warp streams tiles through a ring of bulk copies; four warps add them up.
template <int Stages, int Tile>
__global__ void pipeline_kernel(const float* x, float* out, int tiles) {
  struct Shared {
    alignas(128) float tile[Stages][Tile];
    mbarrier full[Stages], empty[Stages];
    float sums[4];
  };
  auto& s = smem<Shared>();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Stages; ++i) {
      mbarrier_init(&s.full[i], 1);
      mbarrier_init(&s.empty[i], 128);
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  const float* source = x + size_t(blockIdx.x) * tiles * Tile;
  if (warp == 4) {
    if (lane == 0) {
      for (int t = 0; t < tiles; ++t) {
        int stage = t % Stages, round = t / Stages;
        mbarrier_wait(&s.empty[stage], (round & 1) ^ 1);
        mbarrier_arrive_expect_tx(&s.full[stage], Tile * sizeof(float));
        bulk_copy_g2s(s.tile[stage], source + t * Tile, Tile * sizeof(float), &s.full[stage]);
      }
    }
    return;
  }
  float sum = 0;
  for (int t = 0; t < tiles; ++t) {
    int stage = t % Stages, round = t / Stages;
    mbarrier_wait(&s.full[stage], round & 1);
    for (int i = threadIdx.x; i < Tile; i += 128) sum += s.tile[stage][i];
    mbarrier_arrive(&s.empty[stage]);
  }
  sum = group_sum<32>(sum);
  if (lane == 0) s.sums[warp] = sum;
  named_barrier(1, 128);
  if (threadIdx.x == 0) out[blockIdx.x] = s.sums[0] + s.sums[1] + s.sums[2] + s.sums[3];
}

void check_pipeline() {
  const int tile = 256, tiles = 11, blocks = 3;
  Aligned<float> x(blocks * tiles * tile);
  for (int i = 0; i < blocks * tiles * tile; ++i) x[i] = float(i % 7);
  float out[blocks] = {-1, -1, -1};
  launch(blocks_of(blocks, 160, 3200), "pipeline_kernel", pipeline_kernel<3, tile>, x.data, out, tiles);
  for (int b = 0; b < blocks; ++b) {
    double sum = 0;
    for (int i = 0; i < tiles * tile; ++i) sum += x[b * tiles * tile + i];
    expect_equal("pipeline", out[b], sum);
  }
}

__global__ void cluster_kernel(const float* x, float* out, int n) {
  struct Shared {
    float part;
  };
  auto& s = smem<Shared>();
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += 32) sum += x[blockIdx.x * n + i];
  sum = group_sum<32>(sum);
  if (threadIdx.x == 0) s.part = sum;
  cluster_sync();
  if (cluster_rank() == 0 && threadIdx.x == 0) {
    float total = 0;
    for (unsigned rank = 0; rank < 4; ++rank) total += cluster_peer(&s, rank)->part;
    out[blockIdx.x / 4] = total;
  }
  cluster_sync();  // a block that left would take its shared memory with it
}

void check_clusters() {
  std::vector<float> x(12 * 100);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i % 11);
  float out[3] = {-1, -1, -1};
  launch(blocks_of(12, 32, 4, 4), "cluster_kernel", cluster_kernel, x.data(), out, 100);
  for (int c = 0; c < 3; ++c) {
    double sum = 0;
    for (int i = 0; i < 400; ++i) sum += x[c * 400 + i];
    expect_equal("cluster", out[c], sum);
  }
}

// Two halves of a block, each with its own barrier, pass a value along their warps.
__global__ void named_barrier_kernel(int* out) {
  struct Shared {
    int value[2];
  };
  auto& s = smem<Shared>();
  int half_block = threadIdx.x / 64, at = threadIdx.x % 64;
  if (at == 0) s.value[half_block] = 100 * half_block;
  for (int turn = 0; turn < 64; ++turn) {
    named_barrier(1 + half_block, 64);
    if (at == turn) s.value[half_block] += 1;
  }
  named_barrier(1 + half_block, 64);
  out[threadIdx.x] = s.value[half_block];
}

void check_named_barriers() {
  int out[128];
  launch(blocks_of(1, 128, 8), "named_barrier_kernel", named_barrier_kernel, out);
  for (int t = 0; t < 128; ++t) expect_equal("named_barrier", out[t], t < 64 ? 64 : 164);
}

// ---- cp.async: groups, zero fill ------------------------------------------------------------------------------------

__global__ void copy_kernel(const float* x, float* out, int tiles) {
  struct Shared {
    alignas(16) float tile[3][32][4];
  };
  auto& s = smem<Shared>();
  int lane = threadIdx.x;
  for (int t = 0; t < 2; ++t) {
    if (t < tiles) cp_async16(s.tile[t][lane], x + (t * 32 + lane) * 4);
    cp_async_commit();
  }
  float sum = 0;
  for (int t = 0; t < tiles; ++t) {
    if (t + 2 < tiles) cp_async16(s.tile[(t + 2) % 3][lane], x + ((t + 2) * 32 + lane) * 4, lane < 20);
    cp_async_commit();
    cp_async_wait<2>();
    __syncthreads();
    for (int i = 0; i < 4; ++i) sum += s.tile[t % 3][(lane + 1) % 32][i];
    __syncthreads();
  }
  out[lane] = sum;
}

void check_copies() {
  const int tiles = 7;
  Aligned<float> x(tiles * 128);
  for (int i = 0; i < tiles * 128; ++i) x[i] = float(i % 13);
  float out[32];
  launch(blocks_of(1, 32, 3 * 512), "copy_kernel", copy_kernel, x.data, out, tiles);
  for (int lane = 0; lane < 32; ++lane) {
    double sum = 0;
    int from = (lane + 1) % 32;
    for (int t = 0; t < tiles; ++t) {
      for (int i = 0; i < 4; ++i) sum += t < 2 || from < 20 ? x[(t * 32 + from) * 4 + i] : 0.0f;
    }
    expect_equal("cp_async16", out[lane], sum);
  }
}

// ---- 16-bit floats, vectors, math -----------------------------------------------------------------------------------

void check_float16() {
  for (unsigned i = 0; i < 65536; ++i) {
    bf16 b = __ushort_as_bfloat16(uint16_t(i));
    half h = __ushort_as_half(uint16_t(i));
    float fb = to_float(b), fh = to_float(h);
    if (fb == fb) expect_equal("bf16 round trip", from_float<bf16>(fb).bits, i);
    if (fb != fb) expect_equal("bf16 NaN", from_float<bf16>(fb).bits, 0x7fff);
    if (fh == fh) expect_equal("half round trip", from_float<half>(fh).bits, i);
    if (fh != fh) expect_equal("half NaN", from_float<half>(fh).bits, 0x7fff);
    double exponent = i >> 10 & 31, mantissa = i & 1023, sign = i & 0x8000 ? -1 : 1;
    if (exponent < 31) {
      double value = exponent > 0 ? std::ldexp(1 + mantissa / 1024, int(exponent) - 15) : std::ldexp(mantissa, -24);
      expect_equal("half value", fh, sign * value);
    } else {
      expect("half infinity" && (mantissa > 0) == (fh != fh), "half infinity or NaN", fh, 0);
    }
    // Between two neighbours: nearest, and halfway to the even one.
    if (fh == fh && (i & 0x7fff) < 0x7bff) {
      float next = to_float(__ushort_as_half(uint16_t(i + 1))), middle = (fh + next) / 2;
      expect_equal("half tie", from_float<half>(middle).bits, i + (i & 1));
      expect_equal("half below tie", from_float<half>(std::nextafterf(middle, fh)).bits, i);
      expect_equal("half above tie", from_float<half>(std::nextafterf(middle, next)).bits, i + 1);
    }
    if (fb == fb && (i & 0x7fff) < 0x7f7f) {
      float next = to_float(__ushort_as_bfloat16(uint16_t(i + 1)));
      float middle = __uint_as_float(i << 16 | 0x8000u);
      expect_equal("bf16 tie", from_float<bf16>(middle).bits, i + (i & 1));
      expect_equal("bf16 below tie", from_float<bf16>(std::nextafterf(middle, fb)).bits, i);
      expect_equal("bf16 above tie", from_float<bf16>(std::nextafterf(middle, next)).bits, i + 1);
    }
  }
  expect_equal("half overflow", from_float<half>(65520.0f).bits, 0x7c00);
  expect_equal("half largest", from_float<half>(65519.9f).bits, 0x7bff);
  expect_equal("half -overflow", from_float<half>(-1e30f).bits, 0xfc00);
  half h = 1.5f;
  h += half(2);
  expect_equal("half arithmetic", h * half(2.0f), 7);
  __nv_bfloat162 pair = __floats2bfloat162_rn(1.0f, -2.0f);
  expect_equal("__nv_bfloat162", __low2float(pair) + __high2float(pair + pair), -3);
  expect_equal("__half22float2", __half22float2(__hfma2(half2(2, 3), half2(4, 5), half2(1, 1))).y, 16);
}

void check_math() {
  expect_equal("__popc", __popc(0xf0f0u), 8);
  expect_equal("__clz", __clz(1), 31);
  expect_equal("__ffs", __ffs(8), 4);
  expect_equal("__brev", __brev(1u), 0x80000000u);
  expect_equal("__umulhi", __umulhi(0xffffffffu, 0xffffffffu), 0xfffffffeu);
  expect_equal("__byte_perm", __byte_perm(0x33221100u, 0x77665544u, 0x7520u), 0x77552200u);
  expect_equal("__dp4a", __dp4a(0x01ff02fe, 0x04030201, 10), 10 + 4 - 3 + 4 - 2);
  expect_equal("__funnelshift_l", __funnelshift_l(0x80000000u, 1u, 1), 3);
  expect_equal("fmaxf with NaN", fmaxf(NAN, 1.0f) + fmaxf(2.0f, NAN), 3);
  expect_equal("min, max", min(3, 5u) + max(2.5f, 1.0f), 5.5);
  expect_equal("rsqrtf", rsqrtf(4.0f), 0.5);
  Aligned<bf16> x(16);
  for (int i = 0; i < 16; ++i) x[i] = float(i);
  Vec<bf16> v = load(x.data + 8);
  store(x.data, v);
  store(x.data + 9, load<1>(x.data + 2));
  expect_equal("Vec size", v.size, 8);
  expect_equal("load, store", to_float(x[0]) + to_float(x[7]) + to_float(x[9]), 8 + 15 + 10);
  expect_equal("load_stream", to_float(load_stream(x.data).v[3]), 11);
}

// ---- launches -------------------------------------------------------------------------------------------------------

__global__ void add_kernel(int* out, int value) { atomicAdd(out, value); }

template <typename F>
void expect_throw(const char* what, const char* part, F f) {
  try {
    f();
  } catch (const std::exception& error) {
    if (std::string(error.what()).find(part) == std::string::npos) {
      ++wrong;
      fprintf(stderr, "%s: the message is: %s\n", what, error.what());
    }
    return;
  }
  ++wrong;
  fprintf(stderr, "%s: nothing was thrown\n", what);
}

void check_launches() {
  int out = 0;
  set_trace(true);
  launch(blocks_of(10, 100), "first", add_kernel, &out, 1);
  launch(blocks_of(3, 1), "second", add_kernel, &out, 2);
  expect_equal("sum", out, 1006);
  std::vector<std::string> names = take_trace();
  expect_equal("trace", names.size() == 2 && names[0] == "first" && names[1] == "second", 1);
  set_trace(false);
  launch(blocks_of(1, 1), "third", add_kernel, &out, 1);
  expect_equal("trace off", double(take_trace().size()), 0);
  expect_throw("no blocks", "kernel add_kernel: invalid grid (0,1,1)",
               [&] { launch(blocks_of(0, 32), "add_kernel", add_kernel, &out, 1); });
  expect_throw("big block", "invalid block", [&] { launch(blocks_of(1, 1025), "add_kernel", add_kernel, &out, 1); });
  expect_throw("shared", "shared memory", [&] { launch(blocks_of(1, 1, 1 << 20), "add_kernel", add_kernel, &out, 1); });
  expect_throw("cluster", "cluster of 4", [&] { launch(blocks_of(6, 1, 0, 4), "add_kernel", add_kernel, &out, 1); });
  expect_throw("dtype", "unknown dtype code 3", [] { by_dtype(3, [](auto) {}); });
  int codes = 0;
  for (int code : {0, 1, 2}) by_dtype(code, [&](auto tag) { codes = codes * 10 + int(sizeof(tag)); });
  expect_equal("by_dtype", codes, 422);
  host::Options options = host::get_options();
  for (int threads : {1, 2, 3}) {
    options.threads = threads;
    host::set_options(options);
    out = 0;
    launch(blocks_of(100, 33), "add_kernel", add_kernel, &out, 1);
    expect_equal("threads", out, 3300);
  }
}

void check_callers() {  // launches from several OS threads take turns
  std::vector<int> sums(4, 0);
  std::vector<std::thread> callers;
  for (int& sum : sums) {
    callers.emplace_back([&sum] {
      for (int i = 0; i < 20; ++i) launch(blocks_of(5, 40), "add_kernel", add_kernel, &sum, 1);
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (int sum : sums) expect_equal("callers", sum, 20 * 200);
}

void check_fork() {  // a forked child has none of the parent's OS threads and must not wait for them
  int out = 0;
  launch(blocks_of(50, 64), "add_kernel", add_kernel, &out, 1);
  pid_t child = fork();
  if (child == 0) {
    alarm(20);
    launch(blocks_of(50, 64), "add_kernel", add_kernel, &out, 1);
    _exit(out == 6400 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  expect_equal("status of the child", status, 0);
}

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string, void (*)()> checks = {
      {"indices", check_indices},   {"shuffles", check_shuffles}, {"reductions", check_reductions},
      {"atomics", check_atomics},   {"mma", check_mma},           {"pipeline", check_pipeline},
      {"clusters", check_clusters}, {"copies", check_copies},     {"named_barriers", check_named_barriers},
      {"float16", check_float16},   {"math", check_math},         {"launches", check_launches},
      {"callers", check_callers},   {"fork", check_fork},
  };
  if (argc == 1) {
    for (const auto& check : checks) puts(check.first.c_str());
    return 0;
  }
  try {
    for (int i = 1; i < argc; ++i) checks.at(argv[i])();
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  return wrong != 0;
}
