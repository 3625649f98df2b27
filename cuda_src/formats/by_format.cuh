// The formats by their numbers, on the host (which kernel to launch) and on the device.
#pragma once
#include "fp8.cuh"
#include "int4.cuh"
#include "int8.cuh"
#include "mxfp4.cuh"

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
    case Format::fp8: return use(Fp8{});
    case Format::mxfp4: return use(Mxfp4{});
    default: return;
  }
}

// Whether it is the number of a format of packed weights.
LAB_HOST_DEVICE bool known_format(int format) {
  bool known = false;
  by_format(format, [&](auto) { known = true; });
  return known;
}

// What a kernel that learns the format at run time must know about it. A unit is 16 bytes of codes: what lane
// unit % 4 has of segment unit / 4. Its columns come in pieces of 4, which lie 16 columns apart.
struct FormatSizes {
  int format, columns, segments, unit_columns;  // columns: of a segment; unit_columns: of a unit

  LAB_HOST_DEVICE FormatSizes(int format_, int k) : format(format_) {
    by_format(format, [&](auto of) {
      using L = Layout<decltype(of)>;
      columns = L::kColumns, unit_columns = L::kColumns / 4;
      segments = (k + columns - 1) / columns;
    });
  }
  LAB_HOST_DEVICE int first_column(int unit) const { return unit / 4 * columns + unit % 4 * 4; }
};
constexpr int kMostUnitColumns = 32;

// The weights of one unit of a row, exactly but for the addition of a minimum, in the order of their codes.
LAB_DEVICE void unpack_unit(float (&f)[kMostUnitColumns], const PackedWeights& w, const FormatSizes& sizes,
                            size_t row, int unit) {
  const int segment = unit / 4, lane = unit % 4;
  const size_t first = segment_place(row, sizes.segments, kSegmentBytes);
  const uint8_t* codes = w.codes + first + size_t(segment) * (kBlockRows * kSegmentBytes) + lane * 16;
  const auto words = load(reinterpret_cast<const uint32_t*>(codes));
  by_format(sizes.format, [&](auto format) {
    using F = decltype(format);
    using L = Layout<F>;
    const uint8_t* of_segment = w.scales + row * L::kScaleBytes;
    if constexpr (F::kGroup != 0) {
      const size_t first_scale = segment_place(row, sizes.segments, L::kSegmentScales);
      of_segment = w.scales + first_scale + size_t(segment) * (kBlockRows * L::kSegmentScales);
    }
    LAB_UNROLL
    for (int run = 0; run < L::kRuns; ++run) {
      const int group = F::kGroup ? run / L::kRunsPerGroup : 0;
      const float scale = load_scale<F>(of_segment, group, 0);
      const float second = F::kSecond ? load_scale<F>(of_segment, group, 1) : 0.f;
      float values[8];
      F::values(values, words.v + run * L::kWords);
      LAB_UNROLL
      for (int j = 0; j < 8; ++j) {
        f[run * 8 + j] = F::kMinimum ? fmadd(values[j], scale, second) : (values[j] - second) * scale;
      }
    }
  });
}

}  // namespace lab
