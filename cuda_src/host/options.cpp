// The options, from the environment (see cuda_on_cpu.h) or set by the program.
#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>

#include "runtime.h"

namespace lab {
namespace host {
namespace {

// Reads a whole number; if it is none, the error names the variable.
bool environment_number(const char* name, uint64_t* value) {
  const char* text = getenv(name);
  if (text == nullptr || *text == '\0') return false;
  char* end = nullptr;
  *value = strtoull(text, &end, 10);
  if (*end != '\0' || *text == '-') {
    throw std::runtime_error(std::string(name) + "=" + text + ": a whole number is needed");
  }
  return true;
}

Ahead environment_ahead() {
  const char* text = getenv("LAB_HOST_AHEAD");
  const std::string value = text == nullptr ? "" : text;
  if (value == "lowest") return Ahead::lowest;
  if (value == "highest") return Ahead::highest;
  if (!value.empty()) throw std::runtime_error("LAB_HOST_AHEAD=" + value + ": lowest or highest is needed");
  return Ahead::nobody;
}

Options options_from_environment() {
  Options options;
  uint64_t value = 0;
  if (environment_number("LAB_HOST_THREADS", &value)) options.threads = int(std::min<uint64_t>(value, 1024));
  if (environment_number("LAB_HOST_SEED", &value)) {
    options.random = true;
    options.seed = value;
  }
  options.ahead = environment_ahead();
  if (environment_number("LAB_HOST_POISON", &value)) options.poison = value != 0;
  if (environment_number("LAB_HOST_STACK", &value)) options.stack_bytes = size_t(value);
  return options;
}

std::mutex options_mutex;

Options& the_options() {
  static Options options = options_from_environment();
  return options;
}

}  // namespace

Options get_options() {
  std::lock_guard<std::mutex> lock(options_mutex);
  return the_options();
}

void set_options(const Options& options) {
  std::lock_guard<std::mutex> lock(options_mutex);
  the_options() = options;
}

}  // namespace host
}  // namespace lab
