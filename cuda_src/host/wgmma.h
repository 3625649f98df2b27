// core/wgmma.cuh's names on a CPU. What each name means, and its arguments, is documented there.
//
// The multiplies are carried out when they are waited for. So one that is never waited for is missing from
// the sums, a tile that is overwritten before the wait gives NaN, and a register that changes before it is an error.
// A missing wgmma_publish() or wgmma_begin() is not noticed: the multiply sees all writes. Nor is a sum that is read
// or changed before the wait.
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

// 16 columns of a row of a tile.
template <typename T>
LAB_NO_TSAN inline void read_row(float (&out)[16], const void* tile, int row, Site site) {
  for (int chunk = 0; chunk < 2; ++chunk) {
    const void* place = tile_chunk(tile, row, chunk, site);
    read_shared(place, 16);
    uint16_t bits[8];
    memcpy(bits, place, sizeof bits);
    for (int i = 0; i < 8; ++i) out[chunk * 8 + i] = float(T::from_bits(bits[i]));
  }
}

// d += this thread's part: rows g and g + 8 (low, high) of the warp's 16, by columns 8 j + 2 t and the next.
template <typename T, int Extent>
LAB_NO_TSAN inline void multiply_rows(const AsyncProduct& p, const float (&low)[16],
                                      const float (&high)[16]) {
  auto* d = reinterpret_cast<float (*)[4]>(p.d);
  const int t = current->linear % 4;
  float column[16];
  for (int j = 0; j < Extent; ++j) {
    for (int i = 0; i < 2; ++i) {
      read_row<T>(column, p.b, j * 8 + 2 * t + i, p.site);
      if (!p.add) d[j][i] = d[j][2 + i] = 0.f;
      for (int k = 0; k < 16; ++k) {
        d[j][i] += low[k] * column[k];
        d[j][2 + i] += high[k] * column[k];
      }
    }
  }
}

// Each thread computes its own part of D; nothing is exchanged.
template <typename T, int Extent>
LAB_NO_TSAN inline void multiply_tiles(const AsyncProduct& p) {
  const int thread = current->linear % 128, g = thread % 32 / 4;
  float low[16], high[16];
  read_row<T>(low, p.a, thread / 32 * 16 + g, p.site);
  read_row<T>(high, p.a, thread / 32 * 16 + 8 + g, p.site);
  multiply_rows<T, Extent>(p, low, high);
}

// Pairs 0 and 2 of a lane are of row g, 1 and 3 of row g + 8; the first two of columns 2 t and the next, the
// others 8 further on.
template <typename T, int Extent>
LAB_NO_TSAN inline void multiply_registers(const AsyncProduct& p) {
  if (memcmp(p.a, p.of_quad[current->linear % 4], sizeof p.of_quad[0]) != 0) {
    fail("wgmma at %s:%d: its registers changed before the wait", p.site.file, p.site.line);
  }
  float rows[2][16];
  for (int t = 0; t < 4; ++t) {
    for (int pair = 0; pair < 4; ++pair) {
      for (int i = 0; i < 2; ++i) {
        rows[pair % 2][pair / 2 * 8 + 2 * t + i] =
            float(T::from_bits(uint16_t(p.of_quad[t][pair] >> (16 * i))));
      }
    }
  }
  multiply_rows<T, Extent>(p, rows[0], rows[1]);
}

struct Registers { uint32_t r[4]; };
struct QuadRegisters { uint32_t r[4][4]; };
LAB_NO_TSAN inline void combine_quads(Warp& warp, uint32_t) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int t = 0; t < 4; ++t) memcpy(warp.out[lane].bytes + 16 * t, warp.in[lane / 4 * 4 + t].bytes, 16);
  }
}

}  // namespace host

inline void wgmma_publish() {}
inline void wgmma_begin() {}
inline void wgmma_commit() { host::current->products.commit(); }
template <int N>
inline void wgmma_wait() {
  host::current->products.wait(N, [](const host::AsyncProduct& p) { p.multiply(p); });
}
template <int N, int Extent>
inline void wgmma_wait(float (&)[Extent][4]) {
  wgmma_wait<N>();
}
template <typename T, int Extent>
inline void wgmma(float (&d)[Extent][4], const T* a, const T* b, host::Site site = host::Site::here()) {
  host::current->products.issue({host::multiply_tiles<T, Extent>, &d[0][0], a, b, site});
}
template <typename T>
struct WgmmaPlace {
  const T* p;
  explicit WgmmaPlace(const T* p) : p(p) {}
  WgmmaPlace operator+(int elements) const { return WgmmaPlace(p + elements); }
};
template <typename T, int Extent>
LAB_NO_TSAN inline void wgmma(float (&d)[Extent][4], const uint32_t (&a)[4], WgmmaPlace<T> b, bool add = true,
                              host::Site site = host::Site::here()) {
  host::AsyncProduct product{host::multiply_registers<T, Extent>, &d[0][0], a, b.p, site, add};
  host::Registers mine;
  memcpy(mine.r, a, sizeof mine.r);
  const auto quad =
      host::exchange<host::QuadRegisters>(0xffffffffu, mine, host::combine_quads, "wgmma", site);
  memcpy(product.of_quad, quad.r, sizeof quad.r);
  host::current->products.issue(product);
}

}  // namespace lab
