// The ladder of quantised_linear: y[b, n] = sum over k of x[b, k] * w[n, k] (+ bias[n]), with w packed as
// int4-g128: w = scale * (code - 8), codes of 4 bits and a scale for 128 columns. From weights that are expanded in
// memory to tensor cores.
//
//   Each rung changes one thing of the rung before it. What it should gain, and why: lab/rungs/.
//   Rungs 1 to 3 read rows of codes as one would write them down first (lab/formats/row_major.py); from rung 4
//   on codes lie as lab/formats/format.py has them. Rungs 1 to 5 read w once for every row of x.
//   No rung rounds a weight: T holds code - 8 exactly, and scales are multiplied in float32.
//   twin  triton_kernels/ladder/quantised_linear.py          the op's own kernel  cuda_src/linear.cu
#include "../core/unpack.cuh"
#include "../formats/int4.cuh"
#include "../sizes.h"
#include "launchers.h"

using namespace lab;

namespace {

constexpr int kGroup = 128;    // columns that share a scale; also those of a segment of the packed layout
constexpr int kWordCodes = 8;  // in a word of 32 bits
constexpr int kGroupWords = kGroup / kWordCodes;
constexpr int kMiddle = 8;  // the code of zero
constexpr int kWarps = 4, kThreads = 32 * kWarps;

template <typename T>
struct Problem {
  const T* x;
  const uint32_t* words;  // of 8 codes
  const half* scales;
  T* expanded;  // [n, groups * 128]: for rung 1
  const T* bias;
  void* y;
  int rows, n, k, groups;  // groups: of a row, the last one filled up
  bool out_f32;

  LAB_DEVICE void put(int b, int row, float sum) const {
    if (bias) sum += to_float(bias[row]);
    const size_t i = size_t(b) * n + row;
    if (out_f32) {
      static_cast<float*>(y)[i] = sum;
    } else {
      static_cast<T*>(y)[i] = from_float<T>(sum);
    }
  }
};

// N neighbouring elements as floats.
template <int N, typename T>
LAB_DEVICE void load_floats(float (&f)[N], const T* from) {
  constexpr int kLoad = N < Vec<T>::size ? N : Vec<T>::size;
  LAB_UNROLL
  for (int i = 0; i < N; i += kLoad) {
    float part[kLoad];
    unpack<T>(part, load_packed<kLoad>(from + i));
    LAB_UNROLL
    for (int e = 0; e < kLoad; ++e) f[i + e] = part[e];
  }
}

// The 8 numbers of a word, the lowest 4 bits first: shift, mask, subtract as integers, convert.
LAB_DEVICE void scalar_numbers(float (&f)[kWordCodes], uint32_t word) {
  LAB_UNROLL
  for (int j = 0; j < kWordCodes; ++j) f[j] = float(int(word >> (4 * j) & 15u) - kMiddle);
}

// What rung 1 launches first: a thread writes the 8 numbers of one word.
template <typename T>
__global__ void quantised_linear_expand_kernel(Problem<T> p) {
  const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size_t(p.n) * p.groups * kGroupWords) return;
  float f[kWordCodes];
  scalar_numbers(f, p.words[i]);
  constexpr int N = Vec<T>::size;
  LAB_UNROLL
  for (int part = 0; part < kWordCodes; part += N) {
    Vec<T> numbers;
    LAB_UNROLL
    for (int e = 0; e < N; ++e) numbers.v[e] = from_float<T>(f[part + e]);
    store(p.expanded + i * kWordCodes + part, numbers);
  }
}

// 1. Unpack to memory: one kernel has written code - 8 of every weight in T; this one multiplies, a warp
// per output, each lane 8 neighbouring columns at a time. Every weight crosses DRAM three times: as 4 bits,
// written as 16, and read again.
template <typename T>
__global__ void quantised_linear_expanded_kernel(Problem<T> p) {
  const int lane = threadIdx.x % 32, row = blockIdx.x * kWarps + threadIdx.x / 32, b = blockIdx.y;
  if (row >= p.n) return;
  const T *w = p.expanded + size_t(row) * p.groups * kGroup, *x = p.x + size_t(b) * p.k;
  const half* scales = p.scales + size_t(row) * p.groups;
  float sum = 0.f;
  for (int c = lane * 8; c < p.k; c += 32 * 8) {
    float number[8], value[8];
    load_floats(number, w + c);
    load_floats(value, x + c);
    const float scale = to_float(scales[c / kGroup]);
    LAB_UNROLL
    for (int e = 0; e < 8; ++e) sum = fmadd(scale * number[e], value[e], sum);
  }
  sum = group_sum<32>(sum);
  if (lane == 0) p.put(b, row, sum);
}

// 2. Scalar unpack: the multiplying kernel reads the codes themselves, 8 in one word, and makes numbers of
// them in registers, one after the other: shift, mask, subtract, convert.
template <typename T>
__global__ void quantised_linear_scalar_kernel(Problem<T> p) {
  const int lane = threadIdx.x % 32, row = blockIdx.x * kWarps + threadIdx.x / 32, b = blockIdx.y;
  if (row >= p.n) return;
  const uint32_t* words = p.words + size_t(row) * p.groups * kGroupWords;
  const T* x = p.x + size_t(b) * p.k;
  const half* scales = p.scales + size_t(row) * p.groups;
  float sum = 0.f;
  for (int c = lane * 8; c < p.k; c += 32 * 8) {
    float number[8], value[8];
    scalar_numbers(number, words[c / kWordCodes]);
    load_floats(value, x + c);
    const float scale = to_float(scales[c / kGroup]);
    LAB_UNROLL
    for (int e = 0; e < 8; ++e) sum = fmadd(scale * number[e], value[e], sum);
  }
  sum = group_sum<32>(sum);
  if (lane == 0) p.put(b, row, sum);
}

// The number of the code in the bits 4 J .. 4 J + 3 of a word, which stays where it is. The float 2^(23 - 4
// J) has a mantissa whose bit 4 J counts 1, so its exponent with the code's bits is 2^(23 - 4 J) + code. To
// mask and to put in the exponent is one instruction (LOP3), if the exponent is in a register. No launch
// has a blockIdx.z but 0, which the compiler does not know; else it would fill the register anew each time.
template <int J>
LAB_DEVICE float number_at(uint32_t word) {
  constexpr uint32_t kExponent = uint32_t(127 + 23 - 4 * J) << 23;
  constexpr float kPower = float(1 << (23 - 4 * J));
  return bit_cast<float>((word & 0xfu << (4 * J)) | (kExponent + blockIdx.z)) - (kPower + float(kMiddle));
}
// The four of the lower half of a word, and the four of the upper half, which is moved down at once.
LAB_DEVICE void numbers_in_place(float (&low)[4], float (&high)[4], uint32_t word) {
  const uint32_t upper = word >> 16;
  low[0] = number_at<0>(word), low[1] = number_at<1>(word);
  low[2] = number_at<2>(word), low[3] = number_at<3>(word);
  high[0] = number_at<0>(upper), high[1] = number_at<1>(upper);
  high[2] = number_at<2>(upper), high[3] = number_at<3>(upper);
}

// 3. Bit tricks: a code becomes bits of a float that is a large power of two plus the code; the power and
// the 8 are subtracted at once. One LOP3 and one subtraction of floats replace shift, mask, subtraction of
// integers and conversion, all four of which an SM does half as many of in a cycle as it adds floats.
template <typename T>
__global__ void quantised_linear_bits_kernel(Problem<T> p) {
  const int lane = threadIdx.x % 32, row = blockIdx.x * kWarps + threadIdx.x / 32, b = blockIdx.y;
  if (row >= p.n) return;
  const uint32_t* words = p.words + size_t(row) * p.groups * kGroupWords;
  const T* x = p.x + size_t(b) * p.k;
  const half* scales = p.scales + size_t(row) * p.groups;
  float sum = 0.f;
  for (int c = lane * 8; c < p.k; c += 32 * 8) {
    float low[4], high[4], value[8];
    numbers_in_place(low, high, words[c / kWordCodes]);
    load_floats(value, x + c);
    const float scale = to_float(scales[c / kGroup]);
    LAB_UNROLL
    for (int e = 0; e < 4; ++e) {
      sum = fmadd(scale * low[e], value[e], sum);
      sum = fmadd(scale * high[e], value[4 + e], sum);
    }
  }
  sum = group_sum<32>(sum);
  if (lane == 0) p.put(b, row, sum);
}

// What a lane multiplies in the packed layout: quarter t of the segments of one row.
struct Quarter {
  const uint32_t* words;
  const half* scales;

  template <typename T>
  LAB_DEVICE Quarter(const Problem<T>& p, int row, int t)
      : words(p.words + segment_place(row, p.groups, kGroupWords) + 4 * t),
        scales(p.scales + segment_place(row, p.groups, 1)) {}
  LAB_DEVICE Vec<uint32_t> codes(int segment) const {  // a word for each of its 4 runs of 32 columns
    return load_stream(words + size_t(segment) * kBlockRows * kGroupWords);
  }
  LAB_DEVICE float scale(int segment) const { return to_float(scales[size_t(segment) * kBlockRows]); }
};

// Columns c .. c + 3 of a row of x, as they are loaded; zeros past k.
template <typename T>
LAB_DEVICE Packed<T, 4> load_four(const T* x, int c, int k) {
  return c < k ? load_packed<4>(x + c) : Packed<T, 4>{};
}
// The values of x for a word: its 8 codes are of the columns c .. c + 3 and c + 16 .. c + 19.
template <typename T>
LAB_DEVICE void load_run(float (&first)[4], float (&second)[4], const T* x, int c, int k) {
  unpack<T>(first, load_four(x, c, k));
  unpack<T>(second, load_four(x, c + 16, k));
}

// The sums of 4 lanes and 4 warps, in a fixed order. Threads 0 to 7 get those of rows 0 to 7.
LAB_DEVICE float sum_of_rows(float mine) {
  auto& sums = smem<float[kWarps][kBlockRows]>();
  mine = group_sum<4>(mine);
  if (threadIdx.x % 4 == 0) sums[threadIdx.x / 32][threadIdx.x % 32 / 4] = mine;
  __syncthreads();
  float sum = 0.f;
  LAB_UNROLL
  for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp][threadIdx.x % kBlockRows];
  return sum;
}

// 4. Packed layout: a lane loads 16 bytes, 32 codes, at once. The segments of 8 rows lie together, so that
// four lanes have a row, and a warp's load is 512 contiguous bytes. The four warps of a block share the 8
// rows, a quarter of the segments each; else there would be an eighth as many warps as before.
template <typename T>
__global__ void quantised_linear_packed_kernel(Problem<T> p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int row0 = blockIdx.x * kBlockRows, b = blockIdx.y;
  const T* x = p.x + size_t(b) * p.k;
  const Quarter w(p, row0 + g, t);  // rows past the last fill its block of 8
  float sum = 0.f;
  for (int s = warp; s < p.groups; s += kWarps) {
    const auto words = w.codes(s);
    const float scale = w.scale(s);
    LAB_UNROLL
    for (int run = 0; run < 4; ++run) {
      float low[4], high[4], first[4], second[4];
      numbers_in_place(low, high, words.v[run]);  // codes 0, 2, 4, 6 and 1, 3, 5, 7
      load_run(first, second, x, s * kGroup + run * kRunColumns + 4 * t, p.k);
      LAB_UNROLL
      for (int e = 0; e < 4; ++e) {
        const auto& value = e < 2 ? first : second;
        sum = fmadd(scale * low[e], value[e % 2 * 2], sum);
        sum = fmadd(scale * high[e], value[e % 2 * 2 + 1], sum);
      }
    }
  }
  sum = sum_of_rows(sum);
  if (threadIdx.x < kBlockRows && row0 + int(threadIdx.x) < p.n) p.put(b, row0 + threadIdx.x, sum);
}

// 5. Scales reused: a lane's 32 codes of a segment share a scale, so it is multiplied with their sum, not
// with each of them.
template <typename T>
__global__ void quantised_linear_scales_kernel(Problem<T> p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int row0 = blockIdx.x * kBlockRows, b = blockIdx.y;
  const T* x = p.x + size_t(b) * p.k;
  const Quarter w(p, row0 + g, t);
  float sum = 0.f;
  for (int s = warp; s < p.groups; s += kWarps) {
    const auto words = w.codes(s);
    float of_group = 0.f;
    LAB_UNROLL
    for (int run = 0; run < 4; ++run) {
      float low[4], high[4], first[4], second[4];
      numbers_in_place(low, high, words.v[run]);
      load_run(first, second, x, s * kGroup + run * kRunColumns + 4 * t, p.k);
      LAB_UNROLL
      for (int e = 0; e < 4; ++e) {
        const auto& value = e < 2 ? first : second;
        of_group = fmadd(low[e], value[e % 2 * 2], of_group);
        of_group = fmadd(high[e], value[e % 2 * 2 + 1], of_group);
      }
    }
    sum = fmadd(w.scale(s), of_group, sum);
  }
  sum = sum_of_rows(sum);
  if (threadIdx.x < kBlockRows && row0 + int(threadIdx.x) < p.n) p.put(b, row0 + threadIdx.x, sum);
}

// 6. Tensor cores: a warp multiplies 16 rows of w with 8 rows of x by one instruction. It takes pairs of T,
// which are cut out of a word two at a time, because codes 2p and 2p + 1 lie 16 bits apart
// (formats/int4.cuh). Lane (g, t) holds rows g and g + 8 of w, and row g of x. So w is read and unpacked
// once for 8 sequences, and x is never converted.
constexpr int kMmaRows = 16, kMmaBatch = 8;

struct MmaSums { float warp[kWarps][kMmaBatch][kMmaRows]; };

template <typename T>
__global__ void quantised_linear_mma_kernel(Problem<T> p) {
  using Format = Int4<kGroup, Int4Kind::symmetric>;
  auto& sums = smem<MmaSums>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int row0 = blockIdx.x * kMmaRows, b0 = blockIdx.y * kMmaBatch;
  // Rows past the last repeat it; their sums are not stored.
  const Quarter low(p, min(row0 + g, p.n - 1), t), high(p, min(row0 + 8 + g, p.n - 1), t);
  const T* x = p.x + size_t(min(b0 + g, p.rows - 1)) * p.k;
  const uint32_t zero = Format::zero_pair<T>(0.f);
  float acc[4] = {};
  for (int s = warp; s < p.groups; s += kWarps) {
    const auto low_words = low.codes(s), high_words = high.codes(s);
    const float scales[2] = {low.scale(s), high.scale(s)};
    float of_group[4] = {};
    LAB_UNROLL
    for (int run = 0; run < 4; ++run) {
      uint32_t a[4], c[4];
      Format::numbers<T>(a, &low_words.v[run], zero);
      Format::numbers<T>(c, &high_words.v[run], zero);
      LAB_UNROLL
      for (int part = 0; part < 2; ++part) {  // 16 columns each
        const int column = s * kGroup + run * kRunColumns + part * 16 + 4 * t;
        const auto of_x = bit_cast<Vec<uint32_t, 2>>(load_four(x, column, p.k));
        const int i = 2 * part;
        mma_m16n8k16(of_group, {a[i], c[i], a[i + 1], c[i + 1]}, {of_x.v[0], of_x.v[1]}, T{});
      }
    }
    LAB_UNROLL
    for (int i = 0; i < 4; ++i) acc[i] = fmadd(scales[i / 2], of_group[i], acc[i]);
  }
  LAB_UNROLL
  for (int i = 0; i < 4; ++i) sums.warp[warp][2 * t + i % 2][g + i / 2 * 8] = acc[i];
  __syncthreads();
  const int r = threadIdx.x % kMmaRows, b = threadIdx.x / kMmaRows;  // 128 threads, 128 outputs
  float sum = 0.f;
  LAB_UNROLL
  for (int s = 0; s < kWarps; ++s) sum += sums.warp[s][b][r];
  if (row0 + r < p.n && b0 + b < p.rows) p.put(b0 + b, row0 + r, sum);
}

}  // namespace

void quantised_linear_ladder(int rung, const QuantisedLinearArgs& a) {
  by_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    const Problem<T> p{as<const T>(a.x),
                       as<const uint32_t>(a.w.data),
                       as<const half>(a.w.scales),
                       as<T>(a.expanded),
                       as<const T>(a.bias),
                       as<void>(a.y),
                       a.rows,
                       a.n,
                       a.k,
                       ceil_div(a.k, kGroup),
                       a.out_dtype == int(DType::f32)};
    const auto start = [&](const char* name, auto kernel, int outputs_per_block, size_t smem_bytes = 0) {
      launch({dim3(ceil_div(a.n, outputs_per_block), a.rows), dim3(kThreads), smem_bytes, a.stream}, name,
             kernel, p);
    };
    constexpr size_t kSumBytes = sizeof(float) * kWarps * kBlockRows;
    switch (rung) {
      case 1:
        launch(
            {dim3(blocks_for(int64_t(a.n) * p.groups * kGroupWords, kThreads)), dim3(kThreads), 0, a.stream},
            "quantised_linear_expand_kernel", quantised_linear_expand_kernel<T>, p);
        return start("quantised_linear_expanded_kernel", quantised_linear_expanded_kernel<T>, kWarps);
      case 2: return start("quantised_linear_scalar_kernel", quantised_linear_scalar_kernel<T>, kWarps);
      case 3: return start("quantised_linear_bits_kernel", quantised_linear_bits_kernel<T>, kWarps);
      case 4:
        return start("quantised_linear_packed_kernel", quantised_linear_packed_kernel<T>, kBlockRows,
                     kSumBytes);
      case 5:
        return start("quantised_linear_scales_kernel", quantised_linear_scales_kernel<T>, kBlockRows,
                     kSumBytes);
      case 6:
        if constexpr (sizeof(T) == 2) {
          return launch({dim3(ceil_div(a.n, kMmaRows), ceil_div(a.rows, kMmaBatch)), dim3(kThreads),
                         sizeof(MmaSums), a.stream},
                        "quantised_linear_mma_kernel", quantised_linear_mma_kernel<T>, p);
        }
    }
    throw std::invalid_argument("quantised_linear_ladder: no rung " + std::to_string(rung) +
                                " for this dtype");
  });
}
