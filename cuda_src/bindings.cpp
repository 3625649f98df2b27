// Python sees one function per launcher, with the launcher's name and with the fields of its struct as
// keyword arguments (named_args.h). Addresses are integers, so torch is not needed to build this; the callers
// in lab/ops/ have checked them.
//
// One source makes two modules: LAB_MODULE is _cuda (kernels compiled by nvcc) or _host (the same kernels,
// compiled by a C++ compiler).
#include <Python.h>
#include <dlfcn.h>

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

using lab::named::PythonError;
using lab::named::Ref;
using lab::named::returned;

// ---- values from Python and to it ------------------------------------------------------------------------

template <typename T>
static T number(PyObject* value) {
  T number;
  if (!lab::named::read_value(value, number)) throw PythonError{};
  return number;
}

static std::string text(PyObject* value) {
  const char* utf8 = PyUnicode_AsUTF8(value);
  if (!utf8) throw PythonError{};
  return utf8;
}

// Calls f with each item of a list or another iterable.
template <typename F>
static void each(PyObject* iterable, F f) {
  const Ref list(PySequence_List(iterable));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list.get()); ++i) f(PyList_GET_ITEM(list.get(), i));
}

// The items of a tuple of `count`.
static PyObject** items(PyObject* tuple, Py_ssize_t count) {
  if (PyTuple_Check(tuple) && PyTuple_GET_SIZE(tuple) == count) return &PyTuple_GET_ITEM(tuple, 0);
  PyErr_Format(PyExc_TypeError, "a tuple of %zd values is needed, not %R", count, tuple);
  throw PythonError{};
}

static void append(PyObject* list, PyObject* returned) {
  const Ref item(returned);
  if (PyList_Append(list, item)) throw PythonError{};
}

// ---- functions of the module -----------------------------------------------------------------------------

static lab::Settings settings_of(PyObject* dict) {
  std::map<std::string, int> values;
  each(Ref(PyMapping_Items(dict)), [&](PyObject* pair) {
    PyObject** of = items(pair, 2);
    values[text(of[0])] = number<int>(of[1]);
  });
  return lab::settings::parse(values);
}

static PyObject* set_settings(PyObject*, PyObject* entries) {
  return returned([&] {
    decltype(lab::settings::measured) table;
    each(entries, [&](PyObject* entry) {
      PyObject** of = items(entry, 5);
      lab::settings::Shape shape;
      each(of[3], [&](PyObject* size) { shape.push_back(number<int>(size)); });
      table[{text(of[0]), number<int>(of[1]), shape}][number<int>(of[2])] = settings_of(of[4]);
    });
    std::lock_guard<std::mutex> lock(lab::settings::mutex);
    lab::settings::measured.swap(table);
    return Py_NewRef(Py_None);
  });
}

static PyObject* force_settings(PyObject*, PyObject* arguments) {
  return returned([&] {
    PyObject** of = items(arguments, 2);
    const std::string op = text(of[0]);
    const lab::Settings parsed = of[1] == Py_None ? lab::Settings{} : settings_of(of[1]);
    std::lock_guard<std::mutex> lock(lab::settings::mutex);
    lab::settings::forced.erase(op);
    if (of[1] != Py_None) lab::settings::forced[op] = parsed;
    return Py_NewRef(Py_None);
  });
}

static PyObject* set_trace(PyObject*, PyObject* on) {
  return returned([&] {
    lab::set_trace(number<int>(on));
    return Py_NewRef(Py_None);
  });
}

static PyObject* take_trace(PyObject*, PyObject*) {
  return returned([] {
    Ref names(PyList_New(0));
    for (const std::string& name : lab::take_trace()) append(names, PyUnicode_FromString(name.c_str()));
    return names.release();
  });
}

static PyObject* record_launches(PyObject*, PyObject* arguments, PyObject* keywords) {
  static const char* names[] = {"multiprocessors", "major", nullptr};
  int multiprocessors, major = 9;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "i|i", const_cast<char**>(names), &multiprocessors,
                                   &major))
    return nullptr;
  lab::record_launches(multiprocessors, major);
  return Py_NewRef(Py_None);
}

// offset: of the kernel's host function in this module's file; `nm` gives its name.
static PyObject* take_launches(PyObject*, PyObject*) {
  return returned([] {
    Ref rows(PyList_New(0));
    for (const lab::trace::Launch& launch : lab::take_launches()) {
      Dl_info module{};
      dladdr(reinterpret_cast<void*>(launch.function), &module);
      const auto offset = launch.function - reinterpret_cast<std::uintptr_t>(module.dli_fbase);
      const auto &grid = launch.grid, &block = launch.block;
      append(rows, Py_BuildValue("{s:s, s:K, s:[III], s:[III], s:n, s:I, s:O}",      //
                                 "kernel", launch.kernel.c_str(),                    //
                                 "offset", static_cast<unsigned long long>(offset),  //
                                 "grid", grid[0], grid[1], grid[2],                  //
                                 "block", block[0], block[1], block[2],              //
                                 "smem_bytes", Py_ssize_t(launch.smem_bytes),        //
                                 "cluster", launch.cluster, "pdl", launch.pdl ? Py_True : Py_False));
    }
    return rows.release();
  });
}

#ifdef LAB_HOST
// None leaves an option as the environment sets it.
static PyObject* set_schedule(PyObject*, PyObject* arguments, PyObject* keywords) {
  static const char* names[] = {"seed", "ahead", nullptr};
  PyObject *seed = Py_None, *ahead = Py_None;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "|$OO", const_cast<char**>(names), &seed, &ahead))
    return nullptr;
  return returned([&] {
    static const lab::host::Options initial = lab::host::get_options();
    lab::host::Options options = initial;
    if (seed != Py_None) options.random = true, options.seed = number<uint64_t>(seed);
    if (ahead != Py_None) {
      const std::string which = text(ahead);
      if (which != "lowest" && which != "highest") throw std::invalid_argument("ahead: lowest or highest");
      options.ahead = which == "lowest" ? lab::host::Ahead::lowest : lab::host::Ahead::highest;
      options.random = false;
    }
    lab::host::set_options(options);
    return Py_NewRef(Py_None);
  });
}

static PyObject* hide_until_pdl_wait(PyObject*, PyObject* regions) {
  return returned([&] {
    std::vector<lab::host::Region> hidden;
    each(regions, [&](PyObject* region) {
      PyObject** of = items(region, 2);
      hidden.push_back({reinterpret_cast<void*>(number<std::uintptr_t>(of[0])), number<size_t>(of[1])});
    });
    lab::host::hide_until_pdl_wait(hidden);
    return Py_NewRef(Py_None);
  });
}
#endif

static PyObject* build_info(PyObject*, PyObject*) {
  return returned([] {
    const Ref json(PyImport_ImportModule("json"));
    return Ref(PyObject_CallMethod(json, "loads", "s", lab::build_facts())).release();
  });
}

static PyCFunction with_keywords(PyCFunctionWithKeywords function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

// Each text begins with what inspect.signature() shows.
static PyMethodDef functions[] = {
    {"set_settings", set_settings, METH_O,
     "set_settings(entries, /)\n--\n\n"
     "Sets the settings of later launches: a list of (op, bytes of an element, rows, shape, settings by name)."},
    {"force_settings", force_settings, METH_VARARGS,
     "force_settings(op, settings, /)\n--\n\n"
     "Makes every launch of an op use these settings, with {} its own rule; None ends this. For the tuner."},
    {"set_trace", set_trace, METH_O,
     "set_trace(on, /)\n--\n\n"
     "Starts or stops recording the names of launched kernels."},
    {"take_trace", take_trace, METH_NOARGS,
     "take_trace()\n--\n\n"
     "The names of the kernels launched since the last call, oldest first."},
    {"record_launches", with_keywords(record_launches), METH_VARARGS | METH_KEYWORDS,
     "record_launches(multiprocessors, major=9)\n--\n\n"
     "Makes later launches be recorded instead of run, as on a GPU with this number of multiprocessors and\n"
     "this major compute capability; 0 ends this."},
    {"take_launches", take_launches, METH_NOARGS,
     "take_launches()\n--\n\n"
     "list of dict: kernel, offset (of its host function in this file), grid, block, smem_bytes, cluster,\n"
     "pdl."},
#ifdef LAB_HOST
    {"set_schedule", with_keywords(set_schedule), METH_VARARGS | METH_KEYWORDS,
     "set_schedule(*, seed=None, ahead=None)\n--\n\n"
     "Sets the order of threads in later launches: random by a seed, or the `lowest` or `highest` thread\n"
     "runs as far ahead as barriers let it; without an argument as LAB_HOST_SEED and LAB_HOST_AHEAD say."},
    {"hide_until_pdl_wait", hide_until_pdl_wait, METH_O,
     "hide_until_pdl_wait(regions, /)\n--\n\n"
     "A list of (address, bytes) that later kernels with programmatic dependent launch find filled with\n"
     "ones until they call pdl_wait(); [] ends this. For tests."},
#endif
    {"build_info", build_info, METH_NOARGS,
     "build_info()\n--\n\n"
     "dict: compiler, archs, flags, sanitizer; for the GPU build also nvcc and host_compiler."},
    {nullptr, nullptr, 0, nullptr}};

// ---- the module ------------------------------------------------------------------------------------------

static void add_launchers(PyObject* m) {
  OP(embedding, ids, table, out, rows, cols, vocab, dtype, stream);
  OP(rmsnorm, x, w, residual, y, rows, groups, cols, x_stride, y_stride, eps, dtype, stream);
  OP(linear, x, w, bias, y, rows, n, k, dtype, out_dtype, stream);
  OP(rope, q, k, positions, cos_sin, batch, q_heads, kv_heads, head_dim, dtype, stream);
  OP(kv_append, k, v, cache, positions, batch, head_dim, dtype, stream);
  OP(decode_attention, q, cache, context_lens, out, splits, batch, q_heads, head_dim, scale, dtype, stream);
  OP(silu_mul, gate_up, y, rows, cols, dtype, stream);
  OP(sample, logits, positions, out, table, rows, vocab, temperature, top_k, top_p, min_p, seed, stream);
  OP(norm_linear, x, norm_w, w, bias, y, normed, rows, n, k, eps, dtype, out_dtype, stream);
  OP(norm_linear_silu_mul, x, norm_w, w, y, normed, rows, n, k, eps, dtype, stream);
  OP(linear_add, x, w, bias, residual, rows, n, k, dtype, stream);
  OP(rope_append_attention, q, k, v, norms, positions, cos_sin, cache, out, splits, batch, q_heads, head_dim,
     scale, dtype, stream);
  OP(norm_linear_argmax, x, norm_w, w, logits, scratch, normed, out, rows, n, k, eps, dtype, stream);
  OP(decode_step, ids, positions, weights, cache, logits, out, exchange, sizes, q_heads, head_dim, eps, scale,
     dtype, stream, peers);
  OP(all_reduce_add, partial, residual, peers, words, two_shot, dtype, stream);
  OP(all_reduce_add_rmsnorm, partial, residual, w, y, peers, rows, words, cols, eps, dtype, stream);
  OP(all_argmax, logits, ids, rows, n, first, peers, stream);
  OP(bandwidth, src, dst, bytes, mode, passes, blocks, threads, stream);
  OP(link_latency, peers, rounds, stream);
  OP(linear_ladder, x, w, bias, y, rows, n, k, dtype, out_dtype, stream);
  OP(quantised_linear_ladder, x, w, expanded, bias, y, rows, n, k, dtype, out_dtype, stream);
  OP(rmsnorm_ladder, x, w, residual, y, rows, groups, cols, x_stride, y_stride, eps, dtype, stream);
  OP(decode_attention_ladder, q, cache, context_lens, out, splits, batch, q_heads, head_dim, scale, dtype,
     stream);
}

#define LAB_TEXT_(name) #name
#define LAB_TEXT(name) LAB_TEXT_(name)
#define LAB_JOINED_(a, b) a##b
#define LAB_JOINED(a, b) LAB_JOINED_(a, b)

PyMODINIT_FUNC LAB_JOINED(PyInit_, LAB_MODULE)() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   LAB_TEXT(LAB_MODULE),
                                   nullptr,
                                   -1,
                                   functions,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  return returned([] {
    Ref module(PyModule_Create(&definition));
    add_launchers(module);
    return module.release();
  });
}
