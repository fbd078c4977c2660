// What is no tensor op, free of torch and Python: instruction sets, the tables of compiled kernels, the cost model,
// memory. bindings.cpp offers it through pybind11, registration_tables.cpp as a tensor op for other Pythons.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "cpu/kernels.h"

namespace resnet_fused::tables {

using Value = std::variant<std::monostate, bool, int64_t, double, std::string>;  // monostate is Python's None
using Row = std::vector<std::pair<std::string, Value>>;
using Dims = std::map<std::string, int64_t>;  // of a shape, as in resnet_fused/shapes.py

RF_EXPORT std::vector<std::string> isas();  // that this machine runs
RF_EXPORT std::vector<Row> kernel_table();
// Predicted seconds, FLOPs, bytes and workspace. Throws std::invalid_argument, as all that follow.
RF_EXPORT Row cost(const std::string& op, const Dims& dims, const std::string& dtype, const std::string& algorithm,
                   int threads);

#ifdef RESNET_FUSED_CUDA
RF_EXPORT std::vector<Row> cuda_kernel_table();
RF_EXPORT std::string cuda_driver_lack();
struct CudaCandidate {
  std::string algorithm, kernel;
  double microseconds;  // predicted
};
// The best first; if there is none, `why`.
RF_EXPORT std::vector<CudaCandidate> cuda_candidates(const std::string& op, const Dims& dims, const std::string& dtype,
                                                     int arch, int multiprocessors, int shared_bytes, std::string* why);
#endif

}  // namespace resnet_fused::tables
