// Norm (optional) and rope of a head on its way into attention.
#pragma once
#include "lane_attention.cuh"

namespace lab {

// Norm and rope of a head by L lanes, D / N of which hold N elements each: the row of the table, and who has the other
// half of a pair.
template <typename T, int D>
struct Rotation {
  static constexpr int N = Vec<T>::size, L = lanes_per_token(D / N), kHalf = D / 2 / N;
  int c, partner;                                 // lane of the head, and the lane of the warp that has the other half
  bool live;                                      // this lane has elements: c * N to c * N + N
  float cosine[N], sine[N];

  LAB_DEVICE explicit Rotation(const float* row) {
    const int lane = threadIdx.x % 32;
    c = lane % L;
    live = c * N < D;
    partner = !live ? lane : c < kHalf ? lane + kHalf : lane - kHalf;
    const int i = c % kHalf * N;
    LAB_UNROLL
    for (int e = 0; e < N; e += 4) {
      const Vec<float> cosines = load(row + i + e), sines = load(row + D / 2 + i + e);
      LAB_UNROLL
      for (int f = 0; f < 4; ++f) {
        cosine[e + f] = cosines.v[f];
        sine[e + f] = c < kHalf ? -sines.v[f] : sines.v[f];
      }
    }
  }

  // This lane's elements of the head at `from` (zeros if not valid): normed and rounded to T, rotated and rounded to T.
  // All lanes of the warp call it.
  LAB_DEVICE Vec<T> turn(const T* from, bool valid, const T* norm, float eps) const {
    return turn(valid ? load(from + c * N) : Vec<T>{}, valid, norm, eps);
  }
  LAB_DEVICE Vec<T> turn(const Vec<T>& from, bool valid, const T* norm, float eps) const {
    float x[N];
    unpack<T>(x, bit_cast<Packed<T, N>>(from));
    if (norm) {
      float squares = 0.f, factor[N];
      LAB_UNROLL
      for (int e = 0; e < N; ++e) squares = fmadd(x[e], x[e], squares);
      const float scale = rsqrtf(group_sum<L>(squares) / D + eps);
      unpack<T>(factor, valid ? load_packed<N>(norm + c * N) : Packed<T, N>{});
      LAB_UNROLL
      for (int e = 0; e < N; ++e) x[e] = to_float(normed_element<T>(x[e], scale, factor[e]));
    }
    Vec<T> turned;
    LAB_UNROLL
    for (int e = 0; e < N; ++e) {
      const float other = __shfl_sync(0xffffffffu, x[e], partner);
      turned.v[e] = from_float<T>(x[e] * cosine[e] + other * sine[e]);
    }
    return turned;
  }
};

}  // namespace lab
