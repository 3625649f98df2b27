// The CPU's half of wgmma.cuh. What each name means, and its arguments, is said there.
#pragma once
#include <cstdlib>
#include <cstring>

#include "gpu_features.h"

namespace lab {

namespace host {

// Where chunk `chunk` of row `row` lies; `tile` points at a column of the tile's row 0.
inline const void* tile_chunk(const void* tile, int row, int chunk, Site site) {
  const unsigned char* shared = current->block->smem;
  const size_t at = size_t(static_cast<const unsigned char*>(tile) - shared);
  if (at % 1024 >= 128 || at % 32 != 0) {
    fail("wgmma at %s:%d: a tile begins at a multiple of 1024 bytes, its columns at one of 32", site.file, site.line);
  }
  return shared + ((at + size_t(row) * 128 + size_t(chunk) * 16) ^ size_t(row % 8 * 16));
}

// Each thread computes its own part of D, at once; there is nothing to exchange. What a missing wgmma_publish would hide
// is seen here, and so is what a missing wgmma_wait would not have yet.
template <typename T, int Extent>
LAB_NO_TSAN inline void wgmma(float (&d)[Extent][4], const T* a, const T* b, Site site) {
  const auto row_of = [&](const T* tile, int row, float (&out)[16]) {
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

// As sizes.h has it: where the shapes of a Hopper GPU are asked for.
inline bool has_wgmma() {
  const char* shapes = std::getenv("LAB_HOST_SHAPES");
  return shapes != nullptr && strcmp(shapes, "gpu") == 0;
}

inline void wgmma_publish() {}
inline void wgmma_begin() {}
inline void wgmma_commit() {}
template <int N>
inline void wgmma_wait() {}
template <typename T, int Extent>
inline void wgmma(float (&d)[Extent][4], const T* a, const T* b, host::Site site = host::Site::here()) {
  host::wgmma<T>(d, a, b, site);
}

}  // namespace lab
