// Rows that one block of a grid passes to all other blocks without a barrier. Two 16-bit elements and a
// 32-bit tag form one 64-bit word, written at once. A reader polls a word until it has the expected tag, so
// the data themselves tell that they have arrived. (A barrier of the grid needs a release, and on an H100 a
// release also waits for all bulk copies of the block that are in flight: up to 8 us with a full ring.)
//
// A row may be overwritten once all blocks that read it have written what depends on it. A tag is used again
// only after 2^32 phases.
#pragma once
#include "unpack.cuh"

namespace lab {

LAB_DEVICE uint64_t tagged(uint32_t value, uint32_t tag) { return uint64_t(tag) << 32 | value; }

// [n / 2] words of n elements; T has 16 bits.
template <typename T>
struct TaggedRow {
  uint64_t* words;
  uint32_t tag;

  LAB_DEVICE static uint32_t pack(float low, float high) {
    return bit_cast<uint32_t>(Vec<T, 2>{{from_float<T>(low), from_float<T>(high)}});
  }

  // Stores elements n (even) and n + 1.
  LAB_DEVICE void store(int n, float low, float high) const {
    store_word(words + n / 2, tagged(pack(low, high), tag));
  }

  // own(): the word with element n. This block has written it itself, so its tag needs no check. element():
  // that element of the word.
  LAB_DEVICE uint64_t own(int n) const {
    uint64_t one[1];
    load_words(one, words + n / 2);
    return one[0];
  }
  LAB_DEVICE static float element(uint64_t word, int n) {
    return to_float(bit_cast<T>(uint16_t(word >> n % 2 * 16)));
  }

  // Loads Count times 8 elements, at n, n + step, ..., and waits until all have the tag. Those from `end` on
  // are zero and are not waited for.
  template <int Count>
  LAB_DEVICE void wait(Vec<T> (&values)[Count], int n, int step, int end) const {
    uint64_t found[Count][4] = {};
    for (bool all = false; !all;) {
      all = true;
      LAB_UNROLL
      for (int i = 0; i < Count; ++i) {
        if (n + i * step < end) load_words(found[i], words + (n + i * step) / 2);
      }
      LAB_UNROLL
      for (int i = 0; i < Count; ++i) {
        if (n + i * step >= end) continue;
        LAB_UNROLL
        for (int j = 0; j < 4; ++j) all &= uint32_t(found[i][j] >> 32) == tag;
      }
      if (!all) spin_pause();
    }
    LAB_UNROLL
    for (int i = 0; i < Count; ++i) {
      Vec<uint32_t> pairs;
      LAB_UNROLL
      for (int j = 0; j < 4; ++j) pairs.v[j] = uint32_t(found[i][j]);
      values[i] = bit_cast<Vec<T>>(pairs);
    }
  }
};

// The same for single float32 values: a value and its tag are one word.
struct TaggedFloats {
  uint64_t* words;
  uint32_t tag;
  // Stores values i and i + 1.
  LAB_DEVICE void store(int i, float low, float high) const {
    store_word(words + i, tagged(bit_cast<uint32_t>(low), tag));
    store_word(words + i + 1, tagged(bit_cast<uint32_t>(high), tag));
  }
  template <int Count>
  LAB_DEVICE void wait(float (&values)[Count], const int (&at)[Count]) const {
    for (bool all = false; !all;) {
      all = true;
      uint64_t found[Count][1];
      LAB_UNROLL
      for (int i = 0; i < Count; ++i) load_words(found[i], words + at[i]);
      LAB_UNROLL
      for (int i = 0; i < Count; ++i) {
        all &= uint32_t(found[i][0] >> 32) == tag;
        values[i] = bit_cast<float>(uint32_t(found[i][0]));
      }
      if (!all) spin_pause();
    }
  }
};

}  // namespace lab
