// Every name of common.cuh at work, against plain C++. `features NAME ...` runs checks: exit code 0 when all
// values are right, 1 and a line on stderr when not. Built by g++ it tests the host layer; built by nvcc, the
// same kernels test the GPU side, which must agree.
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
#include "core/wgmma.cuh"

using namespace lab;

namespace {

int wrong = 0;

void expect(bool right, const char* what, double got, double expected) {
  if (right) return;
  if (++wrong <= 5) fprintf(stderr, "%s: got %g, expected %g\n", what, got, expected);
}
void expect_equal(const char* what, double got, double expected) {
  expect(got == expected, what, got, expected);
}
void expect_close(const char* what, double got, double expected, double tolerance) {
  expect(std::fabs(got - expected) <= tolerance, what, got, expected);  // false for NaN
}

// n elements, zero at first, which kernels can read and write: pass device(), then call fetch().
template <typename T>
class Array {
 public:
  explicit Array(size_t n) : bytes_(n * sizeof(T)), memory_(bytes_ + 128, 0) {
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.data()) + 127) / 128 * 128);
  }
  T& operator[](size_t i) { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + bytes_ / sizeof(T); }

#ifdef __CUDACC__
  ~Array() { cudaFree(device_); }
  T* device() {
    if (device_ == nullptr) check(cudaMalloc(&device_, bytes_));
    check(cudaMemcpy(device_, data_, bytes_, cudaMemcpyHostToDevice));
    return device_;
  }
  void fetch() { check(cudaMemcpy(data_, device_, bytes_, cudaMemcpyDeviceToHost)); }

 private:
  static void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
  }
  T* device_ = nullptr;
#else
  T* device() { return data_; }
  void fetch() {}

 private:
#endif
  size_t bytes_;
  std::vector<unsigned char> memory_;
  T* data_;
};

Config blocks_of(unsigned blocks, unsigned threads, size_t smem_bytes = 0, unsigned cluster = 1) {
  Config config;
  config.grid = dim3(blocks);
  config.block = dim3(threads);
  config.smem_bytes = smem_bytes;
  config.cluster = cluster;
  return config;
}

// ---- indices ----------------------------------------------------------------------------------------------

__global__ void index_kernel(int* out) {
  int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * int(blockDim.x * blockDim.y * blockDim.z) + thread] += block * 1000 + thread;
}

void check_indices() {
  const int n = 2 * 3 * 4 * 5 * 6 * 7;
  Array<int> out(n);
  Config config;
  config.grid = dim3(2, 3, 4);
  config.block = dim3(5, 6, 7);
  launch(config, "index_kernel", index_kernel, out.device());
  out.fetch();
  for (int i = 0; i < n; ++i) expect_equal("index", out[i], i / 210 * 1000 + i % 210);
}

// ---- shuffles, votes, reductions --------------------------------------------------------------------------

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
  Array<int> out(64 * 16);
  launch(blocks_of(1, 64), "shuffle_kernel", shuffle_kernel, out.device());
  out.fetch();
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
    expect_equal("shuffles of a part of the warp", mine[10],
                 lane < 8    ? lane ^ 1
                 : lane < 30 ? lane + 2
                             : lane);
    expect_equal("__syncthreads_count", mine[11], 6);
    expect_equal("__syncthreads_or, _and", mine[12], 3);
  }
}

template <int W>
__global__ void reduce_kernel(const float* x, float* out, float* out_max) {
  struct Shared { float scratch[4]; };
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
}

template <int W>
void check_reduction() {
  Array<float> x(128), out(128 * 24), out_max(128 * 8);
  std::mt19937 random(W);
  for (float& v : x) v = float(int(random() % 1000)) - 500.0f;  // sums are exact
  launch(blocks_of(1, 128, 16), "reduce_kernel", reduce_kernel<W>, x.device(), out.device(),
         out_max.device());
  out.fetch();
  out_max.fetch();
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
    for (int round = 0; round < 3; ++round)
      expect_equal("block_sum", out[t * 24 + 20 + round], total + 128 * round);
  }
}

void check_reductions() {
  check_reduction<1>();
  check_reduction<2>();
  check_reduction<8>();
  check_reduction<32>();
}

// ---- atomics, a ticket ------------------------------------------------------------------------------------

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
  Array<int> counters(5);
  Array<float> sum(1), total(1), partial(64);
  Array<unsigned> ticket(1);
  launch(blocks_of(blocks, 64, 16), "atomic_kernel", atomic_kernel, counters.device(), sum.device(),
         ticket.device(), partial.device(), total.device());
  counters.fetch();
  sum.fetch();
  total.fetch();
  ticket.fetch();
  expect_equal("atomicAdd", counters[0], n);
  expect_equal("atomicMax", counters[1], n - 1);
  expect_equal("atomicMin", counters[2], 1 - n);
  expect_equal("atomicOr", counters[3], (1 << 20) - 1);
  expect(counters[4] >= 1, "atomicCAS", counters[4], 1);
  expect_equal("atomicAdd of floats", sum[0], n * 0.5);
  expect_equal("last block's sum", total[0], double(n) * (n - 1) / 2);
  expect_equal("ticket", ticket[0], 0);
}

// ---- tensor cores -----------------------------------------------------------------------------------------

// C[16, 8] = A[16, k] B[8, k]^T by one warp; BT: B arrives as [k, 8] and goes through the transposing
// ldmatrix.
template <typename T>
__global__ void mma_kernel(const T* a, const T* b, const T* bt, float* c, float* c_trans, int k) {
  struct Shared { alignas(16) T a[16][24], b[8][24], bt[16][8]; };
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
  Array<T> a(16 * k), b(8 * k), bt(k * 8);
  Array<float> c(128), c_trans(128);
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (int i = 0; i < 16 * k; ++i) a[i] = T(normal(random));
  for (int i = 0; i < 8 * k; ++i) bt[i % k * 8 + i / k] = b[i] = T(normal(random));
  launch(blocks_of(1, 32, 2048), "mma_kernel", mma_kernel<T>, a.device(), b.device(), bt.device(), c.device(),
         c_trans.device(), k);
  c.fetch();
  c_trans.fetch();
  for (int i = 0; i < 128; ++i) {
    double sum = 0;
    for (int j = 0; j < k; ++j) sum += double(float(a[i / 8 * k + j])) * float(b[i % 8 * k + j]);
    expect_close(what, c[i], sum, 1e-4);
    expect_close(what, c_trans[i], sum, 1e-4);
  }
}

void check_mma() {
  check_mma_of<half>("mma of half");
  check_mma_of<bf16>("mma of bf16");
}

// C[64 warpgroups, 8 B] = A B^T, k long: each warpgroup has 64 rows of A; all of them share B's tile.
template <typename T, int B>
__global__ void wgmma_kernel(const T* a, const T* b, float* c, int k) {
#if LAB_WGMMA
  struct Shared { T a[2][64][64], b[8 * B][64]; };
  auto& s = smem<Shared>();
  const int thread = threadIdx.x, group = thread / 128, lane = thread % 32, chunk = thread % 8;
  float d[B][4] = {};
  for (int k0 = 0; k0 < k; k0 += 64) {
    const auto bring = [&](T(*tile)[64], const T* from, int row) {
      cp_async16(&tile[row][(chunk ^ (row % 8)) * 8], from + row * k + k0 + chunk * 8);
    };
    for (int row = thread / 8; row < 128; row += 32) bring(s.a[0], a, row);
    for (int row = thread / 8; row < 8 * B; row += 32) bring(s.b, b, row);
    cp_async_commit();
    cp_async_wait<0>();
    wgmma_publish();
    __syncthreads();
    wgmma_begin();
    for (int col = 0; col < 64; col += 16) wgmma(d, &s.a[group][0][col], &s.b[0][col]);
    wgmma_commit();
    wgmma_wait<0>();
    __syncthreads();
  }
  for (int j = 0; j < B; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int row = thread / 32 * 16 + lane / 4 + i / 2 * 8;
      c[row * 8 * B + j * 8 + lane % 4 * 2 + i % 2] = d[j][i];
    }
  }
#endif
}

template <typename T, int B>
void check_wgmma_of(const char* what) {
  const int k = 192, columns = 8 * B;
  Array<T> a(128 * k), b(columns * k);
  Array<float> c(128 * columns);
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (auto& x : a) x = T(normal(random));
  for (auto& x : b) x = T(normal(random));
  launch(blocks_of(1, 256, 16384 + columns * 128), "wgmma_kernel", wgmma_kernel<T, B>, a.device(), b.device(),
         c.device(), k);
  c.fetch();
  for (int i = 0; i < 128 * columns; ++i) {
    double sum = 0;
    for (int j = 0; j < k; ++j) sum += double(float(a[i / columns * k + j])) * float(b[i % columns * k + j]);
    expect_close(what, c[i], sum, 1e-3);
  }
}

void check_wgmma() {
  check_wgmma_of<half, 2>("wgmma of half, 16 columns");
  check_wgmma_of<half, 4>("wgmma of half, 32 columns");
  check_wgmma_of<bf16, 4>("wgmma of bf16, 32 columns");
  check_wgmma_of<bf16, 8>("wgmma of bf16, 64 columns");
}

// ---- Hopper -----------------------------------------------------------------------------------------------

// One producer warp streams tiles through a ring of bulk copies; four warps add them up.
template <int Stages, int Tile>
__global__ void pipeline_kernel(const float* x, float* out, int tiles) {
#if LAB_SM90
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
#endif
}

void check_pipeline() {
  const int tile = 256, tiles = 11, blocks = 3;
  Array<float> x(blocks * tiles * tile), out(blocks);
  for (int i = 0; i < blocks * tiles * tile; ++i) x[i] = float(i % 7);
  launch(blocks_of(blocks, 160, 3200), "pipeline_kernel", pipeline_kernel<3, tile>, x.device(), out.device(),
         tiles);
  out.fetch();
  for (int b = 0; b < blocks; ++b) {
    double sum = 0;
    for (int i = 0; i < tiles * tile; ++i) sum += x[b * tiles * tile + i];
    expect_equal("pipeline", out[b], sum);
  }
}

// Blocks that run together pass values on in tagged words, round after round: each adds up what all have
// written. A round's words are written again two rounds later, when all blocks have read them.
__global__ void exchange_kernel(uint64_t* words, float* out, int rounds) {
  float value = float(blockIdx.x + 1);
  for (int round = 1; round <= rounds; ++round) {
    uint64_t* mine = words + round % 2 * gridDim.x;
    if (threadIdx.x == 0) store_word(mine + blockIdx.x, uint64_t(round) << 32 | bit_cast<uint32_t>(value));
    float sum = 0;
    for (unsigned block = 0; block < gridDim.x; block += 2) {
      uint64_t found[2];
      for (load_words(found, mine + block);
           found[0] >> 32 != unsigned(round) || found[1] >> 32 != unsigned(round);) {
        spin_pause();
        load_words(found, mine + block);
      }
      sum += bit_cast<float>(uint32_t(found[0])) + bit_cast<float>(uint32_t(found[1]));
    }
    value = sum - 2 * value;
    __syncthreads();  // all of the block have read this round's words
  }
  if (threadIdx.x == 0) out[blockIdx.x] = value;
}

void check_exchange() {
  const int blocks = 4, rounds = 5;
  Array<uint64_t> words(2 * blocks);
  Array<float> out(blocks);
  Config config = blocks_of(blocks, 64);
  config.cooperative = true;
  launch(config, "exchange_kernel", exchange_kernel, words.device(), out.device(), rounds);
  out.fetch();
  float values[blocks] = {1, 2, 3, 4};
  for (int round = 0; round < rounds; ++round) {
    const float sum = values[0] + values[1] + values[2] + values[3];
    for (float& value : values) value = sum - 2 * value;
  }
  for (int b = 0; b < blocks; ++b) expect_equal("exchange", out[b], values[b]);
}

__global__ void cluster_kernel(const float* x, float* out, int n) {
#if LAB_SM90
  struct Shared { float part; };
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
#endif
}

void check_clusters() {
  Array<float> x(12 * 100), out(3);
  for (int i = 0; i < 1200; ++i) x[i] = float(i % 11);
  launch(blocks_of(12, 32, 4, 4), "cluster_kernel", cluster_kernel, x.device(), out.device(), 100);
  out.fetch();
  for (int c = 0; c < 3; ++c) {
    double sum = 0;
    for (int i = 0; i < 400; ++i) sum += x[c * 400 + i];
    expect_equal("cluster", out[c], sum);
  }
}

// Two halves of a block, each with its own barrier, pass a value along their warps.
__global__ void named_barrier_kernel(int* out) {
  struct Shared { int value[2]; };
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
  Array<int> out(128);
  launch(blocks_of(1, 128, 8), "named_barrier_kernel", named_barrier_kernel, out.device());
  out.fetch();
  for (int t = 0; t < 128; ++t) expect_equal("named_barrier", out[t], t < 64 ? 64 : 164);
}

// ---- cp.async: groups, zero fill --------------------------------------------------------------------------

__global__ void copy_kernel(const float* x, float* out, int tiles) {
  struct Shared { alignas(16) float tile[3][32][4]; };
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
  Array<float> x(tiles * 128), out(32);
  for (int i = 0; i < tiles * 128; ++i) x[i] = float(i % 13);
  launch(blocks_of(1, 32, 3 * 512), "copy_kernel", copy_kernel, x.device(), out.device(), tiles);
  out.fetch();
  for (int lane = 0; lane < 32; ++lane) {
    double sum = 0;
    int from = (lane + 1) % 32;
    for (int t = 0; t < tiles; ++t) {
      for (int i = 0; i < 4; ++i) sum += t < 2 || from < 20 ? x[(t * 32 + from) * 4 + i] : 0.0f;
    }
    expect_equal("cp_async16", out[lane], sum);
  }
}

// ---- 16-bit floats, vectors, math -------------------------------------------------------------------------

template <typename T>
__global__ void decode_kernel(float* out) {
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = to_float(bit_cast<T>(uint16_t(i)));
}
template <typename T>
__global__ void encode_kernel(const float* x, uint16_t* out) {
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = bit_cast<uint16_t>(from_float<T>(x[i]));
}

// All 65536 values there and back; between two neighbours, rounding to the nearest and halfway to the even
// one.
template <typename T>
void check_float16_of(const char* what, int mantissa_bits, int bias) {
  const unsigned n = 65536, infinity = 0x8000u - (1u << mantissa_bits);
  Array<float> value(n), x(n), below(n), above(n);
  Array<uint16_t> same(n), tie(n), under(n), over(n);
  launch(blocks_of(n / 256, 256), "decode_kernel", decode_kernel<T>, value.device());
  value.fetch();
  for (unsigned i = 0; i < n; ++i) {
    double mantissa = i % (1u << mantissa_bits), scale = std::ldexp(1.0, -mantissa_bits),
           sign = i & 0x8000u ? -1 : 1;
    int exponent = int((i & 0x7fffu) >> mantissa_bits);
    if ((i & 0x7fffu) > infinity) {
      expect(value[i] != value[i], what, value[i], NAN);
    } else if ((i & 0x7fffu) == infinity) {
      expect_equal(what, value[i], sign * INFINITY);
    } else {
      double fraction = exponent > 0 ? 1 + mantissa * scale : 2 * mantissa * scale;
      expect_equal(what, value[i], sign * std::ldexp(fraction, exponent - bias));
    }
  }
  for (unsigned i = 0; i < n; ++i) {
    x[i] = value[i];
    if ((i & 0x7fffu) >= infinity - 1) continue;
    x[i] = float((double(value[i]) + value[i + 1]) / 2);
    below[i] = std::nextafterf(x[i], value[i]);
    above[i] = std::nextafterf(x[i], value[i + 1]);
  }
  launch(blocks_of(n / 256, 256), "encode_kernel", encode_kernel<T>, value.device(), same.device());
  launch(blocks_of(n / 256, 256), "encode_kernel", encode_kernel<T>, x.device(), tie.device());
  launch(blocks_of(n / 256, 256), "encode_kernel", encode_kernel<T>, below.device(), under.device());
  launch(blocks_of(n / 256, 256), "encode_kernel", encode_kernel<T>, above.device(), over.device());
  for (auto* array : {&same, &tie, &under, &over}) array->fetch();
  for (unsigned i = 0; i < n; ++i) {
    expect_equal(what, same[i], (i & 0x7fffu) > infinity ? 0x7fff : i);
    if ((i & 0x7fffu) >= infinity - 1) continue;
    expect_equal(what, tie[i], i + (i & 1));
    expect_equal(what, under[i], i);
    expect_equal(what, over[i], i + 1);
  }
}

__global__ void float16_kernel(const float* x, uint16_t* encoded, float* out) {
  for (int i = 0; i < 3; ++i) encoded[i] = bit_cast<uint16_t>(from_float<half>(x[i]));
  half h = 1.5f;
  h += half(2);
  out[0] = to_float(h * half(2.0f));
  __nv_bfloat162 pair = __floats2bfloat162_rn(1.0f, -2.0f);
  out[1] = __low2float(pair) + __high2float(pair + pair);
  out[2] = __half22float2(__hfma2(half2(2, 3), half2(4, 5), half2(1, 1))).y;
  out[3] = to_float(__hmax(half(1.0f), __ushort_as_half(0x7e00)));
}

void check_float16() {
  check_float16_of<half>("half", 10, 15);
  check_float16_of<bf16>("bf16", 7, 127);
  Array<float> x(3), out(4);
  Array<uint16_t> encoded(3);
  x[0] = 65520.0f, x[1] = 65519.9f, x[2] = -1e30f;
  launch(blocks_of(1, 1), "float16_kernel", float16_kernel, x.device(), encoded.device(), out.device());
  encoded.fetch();
  out.fetch();
  expect_equal("half overflow", encoded[0], 0x7c00);
  expect_equal("half largest", encoded[1], 0x7bff);
  expect_equal("half -overflow", encoded[2], 0xfc00);
  expect_equal("half arithmetic", out[0], 7);
  expect_equal("__nv_bfloat162", out[1], -3);
  expect_equal("__hfma2", out[2], 16);
  expect_equal("__hmax with NaN", out[3], 1);
}

__global__ void math_kernel(unsigned* bits, float* out, bf16* x) {
  bits[0] = __popc(0xf0f0u);
  bits[1] = __clz(1);
  bits[2] = __ffs(8);
  bits[3] = __brev(1u);
  bits[4] = __umulhi(0xffffffffu, 0xffffffffu);
  bits[5] = __byte_perm(0x33221100u, 0x77665544u, 0x7520u);
  bits[6] = unsigned(__dp4a(0x01ff02fe, 0x04030201, 10));
  bits[7] = __funnelshift_l(0x80000000u, 1u, 1);
  out[0] = fmaxf(NAN, 1.0f) + fmaxf(2.0f, NAN);
  out[1] = float(min(3, 5)) + max(2.5f, 1.0f);
  out[2] = rsqrtf(4.0f);
  out[3] = fmadd(2.0f, 3.0f, 4.0f);
  Vec<bf16> v = load(x + 8);
  store(x, v);
  store(x + 9, load<1>(x + 2));
  store(x + 12, load<2>(x + 14));
  out[4] = to_float(load_stream(x + 16).v[3]);
  out[5] = v.size;
}

void check_math() {
  Array<unsigned> bits(8);
  Array<float> out(6);
  Array<bf16> x(24);
  for (int i = 0; i < 24; ++i) x[i] = bf16(float(i));
  launch(blocks_of(1, 1), "math_kernel", math_kernel, bits.device(), out.device(), x.device());
  bits.fetch();
  out.fetch();
  x.fetch();
  const unsigned want_bits[8] = {8, 31, 4, 0x80000000u, 0xfffffffeu, 0x77552200u, 10 + 4 - 3 + 4 - 2, 3};
  for (int i = 0; i < 8; ++i) expect_equal("integer intrinsics", bits[i], want_bits[i]);
  const float want[6] = {3, 5.5f, 0.5f, 10, 19, 8};
  for (int i = 0; i < 6; ++i) expect_equal("math", out[i], want[i]);
  const int want_x[16] = {8, 9, 10, 11, 12, 13, 14, 15, 8, 10, 10, 11, 14, 15, 14, 15};
  for (int i = 0; i < 16; ++i) expect_equal("load, store", float(x[i]), want_x[i]);
}

// ---- launches ---------------------------------------------------------------------------------------------

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

__global__ void waiting_add_kernel(int* sum, int value) {
  pdl_wait();
  atomicAdd(sum, value);
}

void check_launches() {
  Array<int> out(1);
  int* sum = out.device();
  set_trace(true);
  launch(blocks_of(10, 100), "first", add_kernel, sum, 1);
  launch(blocks_of(3, 1), "second", add_kernel, sum, 2);
  out.fetch();
  expect_equal("sum", out[0], 1006);
  std::vector<std::string> names = take_trace();
  expect_equal("trace", names.size() == 2 && names[0] == "first" && names[1] == "second", 1);
  set_trace(false);
  launch(blocks_of(1, 1), "third", add_kernel, sum, 1);
  expect_equal("trace off", double(take_trace().size()), 0);
  // Messages beyond the kernel's name are this layer's on the CPU and CUDA's on the GPU.
  auto refused = [&](const char* what, const char* host_part, const Config& config) {
    std::string part = std::string("kernel add_kernel: ") + (kHost ? host_part : "");
    expect_throw(what, part.c_str(), [&] { launch(config, "add_kernel", add_kernel, sum, 1); });
  };
  refused("no blocks", "invalid grid (0,1,1)", blocks_of(0, 32));
  refused("big block", "invalid block (1025,1,1)", blocks_of(1, 1025));
  refused("shared memory", "1048576 bytes of shared memory", blocks_of(1, 1, 1 << 20));
  refused("cluster", "a cluster of 4", blocks_of(6, 1, 0, 4));
  launch(blocks_of(1, 1, 150 * 1024), "big_smem", add_kernel, sum,
         1);  // above 48 KiB a GPU must be asked first
  Config dependent = blocks_of(2, 1);
  dependent.pdl = true;
  launch(dependent, "dependent", waiting_add_kernel, sum, 1);
#ifndef __CUDACC__
  int ignored = 0;  // a kernel that has run all the same
  expect_throw("no wait",
               "kernel add_kernel: allows programmatic dependent launch, but no thread called pdl_wait()",
               [&] { launch(dependent, "add_kernel", add_kernel, &ignored, 1); });
#endif
  out.fetch();
  expect_equal("sum", out[0], 1010);
  expect_throw("dtype", "unknown dtype code 3", [] { by_dtype(3, [](auto) {}); });
  int codes = 0;
  for (int code : {0, 1, 2}) by_dtype(code, [&](auto tag) { codes = codes * 10 + int(sizeof(tag)); });
  expect_equal("by_dtype", codes, 422);
}

// ---- the host layer alone ---------------------------------------------------------------------------------

#ifndef __CUDACC__
void check_threads() {  // more and fewer OS threads, from one launch to the next
  host::Options options = host::get_options();
  for (int threads : {1, 2, 5, 3}) {
    options.threads = threads;
    host::set_options(options);
    int sum = 0;
    launch(blocks_of(100, 33), "add_kernel", add_kernel, &sum, 1);
    expect_equal("threads", sum, 3300);
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
#endif

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string, void (*)()> checks = {
      {"indices", check_indices},   {"shuffles", check_shuffles}, {"reductions", check_reductions},
      {"atomics", check_atomics},   {"mma", check_mma},           {"named_barriers", check_named_barriers},
      {"copies", check_copies},     {"float16", check_float16},   {"math", check_math},
      {"pipeline", check_pipeline}, {"clusters", check_clusters}, {"launches", check_launches},
      {"wgmma", check_wgmma},       {"exchange", check_exchange},
#ifndef __CUDACC__
      {"threads", check_threads},   {"callers", check_callers},   {"fork", check_fork},
#endif
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
