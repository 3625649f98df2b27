// The ring of packed_ring.cuh for matrices in any weight format, of which some consist of three: q, k and v where
// they are stored in different formats.
#pragma once
#include "packed_ring.cuh"

namespace lab {

// Two matrices whose outputs follow those of another one: k and v, behind q. Null where they are part of it.
template <typename T>
struct MoreMatrices {
  const T* w[2];
  const uint8_t* scales[2];
};

// A matrix, and what follows it.
template <typename T>
struct MixedMatrix : PackedMatrix<T> {
  const MoreMatrices<T>* more;  // or null
  int more_rows;                // of each of the two
  uint32_t more_formats;        // a byte for each

  LAB_DEVICE int count() const { return more ? 3 : 1; }
  LAB_DEVICE PackedMatrix<T> at(int i) const {
    if (i == 0) return *this;
    const int format = more_formats >> (8 * (i - 1)) & 0xff;
    return {{more->w[i - 1], more_rows, this->k, 1}, more->scales[i - 1], format};
  }
  LAB_DEVICE int first_output(int i) const { return i == 0 ? 0 : this->n + (i - 1) * more_rows; }
};

// An epilogue (see WeightRing::multiply) for one of several matrices, whose outputs begin at `first`.
template <typename Epilogue>
struct ShiftedEpilogue {
  Epilogue& all;
  int first;

  LAB_DEVICE auto load(int n) const { return all.load(first + n); }
  template <typename Base>
  LAB_DEVICE float finish(int n, const Base& base, float sum, float second) const {
    return all.finish(first + n, base, sum, second);
  }
  LAB_DEVICE void store(int n, float mine, float next) const { all.store(first + n, mine, next); }
};

// A block has a share of each of the three, so that one in a format of more bits is divided among all blocks.
template <typename T>
struct MixedRing : PackedRing<T, true> {
  using PackedRing<T, true>::PackedRing;

  // As WeightRing::issue().
  LAB_DEVICE void issue(const MixedMatrix<T>& m) {
    for (int i = 0; i < m.count(); ++i) PackedRing<T, true>::issue(m.at(i));
  }

  // As WeightRing::multiply(). share: of the first matrix. The others have no more rows: a block that has none of
  // the first has none of them.
  template <typename Base, typename Epilogue>
  LAB_DEVICE void multiply(const MixedMatrix<T>& m, Share share, const T* x, Base base, Epilogue& epilogue) {
    for (int i = 0; i < m.count(); ++i) {
      const PackedMatrix<T> one = m.at(i);
      const ShiftedEpilogue<Epilogue> shifted{epilogue, m.first_output(i)};
      if (i > 0) {
        share = this->share(one.n);
        const int n = share.first + int(threadIdx.x);
        if (n < share.last) base = shifted.load(n);
      }
      PackedRing<T, true>::multiply(one, share, x, base, shifted);
    }
  }
};

}  // namespace lab
