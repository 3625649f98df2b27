// core/wgmma.cuh's names on a CPU. What each name means, and its arguments, is documented there.
//
// The multiplies are carried out when they are waited for. So one that is never waited for is missing from
// the sums, and a tile that is overwritten before the wait gives NaN. A missing wgmma_publish() is not
// noticed: the multiply sees all writes.
#pragma once
#include <cstring>

#include "gpu_features.h"

namespace lab {

namespace host {

// Address of chunk `chunk` of row `row`; `tile` points to a column in the tile's row 0.
inline const void* tile_chunk(const void* tile, int row, int chunk, Site site) {
  const unsigned char* shared = current->block->smem;
  const size_t at = size_t(static_cast<const unsigned char*>(tile) - shared);
  if (at % 1024 >= 128 || at % 32 != 0) {
    fail("wgmma at %s:%d: a tile begins at a multiple of 1024 bytes, its columns at one of 32", site.file,
         site.line);
  }
  return shared + ((at + size_t(row) * 128 + size_t(chunk) * 16) ^ size_t(row % 8 * 16));
}

// Each thread computes its own part of D; nothing is exchanged.
template <typename T, int Extent>
LAB_NO_TSAN inline void multiply_tiles(float* sums, const void* a, const void* b, Site site) {
  auto* d = reinterpret_cast<float (*)[4]>(sums);
  const auto row_of = [&](const void* tile, int row, float (&out)[16]) {
    for (int chunk = 0; chunk < 2; ++chunk) {
      const void* place = tile_chunk(tile, row, chunk, site);
      read_shared(place, 16);
      uint16_t bits[8];
      memcpy(bits, place, sizeof bits);
      for (int i = 0; i < 8; ++i) out[chunk * 8 + i] = float(T::from_bits(bits[i]));
    }
  };
  const int thread = current->linear % 128, g = thread % 32 / 4, t = thread % 4;
  float low[16], high[16], column[16];
  row_of(a, thread / 32 * 16 + g, low);
  row_of(a, thread / 32 * 16 + 8 + g, high);
  for (int j = 0; j < Extent; ++j) {
    for (int i = 0; i < 2; ++i) {
      row_of(b, j * 8 + 2 * t + i, column);
      for (int k = 0; k < 16; ++k) {
        d[j][i] += low[k] * column[k];
        d[j][2 + i] += high[k] * column[k];
      }
    }
  }
}

}  // namespace host

inline void wgmma_publish() {}
inline void wgmma_begin() {}
inline void wgmma_commit() { host::current->products.commit(); }
template <int N>
inline void wgmma_wait() {
  host::current->products.wait(N, [](const host::AsyncProduct& p) { p.multiply(p.d, p.a, p.b, p.site); });
}
template <typename T, int Extent>
inline void wgmma(float (&d)[Extent][4], const T* a, const T* b, host::Site site = host::Site::here()) {
  host::current->products.issue({host::multiply_tiles<T, Extent>, &d[0][0], a, b, site});
}

}  // namespace lab
