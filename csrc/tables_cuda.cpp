// The CUDA part of tables.h.
#include <stdexcept>

#include "cuda/table.h"
#include "tables.h"

namespace resnet_fused::tables {
namespace {

const char* dtype_name(cuda::DType d) {
  return d == cuda::DType::kF32 ? "float32" : d == cuda::DType::kF16 ? "float16" : "bfloat16";
}

cuda::DType dtype_named(const std::string& name) {
  for (cuda::DType d : {cuda::DType::kF32, cuda::DType::kF16, cuda::DType::kBf16})
    if (name == dtype_name(d)) return d;
  throw std::invalid_argument("dtype: expected float32, float16 or bfloat16, got " + name);
}

}  // namespace

std::vector<Row> cuda_kernel_table() {
  std::vector<Row> rows;
  const auto known = [](int value) { return value < 0 ? Value() : Value(int64_t{value}); };
  for (const cuda::TableRow& r : cuda::kernel_table())
    rows.push_back({{"op", r.op},
                    {"kernel", r.name},
                    {"algorithm", r.algorithm},
                    {"arch", std::string(r.arch == 90 ? "sm_90a" : "sm_80")},
                    {"dtype", std::string(dtype_name(r.dtype))},
                    {"tile_m", int64_t{r.tile_m}},
                    {"tile_n", int64_t{r.tile_n}},
                    {"tile_k", int64_t{r.tile_k}},
                    {"stages", int64_t{r.stages}},
                    {"threads", int64_t{r.threads}},
                    {"shared_bytes", int64_t{r.shared_bytes}},
                    {"registers", known(r.registers)},
                    {"blocks_per_multiprocessor", known(r.blocks_per_multiprocessor)}});
  return rows;
}

std::string cuda_driver_lack() { return cuda::driver_lack(); }

std::vector<CudaCandidate> cuda_candidates(const std::string& op, const Dims& dims, const std::string& dtype, int arch,
                                           int multiprocessors, int shared_bytes, std::string* why) {
  std::vector<CudaCandidate> found;
  for (const cuda::Candidate& c :
       cuda::candidates(op, dims, dtype_named(dtype), {arch, multiprocessors, shared_bytes}, why))
    found.push_back({c.algorithm, c.name, static_cast<double>(c.microseconds)});
  return found;
}

}  // namespace resnet_fused::tables
