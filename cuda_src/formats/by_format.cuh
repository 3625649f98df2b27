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

// What a kernel that learns the format at run time must know about it.
struct FormatSizes {
  int format, columns, segments, unit_columns, scale_bytes;  // unit: 16 bytes of codes

  LAB_HOST_DEVICE FormatSizes(int format_, int k) : format(format_) {
    by_format(format, [&](auto of) {
      using L = Layout<decltype(of)>;
      columns = L::kColumns, unit_columns = L::kColumns / 4;
      segments = (k + columns - 1) / columns;
      scale_bytes = L::kGroups ? segments * L::kSegmentScales : L::kScaleBytes;
    });
  }
};

}  // namespace lab
