// Element types of the CUDA kernels, and the GPU they are chosen for.
#pragma once
#include <cstdint>

namespace resnet_fused::cuda {

enum class DType { kF32, kF16, kBf16 };  // kF32 is computed in TF32

constexpr int element_size(DType d) { return d == DType::kF32 ? 4 : 2; }

struct Device {
  int arch = 0;  // 10 * major + minor of the compute capability
  int multiprocessors = 0;
  int shared_bytes = 0;  // most dynamic shared memory of a block
};

}  // namespace resnet_fused::cuda
