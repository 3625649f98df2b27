// RMSNorm (optional) and rotary embedding of one head, just before attention uses it.
#pragma once
#include "lane_attention.cuh"

namespace lab {

// L lanes handle one head; D / N of them hold N elements each. Rope rotates pairs (x[i], x[i + D/2]):
// a lane keeps the cosines and sines of its elements and knows which lane holds the other elements of its
// pairs.
template <typename T, int D>
struct Rotation {
  static constexpr int N = Vec<T>::size, L = lanes_per_token(D / N), kHalf = D / 2 / N;
  // Lane within the head; the lane of the warp that has the pairs' other elements.
  int c, partner;
  bool live;  // this lane has elements: c * N to c * N + N - 1
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

  // Returns this lane's elements of the head at `from` (zeros if not valid): normalised and rounded to T,
  // then rotated and rounded to T. All lanes of the warp must call it.
  LAB_DEVICE Vec<T> turn(const T* from, bool valid, const T* norm, float eps) const {
    return turn(valid ? load(from + c * N) : Vec<T>{}, valid, norm, eps);
  }
  LAB_DEVICE_ONCE Vec<T> turn(const Vec<T>& from, bool valid, const T* norm, float eps) const {
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
