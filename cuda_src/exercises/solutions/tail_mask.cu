// Solution of tail_mask: y[r] = mean of row r of x [rows, cols], by one warp for each row.
//
// The last step of a row read on into the next row, and in the last row beyond the end of x. A lane whose
// column does not exist must read nothing and add zero. It may not leave the loop for good: all 32 lanes
// take part in group_sum.
#include "common.cuh"

using namespace lab;

__global__ void row_mean_kernel(const float* x, float* y, int cols) {
  const float* row = x + blockIdx.x * cols;
  float total = 0.f;
  for (int c0 = 0; c0 < cols; c0 += 32) {
    const int col = c0 + threadIdx.x;
    if (col < cols) total += row[col];
  }
  total = group_sum<32>(total);
  if (threadIdx.x == 0) y[blockIdx.x] = total / cols;
}
