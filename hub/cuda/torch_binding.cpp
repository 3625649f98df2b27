// The launchers as torch ops: each takes the values of its struct of arguments, one after the other, groups
// flattened. Tensors are given as addresses, which the callers in lab/ops have checked, so the ops have no
// tensors and dispatch on none; what torch.compile sees are the ops that lab/torch_ops.py registers above them.
//
// launcher_list.h has a line OP(name, fields...) for each launcher, in the order in which lab/launchers.py gives
// the values. registration.h is written by the builder.
#include <torch/library.h>

#include <string>
#include <vector>

#include "groups.h"
#include "launchers.h"
#include "registration.h"
#include "settings_table.h"
#include "trace.h"

namespace {

using Values = c10::ArrayRef<at::Scalar>;

template <typename Launcher>
struct ArgsOf;
template <typename Struct>
struct ArgsOf<void (*)(const Struct&)> {
  using type = Struct;
};

// Writes the values to fields, in order.
struct Reader {
  Values values;
  size_t next = 0;

  template <typename... T>
  void all(T&... each) {
    ((*this)(each), ...);
  }

  template <typename T>
  void operator()(T& field) {
    if constexpr (std::is_class_v<T>) {
      lab::named::with_fields(field, [&](auto&... each) {
        all(each...);
        return true;
      });
    } else {
      TORCH_CHECK(next < values.size(), "too few values: ", values.size());
      const at::Scalar& value = values[next++];
      if constexpr (std::is_floating_point_v<T>) {
        field = T(value.to<double>());
      } else {
        TORCH_CHECK(value.isIntegral(false), "value ", next - 1, " is no integer");
        const int64_t number = value.to<int64_t>();  // unsigned ones of 64 bits have the same bits
        field = T(number);
        TORCH_CHECK(int64_t(field) == number, "value ", next - 1, " does not fit");
      }
    }
  }
};

template <auto launcher, typename Fields>
void launch(Values values) {
  Reader reader{values};
  Fields args{};
  args.each(reader);
  TORCH_CHECK(reader.next == values.size(), "too many values: ", values.size());
  launcher(args);
}

void clear_settings() {
  std::lock_guard<std::mutex> lock(lab::settings::mutex);
  lab::settings::measured.clear();
}

// What `lab tune` measured for an op, a shape and a number of rows.
void add_setting(std::string op, int64_t itemsize, int64_t rows, std::vector<int64_t> shape,
                 std::vector<std::string> names, std::vector<int64_t> values) {
  TORCH_CHECK(names.size() == values.size(), "a value is needed for each name");
  std::map<std::string, int> by_name;
  for (size_t i = 0; i < names.size(); ++i) by_name[names[i]] = int(values[i]);
  const lab::Settings parsed = lab::settings::parse(by_name);
  std::lock_guard<std::mutex> lock(lab::settings::mutex);
  lab::settings::measured[{op, int(itemsize), lab::settings::Shape(shape.begin(), shape.end())}][int(rows)] =
      parsed;
}

}  // namespace

// As in cuda_src/named_args.h: the derived struct can list the fields in any order.
#define OP(launcher, ...)                                                     \
  do {                                                                        \
    struct Fields : ArgsOf<decltype(&launcher)>::type {                       \
      void each(Reader& reader) { reader.all(__VA_ARGS__); }                  \
    };                                                                        \
    ops.def(#launcher "(Scalar[] values) -> ()", &launch<&launcher, Fields>); \
  } while (0)

TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
#include "launcher_list.h"
  ops.def("clear_settings() -> ()", &clear_settings);
  ops.def("add_setting(str op, int itemsize, int rows, int[] shape, str[] names, int[] values) -> ()",
          &add_setting);
  ops.def("set_trace(bool on) -> ()", +[](bool on) { lab::set_trace(on); });
  ops.def("take_trace() -> str[]", +[] { return lab::take_trace(); });
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
