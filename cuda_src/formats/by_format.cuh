// The formats by their numbers, on the host (which kernel to launch) and on the device.
#pragma once
#include "fp8.cuh"
#include "int4.cuh"
#include "int8.cuh"
#include "mxfp4.cuh"
#include "q4_k.cuh"
#include "q6_k.cuh"

namespace lab {

// Calls f with an object of the format's type: `using F = decltype(format);`. Unknown numbers call nothing.
template <typename Use>
LAB_HOST_DEVICE void by_format(int format, Use&& use) {
  switch (Format(format)) {
    case Format::int8: return use(Int8<0>{});
    case Format::int8_g32: return use(Int8<32>{});
    case Format::int4_g32: return use(Int4<32, Int4Kind::symmetric>{});
    case Format::int4_g32_min: return use(Int4<32, Int4Kind::minimum>{});
    case Format::int4_g128: return use(Int4<128, Int4Kind::symmetric>{});
    case Format::int4_g128_zero: return use(Int4<128, Int4Kind::zero>{});
    case Format::fp8: return use(Fp8<0>{});
    case Format::mxfp4: return use(Mxfp4{});
    case Format::fp8_g128: return use(Fp8<128>{});
    case Format::q4_k: return use(Q4K{});
    case Format::q6_k: return use(Q6K{});
    default: return;
  }
}

// Whether it is the number of a format of packed weights.
LAB_HOST_DEVICE bool known_format(int format) {
  bool known = false;
  by_format(format, [&](auto) { known = true; });
  return known;
}

// What a kernel that learns the format at run time must know about it. A unit is what lane unit % 4 has of
// segment unit / 4. Its columns come in pieces of 4, which lie 16 columns apart.
struct FormatSizes {
  int format, columns, segments, unit_columns;  // columns: of a segment; unit_columns: of a unit

  LAB_HOST_DEVICE FormatSizes(int format_, int k) : format(format_) {
    by_format(format, [&](auto of) {
      using L = Layout<decltype(of)>;
      columns = L::kColumns, unit_columns = L::kColumns / 4;
      segments = L::segments(k);
    });
  }
  LAB_HOST_DEVICE int first_column(int unit) const { return unit / 4 * columns + unit % 4 * 4; }
};
constexpr int kMostUnitColumns = 32;

// The weights of one unit of a row, exactly but for the addition of a minimum, in the order of their codes.
LAB_DEVICE void unpack_unit(float (&f)[kMostUnitColumns], const PackedWeights& w, const FormatSizes& sizes,
                            size_t row, int unit) {
  const int segment = unit / 4, lane = unit % 4;
  by_format(sizes.format, [&](auto format) {
    using F = decltype(format);
    using L = Layout<F>;
    using Scales = typename L::Scales;
    const size_t first = segment_place(row, sizes.segments, L::kSegmentBytes);
    const size_t in_row = size_t(segment) * (kBlockRows * L::kSegmentBytes);
    const auto words = load_unit<F>(w.codes + first + in_row + lane * 16, lane);
    const uint8_t* at = w.scales + row * Scales::kBytes;
    if constexpr (F::kGroup != 0) {
      at = w.scales + segment_place(row, sizes.segments / L::kSpan, Scales::kBytes) +
           size_t(segment / L::kSpan) * (kBlockRows * Scales::kBytes);
    }
    Scales scales;
    scales.load_from(at, segment % L::kSpan);
    LAB_UNROLL
    for (int run = 0; run < L::kRuns; ++run) {
      float values[8];
      F::values(values, run_words<F>(words, run).v);
      LAB_UNROLL
      for (int half = 0; half < 2; ++half) {  // codes 0 .. 3 are of 16 columns, and 4 .. 7 of the next 16
        const int group = (run * kRunColumns + half * 16) / L::kPart, place = segment % L::kSpan;
        const float scale = scales.scale(group, place);
        const float second = F::kSecond ? scales.second(group, place) : 0.f;
        LAB_UNROLL
        for (int j = 4 * half; j < 4 * half + 4; ++j) {
          f[run * 8 + j] = F::kMinimum ? fmadd(values[j], scale, second) : (values[j] - second) * scale;
        }
      }
    }
  });
}

}  // namespace lab
