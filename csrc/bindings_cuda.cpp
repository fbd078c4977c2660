#include "bindings_cuda.h"

#include <pybind11/stl.h>

#include <string>

#include "cuda/table.h"

namespace {

namespace py = pybind11;
using namespace resnet_fused::cuda;

const char* dtype_name(DType d) { return d == DType::kF32 ? "float32" : d == DType::kF16 ? "float16" : "bfloat16"; }

DType dtype_named(const std::string& name) {
  for (DType d : {DType::kF32, DType::kF16, DType::kBf16})
    if (name == dtype_name(d)) return d;
  throw py::value_error("dtype: expected float32, float16 or bfloat16, got " + name);
}

py::list table() {
  py::list rows;
  auto known = [](int value) -> py::object { return value < 0 ? py::object(py::none()) : py::int_(value); };
  for (const TableRow& r : kernel_table()) {
    py::dict d;
    d["op"] = r.op;
    d["kernel"] = r.name;
    d["algorithm"] = r.algorithm;
    d["arch"] = r.arch == 90 ? "sm_90a" : "sm_80";
    d["dtype"] = dtype_name(r.dtype);
    d["tile_m"] = r.tile_m;
    d["tile_n"] = r.tile_n;
    d["tile_k"] = r.tile_k;
    d["stages"] = r.stages;
    d["threads"] = r.threads;
    d["shared_bytes"] = r.shared_bytes;
    d["registers"] = known(r.registers);
    d["blocks_per_multiprocessor"] = known(r.blocks_per_multiprocessor);
    rows.append(d);
  }
  return rows;
}

py::tuple list_candidates(const std::string& op, const std::map<std::string, int64_t>& dims, const std::string& dtype,
                          int arch, int multiprocessors, int shared_bytes) {
  std::string why;
  py::list found;
  for (const Candidate& c : candidates(op, dims, dtype_named(dtype), {arch, multiprocessors, shared_bytes}, &why))
    found.append(py::make_tuple(c.algorithm, c.name, c.microseconds));
  return py::make_tuple(found, why);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_kernel_table", &table, "One dict a compiled CUDA kernel; registers and occupancy where a GPU tells.");
  m.def("cuda_candidates", &list_candidates, py::arg("op"), py::arg("dims"), py::arg("dtype"), py::arg("arch"),
        py::arg("multiprocessors"), py::arg("shared_bytes"),
        "((algorithm, kernel, predicted microseconds), ...), best first, and why there is none.");
}
