// 16-bit elements as they are loaded, and their conversion to float32.
#pragma once
#include "../common.cuh"

namespace lab {

// N elements as one load returns them. On a GPU a pair of 16-bit elements stays in its 32-bit word until it
// is unpacked: with an array of 16-bit elements the compiler would move each into a register of its own right
// at the load.
template <typename T, int N>
struct PackedType {
  static constexpr bool kWords = !kHost && sizeof(T) == 2 && N % 2 == 0;
  using Element = std::conditional_t<kWords, uint32_t, T>;
  using type = Vec<Element, kWords ? N / 2 : N>;
};
template <typename T, int N>
using Packed = typename PackedType<T, N>::type;

template <int N, typename T>
LAB_DEVICE Packed<T, N> load_packed(const T* p) {
  using P = Packed<T, N>;
  return load<P::size>(reinterpret_cast<const typename PackedType<T, N>::Element*>(p));
}
// The same for data that are used only once; see load_stream.
template <int N, typename T>
LAB_DEVICE Packed<T, N> load_packed_stream(const T* p) {
  if constexpr (N * sizeof(T) == 16) {
    return load_stream(reinterpret_cast<const typename PackedType<T, N>::Element*>(p));
  } else {
    return load_packed<N>(p);
  }
}

template <int N, typename T>
LAB_DEVICE void store_packed(T* p, const Packed<T, N>& packed) {
  store(reinterpret_cast<typename PackedType<T, N>::Element*>(p), packed);
}

// Converts to float32. A pair of bf16 costs a shift and a mask, a pair of f16 two conversions.
template <typename T, int N>
LAB_DEVICE void unpack(float (&f)[N], const Packed<T, N>& packed) {
  if constexpr (PackedType<T, N>::kWords) {
    LAB_UNROLL
    for (int i = 0; i < N / 2; ++i) {
      if constexpr (std::is_same_v<T, bf16>) {
        f[2 * i] = bit_cast<float>(packed.v[i] << 16);
        f[2 * i + 1] = bit_cast<float>(packed.v[i] & 0xffff0000u);
      } else {
        f[2 * i] = to_float(bit_cast<half>(uint16_t(packed.v[i])));
        f[2 * i + 1] = to_float(bit_cast<half>(uint16_t(packed.v[i] >> 16)));
      }
    }
  } else {
    LAB_UNROLL
    for (int i = 0; i < N; ++i) f[i] = to_float(packed.v[i]);
  }
}

}  // namespace lab
