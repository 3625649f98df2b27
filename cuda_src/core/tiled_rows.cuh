// Rows of x laid out in the tiles that packed_wgmma.cuh multiplies, by a kernel of its own.
//
//   x [rows, k]   tiled [2 * (k / 128 rounded up), batch, 64]: 64 columns of all rows lie together, as wgmma reads them
//   from shared memory (wgmma.cuh). Columns past k are zeros; rows past the last are not written, and their products
//   are not stored. (Two tiles, because a segment of 4-bit codes has 128 columns.)
//
// A lane of packed_wgmma.cuh holds four neighbouring columns of w (4 t to 4 t + 3 of 16), and gives them to wgmma as
// columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. So that the columns of x agree, the even pairs of 16 columns come first.
//
// Without this kernel each block has to put all of x in this order itself. 8B's gate and up at 64 rows in int4-g128
// take 43 us with it, this kernel's 2 included, and took 57 without, or 59 where four warps did nothing else (H100).
#pragma once
#include "../sizes.h"

namespace lab {

constexpr int kTileColumns = 64;

// Columns of a row of x, filled up to two tiles.
LAB_HOST_DEVICE int tiled_columns(int k) { return (k + 2 * kTileColumns - 1) & -(2 * kTileColumns); }

template <typename T>
__global__ void __launch_bounds__(256) tile_rows_kernel(const T* x, T* tiled, int rows, int batch, int k) {
  // The product may launch at once: before its own wait, which is for this kernel, it reads weights alone. This
  // wait is also for whoever still reads `tiled`.
  pdl_launch_dependents();
  pdl_wait();
  // A thread moves 16 columns of a row.
  const int row_units = tiled_columns(k) / 16;
  const int unit = blockIdx.x * blockDim.x + threadIdx.x, row = unit / row_units,
            column = unit % row_units * 16;
  if (row >= rows) return;
  Vec<uint32_t> parts[2];
  LAB_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int from = column + 8 * i;  // k is a multiple of 8
    parts[i] =
        from < k ? load<4>(reinterpret_cast<const uint32_t*>(x + size_t(row) * k + from)) : Vec<uint32_t>{};
  }
  T* tile = tiled + size_t(column / kTileColumns) * batch * kTileColumns + row * kTileColumns;
  LAB_UNROLL
  for (int odd = 0; odd < 2; ++odd) {
    const int place = (column % kTileColumns / 8 + odd) ^ row % 8;
    const auto& [low, high] = parts;
    store(reinterpret_cast<uint32_t*>(tile + place * 8),
          Vec<uint32_t>{{low.v[odd], low.v[odd + 2], high.v[odd], high.v[odd + 2]}});
  }
}

template <typename T>
inline void tile_rows(const T* x, T* tiled, int rows, int batch, int k, Ptr stream) {
  const int units = rows * (tiled_columns(k) / 16);
  launch({dim3(ceil_div(units, 256)), dim3(256), 0, stream, true}, "tile_rows_kernel", tile_rows_kernel<T>, x,
         tiled, rows, batch, k);
}

}  // namespace lab
