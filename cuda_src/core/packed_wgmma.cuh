// Matrix product of 9 to 64 rows of x with packed rows of w (formats/) by the tensor cores of Hopper's warpgroups.
//
// As in packed_batch.cuh, but the instruction is wgmma: it takes 64 rows of w from the registers of a warpgroup,
// where they have just been unpacked, and all rows of x from shared memory, which so costs no loads. For formats
// whose scale is that of a whole segment of a row or of more: shorter sums would be waited for too often.
//
// x lies ready in global memory in the tiles that wgmma reads (tiled_rows.cuh), so that one thread brings it to all
// others by bulk copies. Codes come by cp.async, each thread's own.
#pragma once
#include "packed_batch.cuh"
#include "tiled_rows.cuh"
#include "wgmma.cuh"

namespace lab {

// C: the shape of a launch. A slot's codes are read by the thread that copied them, its scales by the warp. A stage of
// x is full when its bytes have arrived, and empty when all warps have multiplied it.
template <typename T, typename F, typename C>
struct PackedWgmmaSmem : PackedBatchSmem<T, C> {
  static constexpr int kScaleBytes = F::kGroup ? 8 * Layout<F>::Scales::kBytes : 16;  // of 8 rows in a span
  struct Slot {
    Vec<uint32_t> codes[2][C::kThreads];
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
  // Blocks of a cluster. 16 clusters of 6 run at once on an H100, of 7 or 8 only 15. (8B's o and down at 64 rows in
  // int4-g128: 28 and 63 us with 7, 14 and 34 with 6, 14 and 39 with 4.)
  static constexpr int kMostRanks = 6;
  static constexpr int kParts = Parts_, kTileOutputs = 16 / Parts_, kWarpOutputs = R * kTileOutputs;
  static constexpr int kOutputs = kWarps * kWarpOutputs;
  static constexpr int kChunk = Layout<F>::kColumns;  // one segment
  static constexpr int kStages = 4 * 128 / kChunk;    // chunks of x on their way or in use
  static constexpr int kSlots = kTiles == 2 ? 8 : 4;  // of codes
  static constexpr int kStage = kBatch * kChunk;      // elements of a chunk of x
  static constexpr int kSums = 16 * R * kWarps + 4;   // floats between two columns of sums: no bank conflicts
  template <typename T>
  using Smem = PackedWgmmaSmem<T, F, PackedWgmmaShape>;
};

// The formats that it takes: a segment has one scale and no minimum, and a lane 16 bytes of its codes.
template <typename F>
constexpr bool kWholeSegments = F::kBits != 6 && !F::kMinimum && Layout<F>::kPart == Layout<F>::kColumns;

// A place in a ring of N, and how often it has gone round.
template <int N>
struct RingPlace {
  int at = 0;
  unsigned round = 0;  // modulo 2
  LAB_DEVICE void next() {
    if (++at == N) at = 0, round ^= 1;
  }
};

template <typename T_, typename F, typename C_>
struct PackedWgmma : PackedBlock<T_, F, C_> {
  using Base = PackedBlock<T_, F, C_>;
  using Base::acc, Base::begin, Base::codes_of, Base::end, Base::g, Base::lane, Base::n, Base::output;
  using Base::Base;
  using Base::segments, Base::shared, Base::t, Base::tiled, Base::w, Base::warp;
  using typename Base::C, typename Base::L, typename Base::Scales, typename Base::T;
  static_assert(Base::kSegments == 1 && kWholeSegments<F>, "a chunk is one segment, with one scale");
  static_assert(L::kSpan * L::kColumns <= 2 * kTileColumns, "tiles are filled up as far as segments are");
  UnitWords<F> words[2];  // of rows g and g + 8
  Scales scales[2];
  RingPlace<C_::kSlots> slot;      // of the chunk that is unpacked
  RingPlace<C_::kStages> stage;    // of the chunk that is multiplied
  RingPlace<C_::kStages> filling;  // of the chunk of x that is copied next; counted by one thread

  // Issues the first copies of weights, which depend on no earlier kernel, waits for the preceding kernel, which
  // wrote `tiled`, and issues the first copies of x.
  LAB_DEVICE void start() {
#if LAB_WGMMA
    if (threadIdx.x == 0) {
      for (int i = 0; i < C::kStages; ++i) {
        mbarrier_init(&shared.full[i], 1);
        mbarrier_init(&shared.empty[i], C::kWarps);
      }
      mbarrier_fence_init();
    }
    __syncthreads();
    this->aim();
    for (int i = 0; i < C::kSlots; ++i) {
      copy_w(begin + i, i);
      cp_async_commit();
    }
    if (end - begin <= C::kSlots) pdl_launch_dependents();  // no more loads of weights follow
    pdl_wait();
    for (int i = 0; i < C::kStages - 1; ++i) copy_x(begin + i);
#else
    __trap();  // never launched where wgmma is not compiled: has_wgmma() is false
#endif
  }

  // The sums of the outputs; all threads must call it. each_output() then reads them.
  LAB_DEVICE void multiply() {
#if LAB_WGMMA
    this->clear();
    multiply_chunks();
    this->share_sums();
#endif
  }

#if LAB_WGMMA
 private:
  // One thread copies a chunk of x, as soon as all warps have multiplied the one that the stage held before.
  LAB_DEVICE void copy_x(int chunk) {
    if (threadIdx.x == 0 && chunk < end) {
      mbarrier_wait(&shared.empty[filling.at], filling.round ^ 1);  // the first time at once
      constexpr unsigned kBytes = C::kStage * sizeof(T);
      mbarrier_arrive_expect_tx(&shared.full[filling.at], kBytes);
      bulk_copy_g2s<false>(shared.x[filling.at], tiled + size_t(chunk) * C::kStage, kBytes,
                           &shared.full[filling.at]);
      filling.next();
    }
    __syncwarp();
  }

  // Copies this thread's codes of a chunk, and some threads the scales of their warp.
  LAB_DEVICE void copy_w(int chunk, int to) {
    if (chunk >= end) return;
    LAB_UNROLL
    for (int side = 0; side < 2; ++side) {
      cp_async16(&shared.slots[to].codes[side][threadIdx.x],
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
        cp_async16(&shared.slots[to].scales[warp][side][16 * piece], w.scales + place + 16 * piece);
      }
    }
  }

  // Loads the codes of a chunk, has their slot filled again, and unpacks the first run.
  LAB_DEVICE void prepare(int chunk, uint32_t (&a)[2][4]) {
    cp_async_wait<C::kSlots - 1>();
    __syncwarp();  // scales were copied by other lanes
    const auto& from = shared.slots[slot.at];
    LAB_UNROLL
    for (int side = 0; side < 2; ++side) {
      words[side] = load_unit<F, true>(reinterpret_cast<const uint8_t*>(&from.codes[side][threadIdx.x]), t);
      if constexpr (F::kGroup != 0) {
        scales[side].load_from(&from.scales[warp][side][g * Scales::kBytes], chunk % L::kSpan);
      }
    }
    unpack(a, 0);
    __syncwarp();  // all lanes have read the scales
    copy_w(chunk + C::kSlots, slot.at);
    cp_async_commit();
    slot.next();
    // The dependent kernel may launch once the last copies of weights have been issued.
    if (chunk + C::kSlots + 1 == end) pdl_launch_dependents();
  }

  // While one run is multiplied, the next one is unpacked: also the first one of the next chunk.
  LAB_DEVICE void multiply_chunks() {
    uint32_t a[2][2][4];  // two runs, each of two multiplications
    float sums[F::kGroup ? C::kTiles : 1][4];
    if (begin < end) prepare(begin, a[0]);
    for (int chunk = begin; chunk < end; ++chunk) {
      float factors[2];
      LAB_UNROLL
      for (int side = 0; side < 2; ++side) {
        if constexpr (F::kGroup != 0) factors[side] = scales[side].scale(0, chunk % L::kSpan);
      }
      copy_x(chunk + C::kStages - 1);
      mbarrier_wait(&shared.full[stage.at], stage.round);
      const WgmmaPlace<T> columns(shared.x[stage.at]);
      LAB_UNROLL
      for (int run = 0; run < L::kRuns; ++run) {
        if constexpr (F::kGroup == 0) {
          multiply_run(acc[0], a[run % 2], columns, run, true);
        } else {
          multiply_run(sums, a[run % 2], columns, run, run > 0);
        }
        wgmma_wait<1>();  // the run before this one no longer reads its registers
        if (run + 1 < L::kRuns) {
          unpack(a[(run + 1) % 2], run + 1);
        } else if (chunk + 1 < end) {
          prepare(chunk + 1, a[0]);
        }
      }
      if constexpr (F::kGroup == 0) {
        wgmma_wait<0>(acc[0]);
      } else {
        wgmma_wait<0>(sums);
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&shared.empty[stage.at]);
      stage.next();
      if constexpr (F::kGroup != 0) {
        LAB_UNROLL
        for (int tile = 0; tile < C::kTiles; ++tile) {
          LAB_UNROLL
          for (int i = 0; i < 4; ++i) acc[0][tile][i] = fmadd(factors[i / 2], sums[tile][i], acc[0][tile][i]);
        }
      }
    }
  }
  static_assert(L::kRuns % 2 == 0, "the next chunk begins with the registers that are free");

  // Issues sums (+)= a run of w times those columns of x.
  template <int Tiles>
  LAB_DEVICE void multiply_run(float (&sums)[Tiles][4], const uint32_t (&a)[2][4], WgmmaPlace<T> columns,
                               int run, bool keep) {
    wgmma_begin();
    LAB_UNROLL
    for (int part = 0; part < 2; ++part) {
      const int column = run * kRunColumns + part * 16;
      const int tile = column / kTileColumns * (C::kBatch * kTileColumns);
      wgmma(sums, a[part], columns + (tile + column % kTileColumns), keep || part > 0);
    }
    wgmma_commit();
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
