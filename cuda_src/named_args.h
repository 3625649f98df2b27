// A launcher as a Python function that takes its arguments by name, and fills the launcher's struct with
// them.
//
//   OP(silu_mul, gate_up, y, rows, cols, dtype, stream);   in Python: silu_mul(gate_up=..., y=..., ...)
//
// A missing or unknown name, or a value that does not fit its field, raises TypeError with the argument's
// name. A field that is a struct is passed as a tuple.
//
// The way arguments are passed was chosen by the cost of a call. rope_append_attention has 27 values, linear
// has 10. Microseconds on two cores of a cloud machine, CPython 3.11, pybind11 3.1, November 2026, the least
// of 300 times 100 calls:
//
//                                                              27 values   10 values
//   27 or 10 positional numbers of a pybind11 function              0.98        0.53
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
//
// CPython's own interface, because pybind11's headers take the compiler 4 of 6 seconds.
#pragma once
#include <Python.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "groups.h"
#include "launchers.h"

namespace lab::named {

// ---- Python's errors and C++'s --------------------------------------------------------------------------

struct PythonError {};  // thrown where a Python error is set

// A reference that this owns.
class Ref {
 public:
  // object: what a function of Python returned; null where it has set an error.
  explicit Ref(PyObject* object) : object_(object) {
    if (!object) throw PythonError{};
  }
  Ref(const Ref&) = delete;
  ~Ref() { Py_XDECREF(object_); }
  operator PyObject*() const { return object_; }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

// What f() returns; null, with a Python error set, if it throws.
template <typename F>
PyObject* returned(F f) {
  try {
    return f();
  } catch (const PythonError&) {
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) { PyErr_SetString(PyExc_RuntimeError, error.what()); }
  return nullptr;
}

// ---- values ---------------------------------------------------------------------------------------------

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

// How many names there are in a list of names separated by commas.
constexpr size_t count_of(const char* listed) {
  size_t count = 1;
  for (; *listed; ++listed) count += *listed == ',';
  return count;
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

// The fields of a launcher's struct, as OP lists them: called with references to them.
struct FieldList {
  const char* begin;   // of the struct
  const char* listed;  // the names that are left, separated by commas
  std::vector<Field> fields;

  template <typename... T>
  void operator()(T&... each) {
    (add(reinterpret_cast<const char*>(&each) - begin, &read_at<T>), ...);
  }
  void add(size_t offset, bool (*read)(PyObject*, void*)) {
    while (*listed == ' ' || *listed == ',') ++listed;
    const char* end = listed;
    while (*end && *end != ',') ++end;
    fields.push_back({PyUnicode_InternFromString(std::string(listed, end).c_str()), offset, read});
    listed = end;
  }
};

using Call = PyObject* (*)(PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* names);

// The Python function of a launcher, but for what depends on the type of its struct.
struct Function {
  std::string name, signature, documentation;
  std::vector<Field> fields;
  int positional = 0;
  PyMethodDef definition{};

  // Raises a TypeError about one argument; keeps the text of the present Python error, if there is one.
  [[noreturn]] void refuse(PyObject* argument, const char* what) const {
    if (!PyErr_Occurred()) {
      PyErr_Format(PyExc_TypeError, "%s(): %s %R", name.c_str(), what, argument);
    } else {
      PyObject *type, *value, *traceback;
      PyErr_Fetch(&type, &value, &traceback);
      PyErr_NormalizeException(&type, &value, &traceback);
      PyErr_Format(PyExc_TypeError, "%s(): %U: %S", name.c_str(), argument, value);
      Py_XDECREF(type), Py_XDECREF(value), Py_XDECREF(traceback);
    }
    throw PythonError{};
  }

  // The index of an argument in `fields`, or their number if there is no such name. Callers mostly keep the
  // order of the declaration.
  size_t place_of(PyObject* argument, size_t guess) const {
    if (guess < fields.size() && fields[guess].name == argument) return guess;
    for (size_t i = 0; i < fields.size(); ++i) {
      if (fields[i].name == argument) return i;
    }
    for (size_t i = 0; i < fields.size(); ++i) {  // a name made at run time is not interned
      if (PyUnicode_Compare(fields[i].name, argument) == 0) return i;
    }
    return fields.size();
  }

  // Fills a struct of arguments.
  void read_all(void* args, PyObject* const* values, Py_ssize_t given_by_place, PyObject* names) const {
    if (given_by_place != positional) {
      PyErr_Format(PyExc_TypeError, "%s(): pass the arguments by name: %s", name.c_str(), signature.c_str());
      throw PythonError{};
    }
    const size_t count = names ? PyTuple_GET_SIZE(names) : 0;
    std::array<bool, kMostKeywords> given{};
    for (size_t i = 0; i < count; ++i) {
      PyObject* argument = PyTuple_GET_ITEM(names, i);
      const size_t place = place_of(argument, i);
      if (place == fields.size()) refuse(argument, "there is no argument");
      const Field& field = fields[place];
      if (!field.read(values[positional + i], static_cast<char*>(args) + field.offset)) refuse(argument, "");
      given[place] = true;
    }
    for (size_t i = 0; i < fields.size(); ++i) {
      if (!given[i]) refuse(fields[i].name, "missing argument");
    }
  }

  // Adds the function to a module. listed: the names of the fields, separated by commas.
  void define(PyObject* module, const char* called, const char* listed, Call call) {
    name = called;
    signature = name + (positional ? "(rung, /, *, " : "(*, ") + listed + ")";
    documentation = signature + "\n--\n\n";  // the form in which inspect.signature() expects it
    definition = {name.c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call)),
                  METH_FASTCALL | METH_KEYWORDS, documentation.c_str()};
    const Ref owner(PyModule_GetNameObject(module));
    const Ref function(PyCFunction_NewEx(&definition, nullptr, owner));
    if (PyModule_AddObjectRef(module, called, function)) throw PythonError{};
  }
};

// Other Python threads run while this exists.
class OthersRun {
 public:
  OthersRun() : state_(PyEval_SaveThread()) {}
  OthersRun(const OthersRun&) = delete;
  ~OthersRun() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

// The Python function of one launcher. Fields is the launcher's struct of arguments with a method each() that
// passes all its fields to a FieldList.
template <auto launcher, typename Fields>
struct FunctionOf {
  static constexpr int kPositional = Signature<decltype(launcher)>::kPositional;
  static inline Function function;

  static PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
    return returned([&]() -> PyObject* {
      Fields args{};
      function.read_all(&args, values, positional, names);
      [[maybe_unused]] int rung = 0;
      if constexpr (kPositional == 1) {
        if (!read_value(values[0], rung)) throw PythonError{};
      }
      {
        const OthersRun others;
        if constexpr (kPositional == 1) {
          launcher(rung, args);
        } else {
          launcher(args);
        }
      }
      Py_RETURN_NONE;
    });
  }

  // listed: the names of the fields in the order of each().
  static void define(PyObject* module, const char* called, const char* listed) {
    Fields args{};
    FieldList list{reinterpret_cast<const char*>(&args), listed, {}};
    args.each(list);
    function.fields = std::move(list.fields);
    function.positional = kPositional;
    function.define(module, called, listed, &call);
  }
};

}  // namespace lab::named

// Defines the Python function of a launcher in module m. The names of its struct's fields follow. All of them
// must be there, or the structured binding that takes the struct apart does not compile. The derived struct
// Fields can list them in any order.
#define OP(launcher, ...)                                                          \
  do {                                                                             \
    using Args = lab::named::Signature<decltype(&launcher)>::Args;                 \
    struct Fields : Args {                                                         \
      void each(lab::named::FieldList& list) { list(__VA_ARGS__); }                \
    };                                                                             \
    { [[maybe_unused]] const auto [__VA_ARGS__] = Args{}; }                        \
    static_assert(lab::named::count_of(#__VA_ARGS__) <= lab::named::kMostKeywords, \
                  "put arguments that belong together into a group");              \
    lab::named::FunctionOf<&launcher, Fields>::define(m, #launcher, #__VA_ARGS__); \
  } while (0)
