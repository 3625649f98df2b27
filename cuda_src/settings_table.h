// The launch settings that were measured, and those that the tuner tries: what settings::find() looks in.
//
// For bindings.cpp alone, which fills the table from cuda_src/tuned/<arch>.json. Plain C++. Hidden visibility
// keeps the tables of the GPU extension and of the host extension apart.
#pragma once
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "settings.h"

namespace lab {
namespace settings __attribute__((visibility("hidden"))) {

  using Shape = std::vector<int>;                   // n, k; or q_heads, kv_heads, head_dim, page_size
  using Key = std::tuple<std::string, int, Shape>;  // op, bytes of an element, shape

  inline std::mutex mutex;
  inline std::map<Key, std::map<int, Settings>> measured;  // then by number of rows
  inline std::map<std::string, Settings> forced;           // by op: what the tuner tries at the moment

  // The settings for `rows` rows: those measured for the smallest number of rows that is at least `rows`,
  // unless it is 16 times as many or more: settings for 64 rows say nothing about one row.
  Settings find(const char* op, int itemsize, int rows, std::initializer_list<int> of) {
    std::lock_guard<std::mutex> lock(mutex);
    if (const auto tried = forced.find(op); tried != forced.end()) return tried->second;
    if (measured.empty()) return {};
    const auto shape = measured.find({op, itemsize, of});
    if (shape == measured.end()) return {};
    const auto entry = shape->second.lower_bound(rows);
    return entry == shape->second.end() || entry->first >= 16 * rows ? Settings{} : entry->second;
  }

  inline Settings parse(const std::map<std::string, int>& values) {
    Settings s;
    for (const auto& [name, value] : values) {
      if (value < 0) throw std::invalid_argument("launch setting " + name + ": negative");
      if (name == "share")
        s.share = value;
      else if (name == "resident")
        s.resident = value;
      else if (name == "tiles")
        s.tiles = value;
      else if (name == "stages")
        s.stages = value;
      else if (name == "least")
        s.least = value;
      else
        throw std::invalid_argument("no launch setting is called " + name);
    }
    return s;
  }

}  // namespace settings
}  // namespace lab
