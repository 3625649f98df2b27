// Matrix product of 17 to 64 rows of x (of 8-bit codes 9 to 64) with packed rows of w (formats/) by the tensor cores
// of Hopper's warpgroups.
//
// As in packed_batch.cuh, but the instruction is wgmma: it takes 64 rows of w from the registers of a warpgroup,
// where they have just been unpacked, and all rows of x from shared memory, which so costs no loads. For formats
// whose scale is that of a whole segment of a row or of more: shorter sums would be waited for too often.
//
// Codes and x come by cp.async, not through registers: what a thread has stored of x must be published before wgmma
// reads it, and that waits for all its loads into registers.
#pragma once
#include "packed_batch.cuh"
#include "wgmma.cuh"

namespace lab {

// C: the shape of a launch. A slot is read by the thread that filled it; its scales by the warp. x goes on to
// a ring of tiles for all; a stage of it is free when all warps have multiplied it.
template <typename T, typename F, typename C>
struct PackedWgmmaSmem : PackedBatchSmem<T, C> {
  static constexpr int kScaleBytes = F::kGroup ? 8 * Layout<F>::Scales::kBytes : 16;  // of 8 rows in a span
  struct Slot {
    Vec<uint32_t> codes[2][C::kThreads], x[2][C::kUnits];
    alignas(16) uint8_t scales[C::kWarps][2][kScaleBytes];
  };
  Slot slots[C::kSlots];
  mbarrier full[C::kStages], empty[C::kStages];
};

// Tiles: of 8 rows of x. Parts: as in packed_batch.cuh.
template <typename F, int Tiles_, int Parts_>
struct PackedWgmmaShape {
  static constexpr int kTiles = Tiles_, kBatch = 8 * kTiles;
  static constexpr int R = 1, kWarps = 16, kThreads = 32 * kWarps, kResident = 1;  // four warpgroups
  static constexpr int kParts = Parts_, kTileOutputs = 16 / Parts_, kWarpOutputs = R * kTileOutputs;
  static constexpr int kOutputs = kWarps * kWarpOutputs;
  static constexpr int kChunk = Layout<F>::kColumns;  // one segment
  static constexpr int kStages = 4 * 128 / kChunk, kSlots = kTiles == 2 ? 8 : kChunk == 128 ? 4 : 6;
  static constexpr int kTileColumns = 64;            // of a tile of x, as wgmma takes it
  static constexpr int kStage = kBatch * kChunk;     // elements of a chunk of x
  static constexpr int kRowUnits = kChunk / 16;      // units of 16 columns in a row of a chunk
  static constexpr int kUnits = kBatch * kRowUnits;  // units in a chunk
  static constexpr int kSums = 16 * R * kWarps + 4;  // floats between two columns of sums: no bank conflicts
  template <typename T>
  using Smem = PackedWgmmaSmem<T, F, PackedWgmmaShape>;
};

// The formats that it takes: a segment has one scale and no minimum, and a lane 16 bytes of its codes.
template <typename F>
constexpr bool kWholeSegments = F::kBits != 6 && !F::kMinimum && Layout<F>::kPart == Layout<F>::kColumns;

template <typename T_, typename F, typename C_>
struct PackedWgmma : PackedBlock<T_, F, C_> {
  using Base = PackedBlock<T_, F, C_>;
  using Base::acc, Base::begin, Base::codes_of, Base::end, Base::g, Base::k, Base::lane, Base::n,
      Base::output;
  using Base::Base;
  using Base::rows, Base::segments, Base::shared, Base::t, Base::w, Base::warp, Base::x;
  using typename Base::C, typename Base::L, typename Base::Scales, typename Base::T;
  static_assert(Base::kSegments == 1 && kWholeSegments<F>, "a chunk is one segment, with one scale");
  // A stage of x is filled so many chunks before it is multiplied.
  static constexpr int kAhead = C_::kStages - 1;
  UnitWords<F> words[2];  // of rows g and g + 8
  Scales scales[2];

  // Issues the first copies of weights, which depend on no earlier kernel, waits for the preceding kernel, and
  // issues the first copies of x.
  LAB_DEVICE void start() {
#if LAB_WGMMA
    if (threadIdx.x == 0) {
      for (int i = 0; i < C::kStages; ++i) {
        mbarrier_init(&shared.full[i], C::kWarps);
        mbarrier_init(&shared.empty[i], C::kWarps);
      }
      mbarrier_fence_init();
    }
    __syncthreads();
    this->aim();
    for (int i = 0; i < C::kSlots; ++i) copy_w(begin + i);
    if (end - begin <= C::kSlots) pdl_launch_dependents();  // no more loads of weights follow
    pdl_wait();
    for (int i = 0; i < C::kSlots; ++i) {
      copy_x(begin + kAhead + i);
      cp_async_commit();
    }
    for (int i = 0; i < kAhead; ++i) {
      pass_x(begin + i, [&](int, int row, int column, int half) {
        const int from = (begin + i) * C::kChunk + column + 8 * half;
        return row < rows && from < k ? load<4>(reinterpret_cast<const uint32_t*>(x + size_t(row) * k + from))
                                      : Vec<uint32_t>{};
      });
    }
#else
    __trap();  // never launched where wgmma is not compiled: has_wgmma() is false
#endif
  }

  // The sums of the outputs; all threads must call it. each_output() then reads them.
  LAB_DEVICE void multiply() {
#if LAB_WGMMA
    this->clear();
    for (int chunk = begin; chunk < end; ++chunk) add(chunk);
    this->share_sums();
#endif
  }

#if LAB_WGMMA
 private:
  LAB_DEVICE auto& slot(int chunk) const { return shared.slots[(chunk - begin) % C::kSlots]; }

  // Copies this thread's codes of a chunk, and some threads the scales of their warp.
  LAB_DEVICE void copy_w(int chunk) {
    if (chunk >= end) return;
    auto& to = slot(chunk);
    LAB_UNROLL
    for (int side = 0; side < 2; ++side) {
      cp_async16(&to.codes[side][threadIdx.x],
                 codes_of[0][side] + size_t(chunk) * (kBlockRows * L::kSegmentBytes));
    }
    if constexpr (F::kGroup != 0) {
      constexpr int kPieces = C::template Smem<T>::kScaleBytes / 16;  // of 8 rows
      const int side = lane / kPieces, piece = lane % kPieces;
      if (lane < 2 * kPieces) {
        // The 8 rows lie together, because n is a multiple of 8.
        const int first = output + warp * C::kWarpOutputs;
        const int row = C::kParts == 2 ? side * n + min(first, n - 8) : min(first + 8 * side, n - 8);
        const size_t place = segment_place(row, segments / L::kSpan, Scales::kBytes) +
                             size_t(chunk / L::kSpan) * (kBlockRows * Scales::kBytes);
        cp_async16(&to.scales[warp][side][16 * piece], w.scales + place + 16 * piece);
      }
    }
  }

  // Calls f(unit, row of x, first column in a chunk) for each of this thread's units.
  template <typename Use>
  LAB_DEVICE void each_unit(Use use) const {
    LAB_UNROLL
    for (int i = 0; i < (C::kUnits + C::kThreads - 1) / C::kThreads; ++i) {
      const int unit = threadIdx.x + i * C::kThreads;
      if (unit < C::kUnits) use(unit, unit / C::kRowUnits, threadIdx.x % C::kRowUnits * 16);
    }
  }

  // Copies this thread's part of a chunk of x, with zeros past k and past the last row, into the slot of the chunk
  // that is multiplied when this one is passed on.
  LAB_DEVICE void copy_x(int chunk) {
    if (chunk >= end) return;
    each_unit([&](int unit, int row, int column) {
      LAB_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int from = chunk * C::kChunk + column + 8 * half;
        const bool there = row < rows && from < k;
        cp_async16(&slot(chunk - kAhead).x[half][unit], there ? x + size_t(row) * k + from : x, there);
      }
    });
  }

  // Passes a chunk of x on to the tiles. part(unit, row of x, first column, half): half of a unit.
  //
  // A lane holds four neighbouring columns of w (4 t to 4 t + 3 of 16), and gives them to wgmma as columns 2 t,
  // 2 t + 1, 2 t + 8 and 2 t + 9. So that the columns of x agree, the even pairs of 16 columns come first.
  template <typename Part>
  LAB_DEVICE void pass_x(int chunk, Part part) {
    if (chunk >= end) return;
    const int stage = (chunk - begin) % C::kStages, round = (chunk - begin) / C::kStages;
    if (round > 0) mbarrier_wait(&shared.empty[stage], (round - 1) % 2);
    each_unit([&](int unit, int row, int column) {
      const Vec<uint32_t> low = part(unit, row, column, 0), high = part(unit, row, column, 1);
      T* tile =
          shared.x[stage] + column / C::kTileColumns * (C::kBatch * C::kTileColumns) + row * C::kTileColumns;
      LAB_UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        const int place = (column % C::kTileColumns / 8 + odd) ^ row % 8;
        store(reinterpret_cast<uint32_t*>(tile + place * 8), Vec<uint32_t>{
                                                                 { low.v[odd],
                                                                   low.v[odd + 2],
                                                                   high.v[odd],
                                                                   high.v[odd + 2] }});
      }
    });
    wgmma_publish();
    arrive(&shared.full[stage]);
  }
  LAB_DEVICE void arrive(mbarrier* barrier) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  }

  // acc += a chunk of the warp's rows of w times those columns of all rows of x.
  LAB_DEVICE void add(int chunk) {
    const int stage = (chunk - begin) % C::kStages;
    cp_async_wait<C::kSlots - 1>();  // for the codes of this chunk, and x of the one that is passed on
    __syncwarp();
    LAB_UNROLL
    for (int side = 0; side < 2; ++side) {
      words[side] =
          load_unit<F, true>(reinterpret_cast<const uint8_t*>(&slot(chunk).codes[side][threadIdx.x]), t);
      if constexpr (F::kGroup != 0) {
        scales[side].load_from(&slot(chunk).scales[warp][side][g * Scales::kBytes], chunk % L::kSpan);
      }
    }
    uint32_t a[2][2][4];  // two runs, each of two multiplications
    unpack(a[0], 0);
    mbarrier_wait(&shared.full[stage], (chunk - begin) / C::kStages % 2);
    if constexpr (F::kGroup == 0) {
      multiply_chunk(acc[0], a, chunk, true);
      arrive(&shared.empty[stage]);
    } else {
      float sums[C::kTiles][4];
      multiply_chunk(sums, a, chunk, false);
      arrive(&shared.empty[stage]);
      LAB_UNROLL
      for (int side = 0; side < 2; ++side) {
        const float scale = scales[side].scale(0, chunk % L::kSpan);
        LAB_UNROLL
        for (int tile = 0; tile < C::kTiles; ++tile) {
          LAB_UNROLL
          for (int i = 2 * side; i < 2 * side + 2; ++i) {
            acc[0][tile][i] = fmadd(scale, sums[tile][i], acc[0][tile][i]);
          }
        }
      }
    }
    // The dependent kernel may launch once the last copies of weights have been issued.
    if (chunk + C::kSlots + 1 == end) pdl_launch_dependents();
  }

  // sums = the chunk of w times that of x, without scales, or with keep sums += it; complete when it returns. a[0]:
  // the first run. While one run is multiplied, the next one is unpacked, or x is passed on.
  LAB_DEVICE void multiply_chunk(float (&sums)[C::kTiles][4], uint32_t (&a)[2][2][4], int chunk, bool keep) {
    const T* columns = shared.x[(chunk - begin) % C::kStages];
    LAB_UNROLL
    for (int run = 0; run < L::kRuns; ++run) {
      wgmma_begin();
      LAB_UNROLL
      for (int part = 0; part < 2; ++part) {
        const int column = run * kRunColumns + part * 16;
        const T* tile = columns + column / C::kTileColumns * (C::kBatch * C::kTileColumns);
        wgmma(sums, a[run % 2][part], tile + column % C::kTileColumns, keep || run + part > 0);
      }
      wgmma_commit();
      if (run + 1 < L::kRuns) {
        wgmma_wait<1>();  // the run before this one no longer reads its registers
        unpack(a[(run + 1) % 2], run + 1);
      }
    }
    const auto& from = slot(chunk);
    pass_x(chunk + kAhead, [&](int unit, int, int, int half) { return from.x[half][unit]; });
    __syncwarp();  // all lanes have read the scales of this chunk
    copy_w(chunk + C::kSlots);
    copy_x(chunk + C::kSlots + kAhead);
    cp_async_commit();
    wgmma_wait<0>(sums);
  }

  // The left operands of the two multiplications of a run.
  LAB_DEVICE void unpack(uint32_t (&a)[2][4], int run) {
    uint32_t pairs[2][4];
    unpack_run<F, T>(pairs, words, scales, run);
    LAB_UNROLL
    for (int part = 0; part < 2; ++part) {
      LAB_UNROLL
      for (int i = 0; i < 4; ++i) a[part][i] = pairs[i % 2][2 * part + i / 2];
    }
  }
#endif
};

}  // namespace lab
