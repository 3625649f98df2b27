// The ring of weight_ring.cuh for matrices of which some or all are packed (formats/).
//
// A tile is up to 32 segments of a block of 8 rows, which lie together in memory, and their scales: two bulk
// copies. A warp takes two segments at a time, which are one span in formats with spans of two. The tensor core's
// left operand has the 8 rows of one segment in its upper half and the same rows of the other segment in its lower
// half; of the right operand, even columns are x of the first segment and odd columns x of the second. So in the
// result, the upper half's even columns and the lower half's odd columns are sums; the rest is of no use.
#pragma once
#include "../formats/by_format.cuh"
#include "weight_ring.cuh"

namespace lab {

// A matrix that is packed, or, with format 0, a plain one.
template <typename T>
struct PackedMatrix : Matrix<T> {
  const uint8_t* scales;
  int format;
};

constexpr int kPackedTileBytes = 18 * 1024;  // 32 segments of 8 rows, and 8 bytes of scales for each of a row
constexpr int kMostTileSegments = 32;

// How the segments of a row are divided among tiles.
struct PackedTiles {
  int segments, most;  // of a row; in a tile: an even number
  LAB_DEVICE PackedTiles(int segments_, int fit) : segments(segments_) {
    const int tiles = (segments + fit - 1) / fit;
    most = ((segments + tiles - 1) / tiles + 1) & ~1;
  }
};

// Bytes of 8 rows: the codes of a segment; the scales of a span, if groups have them.
template <typename F>
constexpr int kBlockCodes = kBlockRows * Layout<F>::kSegmentBytes;
template <typename F>
constexpr int kBlockScales = F::kGroup ? kBlockRows * Layout<F>::Scales::kBytes : 0;
// The most segments of a tile: an even number. A ring of all formats (Spans) has 32 or 16, which are two pairs for
// each warp, or one: with a few more than 16 most warps would have nothing to do for a while, and two pairs of a
// format with many scales would make the kernel spill registers.
template <typename F>
constexpr int kTileRoom = kPackedTileBytes / (kBlockCodes<F> + kBlockScales<F> / Layout<F>::kSpan) & ~1;
template <typename F, bool Spans>
constexpr int kTileSegments = kTileRoom<F> >= kMostTileSegments ? kMostTileSegments
                              : Spans                           ? 2 * kRingWarps
                                                                : kTileRoom<F>;

// The most columns of a span, in a ring of all formats (Spans) or of those with spans of one segment.
template <bool Spans>
constexpr int kMostColumns = Spans ? 256 : 128;

// The formats that a ring takes. Spans: also those whose scales belong to several segments.
template <bool Spans, typename Use>
LAB_DEVICE void by_ring_format(int number, Use&& use) {
  by_format(number, [&](auto format) {
    if constexpr (Spans || Layout<decltype(format)>::kSpan == 1) use(format);
  });
}

// A tile that has arrived.
struct PackedTile {
  const uint8_t *codes, *scales;
  int segments;
};

// Spans: whether it takes all weight formats, or only those whose scales belong to one segment each. To take all
// costs the others registers.
template <typename T, bool Spans = false>
struct PackedRing : WeightRing<T, kPackedTileBytes, kBlockRows> {
  using Plain = WeightRing<T, kPackedTileBytes, kBlockRows>;
  using Plain::Plain;

  // As WeightRing::issue().
  LAB_DEVICE void issue(const PackedMatrix<T>& m) {
    if (m.format == int(Format::plain)) return Plain::issue(m);
    by_ring_format<Spans>(m.format, [&](auto format) { issue_packed<decltype(format)>(m); });
  }

  // As WeightRing::multiply(). x has zeros from k to the end of the last span.
  template <typename Base, typename Epilogue>
  LAB_DEVICE void multiply(const PackedMatrix<T>& m, const Share& share, const T* x, Base base,
                           Epilogue& epilogue) {
    if (m.format == int(Format::plain)) return Plain::multiply(m, share, x, base, epilogue);
    const int batch = kBatchRows >> (m.parts - 1);
    for (int first = share.first; first < share.last; first += batch) {
      const int outputs = min(batch, share.last - first);
      if (first > share.first && int(threadIdx.x) < outputs) base = epilogue.load(first + threadIdx.x);
      for (int part = 0; part < m.parts; ++part) {
        by_ring_format<Spans>(m.format, [&](auto format) {
          const auto to = sum_rows<decltype(format)>(*this, x, m.k, outputs, part * (kBatchRows / 2));
          this->stage = to.stage, this->parity = to.parity;
        });
      }
      this->store_sums(m.parts, first, outputs, base, epilogue);
    }
  }

 private:
  template <typename F>
  LAB_DEVICE void issue_packed(const PackedMatrix<T>& m) {
    using L = Layout<F>;
    static_assert(kBlockScales<F> % 16 == 0, "bulk copies have multiples of 16 bytes");
    static_assert(2 % L::kSpan == 0, "tiles, which have pairs of segments, have whole spans");
    static_assert(kTileSegments<F, Spans> <= kTileRoom<F>, "a tile fits into its place");
    const PackedTiles tiles(L::segments(m.k), kTileSegments<F, Spans>);
    const auto* codes = reinterpret_cast<const unsigned char*>(m.w);
    const Share share = this->share(m.n);
    const int batch = kBatchRows >> (m.parts - 1);
    int issued = 0;
    for (int first = share.first; first < share.last; first += batch) {
      for (int part = 0; part < m.parts; ++part) {
        const int begin = part * m.n + first, end = begin + min(batch, share.last - first);
        for (int row = begin; row < end; row += kBlockRows) {
          const size_t block = size_t(row / kBlockRows);
          for (int segment = 0; segment < tiles.segments; segment += tiles.most) {
            const int here = min(tiles.most, tiles.segments - segment);
            const bool row_scales = F::kGroup == 0 && segment + here == tiles.segments;
            const unsigned code_bytes = here * kBlockCodes<F>;
            const unsigned scale_bytes = F::kGroup    ? here / L::kSpan * kBlockScales<F>
                                         : row_scales ? kBlockRows * L::Scales::kBytes
                                                      : 0;
            // As many bytes in flight as with whole tiles.
            const int most =
                (issued++ < this->count ? this->few : kMostInFlight) * kTileBytes / int(code_bytes);
            this->begin(code_bytes + scale_bytes, max(1, min(most, this->count)));
            auto* to = reinterpret_cast<unsigned char*>(this->tile());
            auto* full = &this->shared.full[this->stage];
            const size_t at = block * tiles.segments + segment;
            bulk_copy_g2s(to, codes + at * kBlockCodes<F>, code_bytes, full);
            const size_t scales_at =
                F::kGroup ? at / L::kSpan * kBlockScales<F> : block * kBlockRows * L::Scales::kBytes;
            if (scale_bytes) bulk_copy_g2s(to + code_bytes, m.scales + scales_at, scale_bytes, full);
            this->advance();
          }
        }
      }
    }
  }

  // Multiplies the next tiles with x: `outputs` rows of one part, whose sums go to `partial` from row `first` on.
  // Returns the ring as it is then. Called, not inlined: with one copy for each format in each phase the kernel
  // would not fit the instruction cache.
  template <typename F>
  static LAB_DEVICE_CALL Plain sum_rows(Plain ring, const T* x, int k, int outputs, int first) {
    using L = Layout<F>;
    const PackedTiles tiles(L::segments(k), kTileSegments<F, Spans>);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
    for (int row = 0; row < outputs; row += kBlockRows) {
      float sum = 0.f, row_scale = 1.f;
      for (int begin = 0; begin < tiles.segments; begin += tiles.most) {
        const int here = min(tiles.most, tiles.segments - begin);
        ring.wait();
        const auto* codes = reinterpret_cast<const uint8_t*>(ring.tile());
        const PackedTile tile{codes, codes + here * kBlockCodes<F>, here};
        // Up to two pairs of segments for each warp, at once: their instructions hide each other's latency.
        if (kTileSegments<F, Spans> > 2 * kRingWarps && here > 2 * kRingWarps) {
          sum += sum_pairs<F, 2>(tile, x + begin * L::kColumns);
        } else {
          sum += sum_pairs<F, 1>(tile, x + begin * L::kColumns);
        }
        if (F::kGroup == 0 && begin + here == tiles.segments) {
          row_scale = reinterpret_cast<const float*>(tile.scales)[g];
        }
        ring.release();
      }
      if (lane % 4 == 0) ring.shared.partial[first + row + g][warp] = sum * row_scale;
    }
    return ring;
  }

  // The products of this warp's pairs of segments, of this lane's row, with x. x: of the tile's first segment.
  // Each sum of a run begins with zero, so that no multiply waits for another run's.
  template <typename F, int Pairs>
  static LAB_DEVICE float sum_pairs(const PackedTile& tile, const T* x) {
    using L = Layout<F>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    UnitWords<F> words[Pairs][2];
    typename L::Scales scales[Pairs][2];
    const T* of_x[Pairs];
    bool counts[Pairs][2];
    LAB_UNROLL
    for (int i = 0; i < Pairs; ++i) {
      LAB_UNROLL
      for (int side = 0; side < 2; ++side) {
        // Past the end the last segment (or span) is multiplied once more, and does not count. A span is a
        // pair, so that the side is the segment's place in it.
        const int pair = warp + i * kRingWarps, segment = 2 * pair + side;
        const int span = min(L::kSpan == 1 ? segment : pair, tile.segments / L::kSpan - 1);
        const int there = L::kSpan == 1 ? span : 2 * span + side;
        words[i][side] =
            load_unit<F, true>(tile.codes + (there * kBlockRows + g) * L::kSegmentBytes + t * 16, t);
        if constexpr (F::kGroup != 0) {
          const uint8_t* at = tile.scales + (span * kBlockRows + g) * L::Scales::kBytes;
          scales[i][side].load_from(at, side % L::kSpan);
        }
        counts[i][side] = segment == there;
        if (g % 2 == side) of_x[i] = x + there * L::kColumns + 4 * t;
      }
    }
    // In the odd segments the runs of a pair change places: otherwise the two x of a load would lie in the same
    // banks.
    const int swap = g % 2 ? kRunColumns : 0;
    float sums[Pairs][2] = {};
    LAB_UNROLL
    for (int run = 0; run < L::kRuns; ++run) {
      LAB_UNROLL
      for (int i = 0; i < Pairs; ++i) {
        const T* from = of_x[i] + (run % 2 ? run * kRunColumns - swap : run * kRunColumns + swap);
        add_run<F>(sums[i], words[i], scales[i], from, run);
      }
    }
    float sum = 0.f;
    LAB_UNROLL
    for (int i = 0; i < Pairs; ++i) {
      LAB_UNROLL
      for (int side = 0; side < 2; ++side) sum += counts[i][side] ? sums[i][side] : 0.f;
    }
    return sum;
  }

  // sums[side] += run `run` of the even segment (side 0), and the run that it changes places with of the odd one.
  template <typename F>
  static LAB_DEVICE void add_run(float (&sums)[2], const UnitWords<F> (&words)[2],
                                 const typename Layout<F>::Scales (&scales)[2], const T* x, int run) {
    using L = Layout<F>;
    uint32_t pairs[2][4];
    constexpr int kGroups = L::kPart == 16 ? 2 : 1;  // of a run
    const int runs[2] = {run, run ^ 1};
    int group[2];  // the first of each run
    LAB_UNROLL
    for (int side = 0; side < 2; ++side) {
      group[side] = runs[side] * kRunColumns / L::kPart;
      const float zero = F::kZero ? scales[side].second(group[side], 0) : 0.f;
      F::template numbers<T>(pairs[side], run_words<F>(words[side], runs[side]).v,
                             F::template zero_pair<T>(zero));
    }
    float products[kGroups][4] = {}, of_x[4] = {};
    LAB_UNROLL
    for (int part = 0; part < 2; ++part) {
      const int p = 2 * part;
      const auto b = bit_cast<Vec<uint32_t, 2>>(load<4>(x + part * 16));
      mma_m16n8k16(products[part % kGroups], {pairs[0][p], pairs[1][p], pairs[0][p + 1], pairs[1][p + 1]},
                   {b.v[0], b.v[1]}, T{});
      if constexpr (F::kMinimum) {
        const uint32_t one = pair_of(from_float<T>(1.f));
        mma_m16n8k16(of_x, {one, one, one, one}, {b.v[0], b.v[1]}, T{});
      }
    }
    LAB_UNROLL
    for (int side = 0; side < 2; ++side) {
      const int place = side % L::kSpan;
      if constexpr (F::kGroup == 0) {
        sums[side] += products[0][3 * side];
      } else {
        LAB_UNROLL
        for (int i = 0; i < kGroups; ++i) {
          sums[side] = fmadd(scales[side].scale(group[side] + i, place), products[i][3 * side], sums[side]);
        }
        if constexpr (F::kMinimum) {
          static_assert(kGroups == 1, "a minimum is for whole runs");
          sums[side] = fmadd(scales[side].second(group[side], place), of_x[3 * side], sums[side]);
        }
      }
    }
  }
};

}  // namespace lab
