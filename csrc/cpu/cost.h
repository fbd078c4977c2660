// Predicted times, from which the plan picks the kernel of a block. A model of orders, not of clocks: its constants are
// ratios between ways of computing the same block, measured in interleaved runs (docs/kernels.md).
#pragma once
#include <string>

#include "block.h"

namespace resnet_fused::cpu {

struct Cost {
  double seconds;
  double flops;             // of the direct convolutions
  double bytes;             // to and from memory
  int64_t workspace_bytes;  // per thread
  std::string note;         // how the block is cut up
};

// A block of this library; its layers carry shapes and algorithms, no tensors.
RF_EXPORT Cost block_cost(const Kernels&, const Block&, int threads);
// The same block as a chain of oneDNN's convolutions, each fused with scale, shift, residual and ReLU.
RF_EXPORT Cost vendor_cost(const Block&, int threads);
RF_EXPORT Cost dense_cost(const Kernels&, const DenseShape&, int threads);
RF_EXPORT Cost vendor_dense_cost(const DenseShape&, int threads);
RF_EXPORT Cost head_cost(const Kernels&, const Head&, int threads);
// As torch's mean and oneDNN's 1x1 convolution of one pixel.
RF_EXPORT Cost vendor_head_cost(const Head&, int threads);

}  // namespace resnet_fused::cpu
