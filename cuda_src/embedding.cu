// embedding: out[r, :] = table[ids[r], :]
//
//   ids [rows] int32   table [vocab, cols]   out [rows, cols]     row-major
//   mapping   one block per row; thread i copies vectors i, i + threads, ... of it
//   traffic   rows * cols elements read and written, and the ids
//   contract  lab/ops/embedding.py          twin  triton_kernels/embedding.py
#include "common.cuh"
#include "formats/by_format.cuh"
#include "launchers/embedding.h"
#include "sizes.h"

using namespace lab;

LAB_DEVICE bool inside(int id, int vocab) { return 0 <= id && id < vocab; }

// The id of this block's row, which the preceding kernel may have written.
LAB_DEVICE int id_of_block(const int* ids) {
  pdl_wait();
  pdl_launch_dependents();
  const int id = ids[blockIdx.x];
  return id;
}

template <typename T, int N>
__global__ void embedding_kernel(const int* ids, const T* table, T* out, int cols, int vocab) {
  // 1. Locate: block r owns row r; an id outside the vocabulary is never used as an address.
  const int id = id_of_block(ids);
  const bool known = inside(id, vocab);
  const T* from = table + size_t(known ? id : 0) * cols;
  T* to = out + size_t(blockIdx.x) * cols;

  // 2. Copy: N elements an access; an id outside the vocabulary gives NaN, which no later kernel can hide.
  for (int col = threadIdx.x * N; col < cols; col += blockDim.x * N) {
    Vec<T, N> v = load<N>(from + col);
    if (!known) {
      for (int e = 0; e < N; ++e) v.v[e] = from_float<T>(NAN);
    }
    store(to + col, v);
  }
}

// A packed table: a thread takes 16 bytes of codes at a time.
template <typename T>
__global__ void embedding_packed_kernel(const int* ids, PackedWeights table, T* out, int cols, int vocab) {
  // 1. Locate: block r owns row r; an id outside the vocabulary is never used as an address.
  const int id = id_of_block(ids);
  const bool known = inside(id, vocab);
  const FormatSizes sizes(table.format, cols);
  T* to = out + size_t(blockIdx.x) * cols;

  // 2. Copy: unpacked in float32, rounded once; an id outside the vocabulary gives NaN, which no later kernel
  // can hide.
  for (int unit = threadIdx.x; unit < sizes.segments * 4; unit += blockDim.x) {
    float f[kMostUnitColumns];
    unpack_unit(f, table, sizes, known ? id : 0, unit);
    for (int i = 0; i < sizes.unit_columns; ++i) {
      const int col = sizes.first_column(unit) + i / 4 * 16 + i % 4;
      if (col < cols) to[col] = from_float<T>(known ? f[i] : NAN);
    }
  }
}

void embedding(const EmbeddingArgs& a) {
  if (a.rows == 0) return;
  by_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (a.table.format != int(Format::plain)) {
      const PackedWeights table{as<const uint8_t>(a.table.data), as<const uint8_t>(a.table.scales),
                                a.table.format};
      return launch({dim3(a.rows), dim3(cpu_shapes() ? 32 : 128), 0, a.stream, true},
                    "embedding_packed_kernel", embedding_packed_kernel<T>, as<const int>(a.ids), table,
                    as<T>(a.out), a.cols, a.vocab);
    }
    by_width<T>(
        [&](auto width) {
          constexpr int N = decltype(width)::value;
          int threads = a.cols / N > 128 ? 256 : 128;
          if (cpu_shapes()) threads = 32;
          launch({dim3(a.rows), dim3(threads), 0, a.stream, true}, "embedding_kernel", embedding_kernel<T, N>,
                 as<const int>(a.ids), as<const T>(a.table.data), as<T>(a.out), a.cols, a.vocab);
        },
        a.cols);
  });
}
