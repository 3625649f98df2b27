// Python sees one function per launcher, with the launcher's name and with the fields of its struct as
// keyword arguments (named_args.h). Addresses are integers, so torch is not needed to build this; the callers
// in lab/ops/ have checked them.
//
// One source makes two modules: LAB_MODULE is _cuda (kernels compiled by nvcc) or _host (the same kernels,
// compiled by a C++ compiler).
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#ifdef LAB_HOST
#include "host/runtime.h"
#endif
#include "ladder/launchers.h"
#include "launchers.h"
#include "named_args.h"
#include "settings_table.h"
#include "trace.h"

namespace lab {
const char* build_facts();  // JSON, written by setup.py
}

namespace py = pybind11;

// The recorded launches as dicts. offset: of the kernel's host function in this module's file; `nm` gives its
// name.
static py::list take_launches() {
  py::list rows;
  for (const lab::trace::Launch& launch : lab::take_launches()) {
    Dl_info module{};
    dladdr(reinterpret_cast<void*>(launch.function), &module);
    py::dict row;
    row["kernel"] = launch.kernel;
    row["offset"] = launch.function - reinterpret_cast<std::uintptr_t>(module.dli_fbase);
    row["grid"] = launch.grid;
    row["block"] = launch.block;
    row["smem_bytes"] = launch.smem_bytes;
    row["cluster"] = launch.cluster;
    row["pdl"] = launch.pdl;
    rows.append(row);
  }
  return rows;
}

using Named = std::map<std::string, int>;

// (op, bytes of an element, rows, shape, settings by name)
static void set_settings(
    const std::vector<std::tuple<std::string, int, int, lab::settings::Shape, Named>>& entries) {
  decltype(lab::settings::measured) table;
  for (const auto& [op, itemsize, rows, shape, values] : entries) {
    table[{op, itemsize, shape}][rows] = lab::settings::parse(values);
  }
  std::lock_guard<std::mutex> lock(lab::settings::mutex);
  lab::settings::measured.swap(table);
}

static void force_settings(const std::string& op, const std::optional<Named>& values) {
  const lab::Settings parsed = values ? lab::settings::parse(*values) : lab::Settings{};
  std::lock_guard<std::mutex> lock(lab::settings::mutex);
  lab::settings::forced.erase(op);
  if (values) lab::settings::forced[op] = parsed;
}

#ifdef LAB_HOST
// None leaves an option as the environment sets it.
static void set_schedule(const std::optional<uint64_t>& seed, const std::optional<std::string>& ahead) {
  static const lab::host::Options initial = lab::host::get_options();
  lab::host::Options options = initial;
  if (seed) options.random = true, options.seed = *seed;
  if (ahead) {
    if (*ahead != "lowest" && *ahead != "highest") throw py::value_error("ahead: lowest or highest");
    options.ahead = *ahead == "lowest" ? lab::host::Ahead::lowest : lab::host::Ahead::highest;
    options.random = false;
  }
  lab::host::set_options(options);
}

static void hide_until_pdl_wait(const std::vector<std::pair<std::uintptr_t, size_t>>& regions) {
  std::vector<lab::host::Region> hidden;
  for (const auto& [address, bytes] : regions) hidden.push_back({reinterpret_cast<void*>(address), bytes});
  lab::host::hide_until_pdl_wait(hidden);
}
#endif

PYBIND11_MODULE(LAB_MODULE, m) {
  OP(embedding, ids, table, out, rows, cols, vocab, dtype, stream);
  OP(rmsnorm, x, w, residual, y, rows, groups, cols, x_stride, y_stride, eps, dtype, stream);
  OP(linear, x, tiled, w, bias, y, rows, n, k, dtype, out_dtype, stream);
  OP(rope, q, k, positions, cos_sin, batch, q_heads, kv_heads, head_dim, dtype, stream);
  OP(kv_append, k, v, cache, positions, batch, head_dim, dtype, stream);
  OP(decode_attention, q, cache, context_lens, out, splits, batch, q_heads, head_dim, scale, dtype, stream);
  OP(silu_mul, gate_up, y, rows, cols, dtype, stream);
  OP(sample, logits, positions, out, table, rows, vocab, temperature, top_k, top_p, min_p, seed, stream);
  OP(norm_linear, x, norm_w, w, bias, y, normed, tiled, rows, n, k, eps, dtype, out_dtype, stream);
  OP(norm_linear_silu_mul, x, norm_w, w, y, normed, tiled, rows, n, k, eps, dtype, stream);
  OP(linear_add, x, tiled, w, bias, residual, rows, n, k, dtype, stream);
  OP(rope_append_attention, q, k, v, norms, positions, cos_sin, cache, out, splits, batch, q_heads, head_dim,
     scale, dtype, stream);
  OP(norm_linear_argmax, x, norm_w, w, logits, scratch, normed, tiled, out, rows, n, k, eps, dtype, stream);
  OP(decode_step, ids, positions, weights, cache, logits, out, exchange, sizes, q_heads, head_dim, eps, scale,
     dtype, stream, peers);
  OP(all_reduce_add, partial, residual, peers, words, two_shot, dtype, stream);
  OP(all_reduce_add_rmsnorm, partial, residual, w, y, peers, rows, words, cols, eps, dtype, stream);
  OP(all_argmax, logits, ids, rows, n, first, peers, stream);
  OP(bandwidth, src, dst, bytes, mode, passes, blocks, threads, stream);
  OP(link_latency, peers, rounds, stream);
  OP(linear_ladder, x, tiled, w, bias, y, rows, n, k, dtype, out_dtype, stream);
  OP(quantised_linear_ladder, x, tiled, w, expanded, bias, y, rows, n, k, dtype, out_dtype, stream);
  OP(rmsnorm_ladder, x, w, residual, y, rows, groups, cols, x_stride, y_stride, eps, dtype, stream);
  OP(decode_attention_ladder, q, cache, context_lens, out, splits, batch, q_heads, head_dim, scale, dtype,
     stream);

  m.def("set_settings", &set_settings,
        "Sets the settings of later launches: a list of (op, bytes of an element, rows, shape, settings by\n"
        "name).");
  m.def(
      "force_settings", &force_settings,
      "Makes every launch of an op use these settings, with {} its own rule; None ends this. For the tuner.");
  m.def("set_trace", &lab::set_trace, "Starts or stops recording the names of launched kernels.");
  m.def("take_trace", &lab::take_trace,
        "The names of the kernels launched since the last call, oldest first.");
  m.def(
      "record_launches", &lab::record_launches, py::arg("multiprocessors"), py::arg("major") = 9,
      "Makes later launches be recorded instead of run, as on a GPU with this number of multiprocessors and\n"
      "this major compute capability; 0 ends this.");
  m.def(
      "take_launches", &take_launches,
      "list of dict: kernel, offset (of its host function in this file), grid, block, smem_bytes, cluster,\n"
      "pdl.");
#ifdef LAB_HOST
  m.def("set_schedule", &set_schedule, py::kw_only(), py::arg("seed") = py::none(),
        py::arg("ahead") = py::none(),
        "Sets the order of threads in later launches: random by a seed, or the `lowest` or `highest` thread\n"
        "runs as far ahead as barriers let it; without an argument as LAB_HOST_SEED and LAB_HOST_AHEAD say.");
  m.def("hide_until_pdl_wait", &hide_until_pdl_wait,
        "A list of (address, bytes) that later kernels with programmatic dependent launch find filled with\n"
        "ones until they call pdl_wait(); [] ends this. For tests.");
#endif
  m.def(
      "build_info", [] { return py::module_::import("json").attr("loads")(lab::build_facts()); },
      "dict: compiler, archs, flags, sanitizer; for the GPU build also nvcc and host_compiler.");
}
