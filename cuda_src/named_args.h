// A launcher as a Python function that takes its arguments by name, and fills the launcher's struct with
// them.
//
//   OP(silu_mul, gate_up, y, rows, cols, dtype, stream);   in Python: silu_mul(gate_up=..., y=..., ...)
//
// A missing or unknown name, or a value that does not fit its field, raises TypeError with the argument's
// name. A field that is a struct is passed as a tuple.
//
// The way arguments are passed was chosen by the cost of a call. rope_append_attention has 27 values, linear
// had 10. Microseconds on two cores of a cloud machine, CPython 3.11, pybind11 3.1, November 2026, the least
// of 300 times 100 calls:
//
//                                                              27 values   10 values
//   27 or 10 positional numbers of a pybind11 function (before)     0.98        0.53
//   this: keywords of a METH_FASTCALL function, groups as tuples    0.85        0.37
//   the same, but all 27 as keywords                                1.57
//   keywords of a pybind11 function (py::arg)                       4.66
//   a py::class_ whose attributes are set one by one                6.50
//   tuples as std::tuple arguments of a pybind11 function           2.17
//   struct.pack and one bytes argument                              0.93        no names, no checks
//   a ctypes.Structure, without the call                            2.30
//
// A call passes its keywords as an array of values and a tuple of interned names, so that a name is
// recognised by its address. But with more than 15 keywords CPython's compiler first makes a dict of them,
// which costs as much again. So no launcher has more than 15, and values that belong together form a group.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "groups.h"
#include "launchers.h"

namespace lab::named {

namespace py = pybind11;

constexpr size_t kMostKeywords = 15;  // half of CPython's STACK_USE_GUIDELINE: names and values

// Each read_value() converts a Python value and writes it to a field. It returns false, with a Python error
// set, if the value does not fit.

inline bool read_value(PyObject* value, float& field) {
  const double number = PyFloat_AsDouble(value);
  if (number == -1.0 && PyErr_Occurred()) return false;
  field = float(number);
  return true;
}

// int, int64_t, and unsigned types (addresses and seeds).
template <typename T, std::enable_if_t<std::is_integral_v<T>, int> = 0>
bool read_value(PyObject* value, T& field) {
  using Wide = std::conditional_t<std::is_signed_v<T>, long long, unsigned long long>;
  Wide number;
  if constexpr (std::is_signed_v<T>) {
    number = PyLong_AsLongLong(value);
  } else {
    number = PyLong_AsUnsignedLongLong(value);
  }
  if (number == Wide(-1) && PyErr_Occurred()) return false;
  field = T(number);
  if (Wide(field) == number) return true;
  PyErr_Format(PyExc_OverflowError, "%R does not fit %zu bits", value, 8 * sizeof(T));
  return false;
}

template <typename Group, std::enable_if_t<std::is_class_v<Group>, int> = 0>
bool read_value(PyObject* value, Group& group) {
  return with_fields(group, [&](auto&... fields) {
    if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != Py_ssize_t(sizeof...(fields))) {
      PyErr_Format(PyExc_TypeError, "a tuple of %zu values is needed, not %R", sizeof...(fields), value);
      return false;
    }
    Py_ssize_t i = 0;
    return (read_value(PyTuple_GET_ITEM(value, i++), fields) && ...);
  });
}

template <typename T>
bool read_at(PyObject* value, void* field) {
  return read_value(value, *static_cast<T*>(field));
}

struct Field {
  PyObject* name;  // interned
  size_t offset;   // in the struct
  bool (*read)(PyObject* value, void* field);
};

template <typename Launcher>
struct Signature;

template <typename Struct>
struct Signature<void (*)(const Struct&)> {
  using Args = Struct;
  static constexpr int kPositional = 0;
};

template <typename Struct>
struct Signature<void (*)(int rung, const Struct&)> {
  using Args = Struct;
  static constexpr int kPositional = 1;
};

// The fields of a launcher's struct, as OP lists them: called with references to them and with their names.
struct FieldList {
  const char* begin;  // of the struct
  std::istringstream words;
  std::vector<Field> fields;

  FieldList(const void* args, const char* listed) : begin(static_cast<const char*>(args)), words(listed) {}
  template <typename... T>
  void operator()(T&... each) {
    (add(reinterpret_cast<const char*>(&each) - begin, &read_at<T>), ...);
  }
  void add(size_t offset, bool (*read)(PyObject*, void*)) {
    std::string word;
    std::getline(words >> std::ws, word, ',');
    fields.push_back({PyUnicode_InternFromString(word.c_str()), offset, read});
  }
};

// How many names there are in a list of names separated by commas.
constexpr size_t count_of(const char* listed) {
  size_t count = 1;
  for (; *listed; ++listed) count += *listed == ',';
  return count;
}

// The Python function of one launcher. Fields is the launcher's struct of arguments with a method each() that
// passes all its fields to a FieldList, and count(), their number.
template <auto launcher, typename Fields>
class Function {
  static constexpr size_t kCount = Fields::count();
  static constexpr int kPositional = Signature<decltype(launcher)>::kPositional;
  static_assert(kCount <= kMostKeywords, "put arguments that belong together into a group");

  static inline std::array<Field, kCount> fields;
  static inline std::string name, signature, documentation;
  static inline PyMethodDef definition;

  // Raises a TypeError about one argument; keeps the text of the present Python error, if there is one.
  static bool refuse(PyObject* argument, const char* what) {
    if (!PyErr_Occurred()) {
      PyErr_Format(PyExc_TypeError, "%s(): %s %R", name.c_str(), what, argument);
      return false;
    }
    const py::error_already_set said;
    PyErr_Format(PyExc_TypeError, "%s(): %U: %S", name.c_str(), argument, said.value().ptr());
    return false;
  }

  // The index of an argument in `fields`, or kCount if there is no such name. Callers mostly keep the order
  // of the declaration.
  static size_t place_of(PyObject* argument, size_t guess) {
    if (guess < kCount && fields[guess].name == argument) return guess;
    for (size_t i = 0; i < kCount; ++i) {
      if (fields[i].name == argument) return i;
    }
    for (size_t i = 0; i < kCount; ++i) {  // a name made at run time is not interned
      if (PyUnicode_Compare(fields[i].name, argument) == 0) return i;
    }
    return kCount;
  }

  static bool read_all(Fields& args, PyObject* const* values, PyObject* names) {
    const size_t count = names ? PyTuple_GET_SIZE(names) : 0;
    std::array<bool, kCount> given{};
    for (size_t i = 0; i < count; ++i) {
      PyObject* argument = PyTuple_GET_ITEM(names, i);
      const size_t place = place_of(argument, i);
      if (place == kCount) return refuse(argument, "there is no argument");
      const Field& field = fields[place];
      if (!field.read(values[i], reinterpret_cast<char*>(&args) + field.offset)) return refuse(argument, "");
      given[place] = true;
    }
    for (size_t i = 0; i < kCount; ++i) {
      if (!given[i]) return refuse(fields[i].name, "missing argument");
    }
    return true;
  }

  static PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
    if (positional != kPositional) {
      PyErr_Format(PyExc_TypeError, "%s(): pass the arguments by name: %s", name.c_str(), signature.c_str());
      return nullptr;
    }
    Fields args{};
    [[maybe_unused]] int rung = 0;
    if constexpr (kPositional == 1) {
      if (!read_value(values[0], rung)) return nullptr;
    }
    if (!read_all(args, values + positional, names)) return nullptr;
    try {
      py::gil_scoped_release others_run;
      if constexpr (kPositional == 1) {
        launcher(rung, args);
      } else {
        launcher(args);
      }
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
      return nullptr;
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
      return nullptr;
    }
    Py_RETURN_NONE;
  }

 public:
  // Adds the function to a module. listed: the names of the fields, separated by commas, in the order of
  // each().
  static void define(py::module_& module, const char* called, const char* listed) {
    name = called;
    Fields args{};
    FieldList list(&args, listed);
    args.each(list);
    std::copy(list.fields.begin(), list.fields.end(), fields.begin());
    signature = name + (kPositional ? "(rung, /, *, " : "(*, ") + listed + ")";
    documentation = signature + "\n--\n\n";  // the form in which inspect.signature() expects it
    definition.ml_name = name.c_str();
    definition.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call));
    definition.ml_flags = METH_FASTCALL | METH_KEYWORDS;
    definition.ml_doc = documentation.c_str();
    const py::object owner = module.attr("__name__");
    module.add_object(
        called, py::reinterpret_steal<py::object>(PyCFunction_NewEx(&definition, nullptr, owner.ptr())));
  }
};

}  // namespace lab::named

// Defines the Python function of a launcher in module m. The names of its struct's fields follow. All of them
// must be there, or the structured binding that takes the struct apart does not compile. The derived struct
// Fields can list them in any order.
#define OP(launcher, ...)                                                            \
  do {                                                                               \
    using Args = lab::named::Signature<decltype(&launcher)>::Args;                   \
    struct Fields : Args {                                                           \
      static constexpr size_t count() { return lab::named::count_of(#__VA_ARGS__); } \
      void each(lab::named::FieldList& list) { list(__VA_ARGS__); }                  \
    };                                                                               \
    { [[maybe_unused]] const auto [__VA_ARGS__] = Args{}; }                          \
    lab::named::Function<&launcher, Fields>::define(m, #launcher, #__VA_ARGS__);     \
  } while (0)
