// tables.h as a tensor op without tensors, `_table(function, arguments)`: what resnet_fused/_bindings.py calls where
// the package has no pybind11 module for the Python that runs. Arguments are lines of name=value, those of a shape's
// dims among them; the result is JSON.
#include <torch/csrc/stable/library.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "tables.h"

namespace {

namespace tables = resnet_fused::tables;
using namespace resnet_fused::cpu;

std::string json(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    if (c == '\n')
      quoted += "\\n";
    else
      quoted += c;
  }
  return quoted + '"';
}
std::string json(int64_t value) { return std::to_string(value); }
std::string json(bool value) { return value ? "true" : "false"; }
std::string json(std::monostate) { return "null"; }
std::string json(double value) {
  std::ostringstream text;
  text.precision(17);
  text << value;
  return text.str();
}
std::string json(const tables::Row& row) {
  std::string text;
  for (const auto& [name, value] : row)
    text += (text.empty() ? "" : ",") + json(name) + ":" + std::visit([](const auto& v) { return json(v); }, value);
  return "{" + text + "}";
}
template <class Item>
std::string json(const std::vector<Item>& items) {
  std::string text;
  for (const Item& item : items) text += (text.empty() ? "" : ",") + json(item);
  return "[" + text + "]";
}

class Arguments {
 public:
  explicit Arguments(const std::string& lines) {
    std::istringstream stream(lines);
    for (std::string line; std::getline(stream, line);) {
      const size_t at = line.find('=');
      const std::string name = line.substr(0, at), value = line.substr(at + 1);
      if (name.rfind("dims.", 0) == 0)
        dims[name.substr(5)] = std::stoll(value);
      else
        values_[name] = value;
    }
  }
  const std::string& text(const char* name) const { return values_.at(name); }
  int64_t number(const char* name) const { return std::stoll(text(name)); }
  int integer(const char* name) const { return static_cast<int>(number(name)); }
  tables::Dims dims;

 private:
  std::map<std::string, std::string> values_;
};

std::string call(const std::string& function, const Arguments& a) {
  if (function == "isa") return json(std::string(kernels().name));
  if (function == "isas") return json(tables::isas());
  if (function == "set_isa") return select_isa(isa_named(a.text("name"))), "null";
  if (function == "kernel_table") return json(tables::kernel_table());
  if (function == "cost")
    return json(tables::cost(a.text("op"), a.dims, a.text("dtype"), a.text("algorithm"), a.integer("threads")));
  if (function == "cached_bytes") return json(cached_bytes());
  if (function == "release_memory") return release_memory(), "null";
  if (function == "pool_limit") return json(static_cast<int64_t>(pool_limit()));
  if (function == "set_pool_limit") return set_pool_limit(static_cast<size_t>(a.number("bytes"))), "null";
  if (function == "poison_workspaces") return poison_workspaces(), "null";
#ifndef RESNET_FUSED_CUDA
  if (function == "has_cuda") return json(false);
#else
  if (function == "has_cuda") return json(true);
  if (function == "cuda_kernel_table") return json(tables::cuda_kernel_table());
  if (function == "cuda_driver_lack") return json(tables::cuda_driver_lack());
  if (function == "cuda_candidates") {
    std::string why;
    std::vector<tables::Row> found;
    for (const auto& c : tables::cuda_candidates(a.text("op"), a.dims, a.text("dtype"), a.integer("arch"),
                                                 a.integer("multiprocessors"), a.integer("shared_bytes"), &why))
      found.push_back({{"algorithm", c.algorithm}, {"kernel", c.kernel}, {"microseconds", c.microseconds}});
    return "[" + json(found) + "," + json(why) + "]";
  }
#endif
  throw std::invalid_argument("function: there is no " + function);
}

/// {"value": ...}, or {"wrong": what} if an argument was.
std::string table(std::string function, std::string arguments) {
  try {
    return "{\"value\":" + call(function, Arguments(arguments)) + "}";
  } catch (const std::invalid_argument& error) {
    return "{\"wrong\":" + json(std::string(error.what())) + "}";
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, m) { m.impl("_table", TORCH_BOX(&table)); }
