// Loads and stores that are watched: on a GPU they are plain ones; on a CPU they are also noted, so that an
// exercise can count the lines or banks that a warp touches. Accesses by several lanes of a warp count as one
// access if they come from the same line of the source and each is the nth of its thread there. That is right
// for kernels whose warps do not diverge at that line, as in the exercises.
#pragma once
#include "common.cuh"

#ifndef __CUDACC__
#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <vector>
#endif

namespace lab {

#ifdef __CUDACC__
template <typename T>
LAB_DEVICE T watched_load(const T* p) {
  return *p;
}
template <typename T>
LAB_DEVICE void watched_store(T* p, T value) {
  *p = value;
}
#else
namespace watch {

using Access = std::tuple<int, unsigned, unsigned, int>;          // line, block, warp, how many before
inline std::map<Access, std::vector<uintptr_t> > accesses;        // the addresses of the lanes
inline std::map<std::tuple<int, unsigned, unsigned>, int> times;  // line, block, thread: how often so far
inline std::mutex mutex;

inline void note(const void* p, int line) {
  std::lock_guard<std::mutex> lock(mutex);
  const unsigned block = blockIdx.x + gridDim.x * blockIdx.y;
  const unsigned thread = threadIdx.x + blockDim.x * threadIdx.y;
  const int before = times[{line, block, thread}]++;
  accesses[{line, block, thread / 32, before}].push_back(reinterpret_cast<uintptr_t>(p));
}

// Number of different units of `bytes` bytes that one access touches.
inline size_t distinct(const std::vector<uintptr_t>& addresses, uintptr_t bytes) {
  std::set<uintptr_t> units;
  for (uintptr_t a : addresses) units.insert(a / bytes);
  return units.size();
}

// Steps that shared memory needs for one access: the largest number of different 4-byte words in one of its
// 32 banks.
inline size_t bank_steps(const std::vector<uintptr_t>& addresses) {
  std::map<uintptr_t, std::set<uintptr_t> > words;
  for (uintptr_t a : addresses) words[a / 4 % 32].insert(a / 4);
  size_t most = 0;
  for (const auto& bank : words) most = std::max(most, bank.second.size());
  return most;
}

// Over all accesses in [begin, end): how many there were, in lanes, and the worst ratio of cost(addresses) to
// fewest(addresses), with its line of the source.
struct Worst {
  size_t lanes = 0, cost = 0, fewest = 1;
  int line = 0;
};
template <typename Cost, typename Fewest>
Worst worst(const void* begin, const void* end, Cost cost, Fewest fewest) {
  Worst found;
  for (const auto& [access, addresses] : accesses) {
    const uintptr_t first = addresses[0];
    if (first < reinterpret_cast<uintptr_t>(begin) || first >= reinterpret_cast<uintptr_t>(end)) continue;
    found.lanes += addresses.size();
    const size_t now = cost(addresses), least = fewest(addresses);
    if (found.line == 0 || now * found.fewest > found.cost * least) {
      found.cost = now, found.fewest = least, found.line = std::get<0>(access);
    }
  }
  return found;
}

}  // namespace watch

template <typename T>
inline T watched_load(const T* p, int line = __builtin_LINE()) {
  watch::note(p, line);
  return *p;
}
template <typename T>
inline void watched_store(T* p, T value, int line = __builtin_LINE()) {
  watch::note(p, line);
  *p = value;
}
#endif

}  // namespace lab
