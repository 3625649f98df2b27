// Matrix product of rows of x with packed rows of w (formats/) in float32 arithmetic: for float32 activations,
// which tensor cores would round, and for every dtype on a CPU.
//
// A lane group takes 4 rows of w and walks along k, 16 bytes of each row at a time. Which format it is, is
// decided at run time, at each 16 bytes: this path is about being right, and on a CPU the choice costs little
// beside the products. The numbers are those of the format exactly, so results are those of a product with
// expanded float32 weights.
#pragma once
#include "../formats/by_format.cuh"
#include "../settings.h"
#include "../sizes.h"
#include "unpack.cuh"

namespace lab {

// B: rows of x at a time. L: lanes in a group, which share k: 32, or 1 on a CPU.
template <int B_, int L_, int Threads, int Parts_>
struct PackedStreamShape {
  static constexpr int B = B_, L = L_, kThreads = Threads, kParts = Parts_;
  static constexpr int R = 4, kOutputs = R / Parts_;  // rows of w, and outputs, of a lane group
  static constexpr int kOutputsPerBlock = Threads / L_ * kOutputs;
  static constexpr int kLanes = L_ == 1 ? 8 : 1;  // sums of each product: one for each lane of a CPU's vector
};

template <typename T_, typename C_>
struct PackedStream {
  using T = T_;
  using C = C_;
  static constexpr int B = C::B, R = C::R, kThreads = C::kThreads, kResident = 1;
  static constexpr int kMost = kMostUnitColumns;

  const T* x;
  PackedWeights w;
  FormatSizes sizes;
  int rows, n, k, lane, output, b0 = 0;
  float sums[R * B];

  explicit LAB_DEVICE PackedStream(const PackedProduct<T>& p)
      : x(p.x), w(p.w), sizes(p.w.format, p.k), rows(p.rows), n(p.n), k(p.k), lane(threadIdx.x % C::L) {}

  LAB_DEVICE void start() {
    pdl_wait();
    pdl_launch_dependents();
    output = first_output();
  }
  // More outputs, or more rows of x for the same outputs; all threads of a block agree.
  LAB_DEVICE bool more() const { return b0 < rows; }
  LAB_DEVICE void next() {
    output += gridDim.x * C::kOutputsPerBlock;
    if (output - threadIdx.x / C::L * C::kOutputs < n) return;
    output = first_output();
    b0 += B;
  }

  LAB_DEVICE void multiply() {
    float acc[R][B][C::kLanes] = {};
    const int units = sizes.segments * 4;
    for (int unit = lane; unit < units; unit += C::L) {
      float xf[B][kMost], wf[kMost];
      LAB_UNROLL
      for (int b = 0; b < B; ++b) load_x(xf[b], min(b0 + b, rows - 1), unit);
      LAB_UNROLL
      for (int r = 0; r < R; ++r) {
        unpack_unit(wf, w, sizes, row_of(r), unit);
        LAB_UNROLL
        for (int b = 0; b < B; ++b) {
          for (int i = 0; i < sizes.unit_columns; i += 8) {
            LAB_UNROLL
            for (int e = 0; e < 8; ++e) {
              float& sum = acc[r][b][e % C::kLanes];
              sum = fmadd(wf[i + e], xf[b][i + e], sum);
            }
          }
        }
      }
    }
    LAB_UNROLL
    for (int i = 0; i < R * B; ++i) {
      sums[i] = 0.f;
      LAB_UNROLL
      for (int e = 0; e < C::kLanes; ++e) sums[i] += acc[i % R][i / R][e];
    }
    if constexpr (C::L == 32) group_sum<32>(sums);
  }

  template <typename Use>
  LAB_DEVICE void each_output(Use use) const {
    LAB_UNROLL
    for (int i = 0; i < C::kOutputs * B; ++i) {
      const int r = i % C::kOutputs, b = i / C::kOutputs;
      if (lane != i % C::L || output + r >= n || b0 + b >= rows) continue;
      const float second = C::kParts == 2 ? sums[b * R + r + C::kOutputs] : 0.f;
      use(output + r, b0 + b, sums[b * R + r], second);
    }
  }

 private:
  LAB_DEVICE int first_output() const {
    return blockIdx.x * C::kOutputsPerBlock + threadIdx.x / C::L * C::kOutputs;
  }
  LAB_DEVICE size_t row_of(int r) const {
    return size_t(r / C::kOutputs) * n + min(output + r % C::kOutputs, n - 1);
  }
  // The columns of a unit, in the order of its codes; zeros past k.
  LAB_DEVICE void load_x(float (&f)[kMost], int b, int unit) const {
    const int first = sizes.first_column(unit);
    const T* row = x + size_t(b) * k;
    const bool whole = (unit / 4 + 1) * sizes.columns <= k;
    for (int i = 0; i < sizes.unit_columns; i += 4) {
      const int col = first + i * 4;
      if (whole) {
        LAB_UNROLL
        for (int e = 0; e < 4; ++e) f[i + e] = to_float(row[col + e]);
        continue;
      }
      for (int e = 0; e < 4; ++e) f[i + e] = col + e < k ? to_float(row[col + e]) : 0.f;
    }
  }
};

}  // namespace lab
