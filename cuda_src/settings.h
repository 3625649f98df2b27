// Launch settings that `lab tune` measured for an op and a shape. For all others a launcher follows its own
// rule.
//
// Plain C++, so that bindings.cpp can fill the table from cuda_src/tuned/<arch>.json. Hidden visibility keeps
// the tables of the GPU extension and of the host extension apart.
#pragma once
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace lab {

// 0 in a field leaves the choice to the launcher's rule.
struct Settings {
  // Warps that share the same rows of w: 1, 2 or 4 (core/stream_rows.cuh).
  int share = 0;
  // Blocks per multiprocessor, each of which computes several sets of outputs; a large number: one set each.
  int resident = 0;
  int tiles = 0;   // up to 16 rows of x: how many 16-row tiles of w a block owns, 1 or 2 (core/mma_rows.cuh)
  int stages = 0;  // with tiles = 1: the stages of the block's pipeline, 4 or 7
  int least = 0;   // the fewest tokens of a split (core/mma_attention.cuh)
};

namespace settings __attribute__((visibility("hidden"))) {

  using Shape = std::vector<int>;                   // n, k; or q_heads, kv_heads, head_dim, page_size
  using Key = std::tuple<std::string, int, Shape>;  // op, bytes of an element, shape

  inline std::mutex mutex;
  inline std::map<Key, std::map<int, Settings>> measured;  // then by number of rows
  inline std::map<std::string, Settings> forced;           // by op: what the tuner tries at the moment

  // The settings for `rows` rows: those measured for the smallest number of rows that is at least `rows`,
  // unless it is 16 times as many or more: settings for 64 rows say nothing about one row.
  inline Settings find(const char* op, int itemsize, int rows, const Shape& of) {
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
