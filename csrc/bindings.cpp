// resnet_fused._bindings: tables.h through pybind11. resnet_fused/_bindings.py is the same for other Pythons.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "tables.h"

namespace {

namespace py = pybind11;
namespace tables = resnet_fused::tables;
using namespace resnet_fused::cpu;

py::dict dict(const tables::Row& row) {
  py::dict d;
  for (const auto& [name, value] : row) d[name.c_str()] = py::cast(value);
  return d;
}

py::list dicts(const std::vector<tables::Row>& rows) {
  py::list list;
  for (const tables::Row& row : rows) list.append(dict(row));
  return list;
}

}  // namespace

PYBIND11_MODULE(_bindings, m) {
  m.doc() = "Instruction sets, kernel table, cost model and memory of the native library.";
  m.def("isa", [] { return kernels().name; }, "The instruction set in use.");
  m.def("isas", &tables::isas, "Those that this machine runs.");
  m.def(
      "set_isa", [](const std::string& name) { select_isa(isa_named(name)); }, py::arg("name"),
      "Use another one; packed weights depend on it.");
  m.def("kernel_table", [] { return dicts(tables::kernel_table()); }, "One dict a compiled kernel.");
  m.def(
      "cost",
      [](const std::string& op, const tables::Dims& dims, const std::string& dtype, const std::string& algorithm,
         int threads) { return dict(tables::cost(op, dims, dtype, algorithm, threads)); },
      py::arg("op"), py::arg("dims"), py::arg("dtype"), py::arg("algorithm"), py::arg("threads"),
      "Predicted seconds, FLOPs, bytes and workspace of a layer or block.");
  m.def("cached_bytes", &cached_bytes, "Bytes kept: idle outputs and workspaces.");
  m.def("release_memory", &release_memory, "Give them back to the system; no kernel may be running.");
  m.def("pool_limit", &pool_limit, "Most bytes of idle outputs that are kept.");
  m.def("set_pool_limit", &set_pool_limit, py::arg("bytes"));
  m.def("poison_workspaces", &poison_workspaces, "Fill the workspaces with NaN (tests).");
#ifdef RESNET_FUSED_CUDA
  m.def(
      "cuda_kernel_table", [] { return dicts(tables::cuda_kernel_table()); },
      "One dict a compiled CUDA kernel; registers and occupancy where a GPU tells.");
  m.def(
      "cuda_candidates",
      [](const std::string& op, const tables::Dims& dims, const std::string& dtype, int arch, int multiprocessors,
         int shared_bytes) {
        std::string why;
        py::list found;
        for (const auto& c : tables::cuda_candidates(op, dims, dtype, arch, multiprocessors, shared_bytes, &why))
          found.append(py::make_tuple(c.algorithm, c.kernel, c.microseconds));
        return py::make_tuple(found, why);
      },
      py::arg("op"), py::arg("dims"), py::arg("dtype"), py::arg("arch"), py::arg("multiprocessors"),
      py::arg("shared_bytes"),
      "((algorithm, kernel, predicted microseconds), ...), best first, and why there is none.");
#endif
}
