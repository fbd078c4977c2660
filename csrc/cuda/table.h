// The table of CUDA kernels without templates: what the Python bindings show and what the planner asks. Exported from
// the library; needs no GPU.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "cuda/types.h"

#define RESNET_FUSED_EXPORT __attribute__((visibility("default")))

namespace resnet_fused::cuda {

struct TableRow {
  std::string op, name, algorithm;
  int arch;
  DType dtype;
  int tile_m, tile_n, tile_k, stages, threads, shared_bytes;
  int registers, blocks_per_multiprocessor;  // -1 where no GPU is there that can tell
};
RESNET_FUSED_EXPORT std::vector<TableRow> kernel_table();

// Why the NVIDIA driver of this machine cannot run the CUDA runtime that is linked, empty if it can or there is none.
RESNET_FUSED_EXPORT std::string driver_lack();

struct Candidate {
  std::string algorithm, name;
  float microseconds;  // estimate
};
// For each algorithm the kernel that would run it, the least estimate first. If there is none, `why` says what is
// lacking. Ops and dims as in resnet_fused/shapes.py; for a layer "projection" is the channels of a dual accumulation,
// or 0. The estimate for a chain is of the longest of its launches.
RESNET_FUSED_EXPORT std::vector<Candidate> candidates(const std::string& op, const std::map<std::string, int64_t>& dims,
                                                      DType dtype, const Device& device, std::string* why);

}  // namespace resnet_fused::cuda
