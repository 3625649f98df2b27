// Launch settings that `lab tune` measured for an op and a shape. For all others a launcher follows its own
// rule. Few lines, because every kernel includes them: the table is in settings_table.h.
#pragma once
#include <initializer_list>

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

// The settings of an op for `rows` rows; itemsize: bytes of an element; shape: n, k; or q_heads, kv_heads,
// head_dim, page_size.
namespace settings __attribute__((visibility("hidden"))) {
  Settings find(const char* op, int itemsize, int rows, std::initializer_list<int> shape);
}
}  // namespace lab
