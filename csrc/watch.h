// Tensors that recorded blocks depend on, and whether they still are what they were.
#pragma once
#include "cpu/kernels.h"

namespace resnet_fused {

// `watched`: data of a tensor made by the op _watch. Whether memory, sizes, strides and dtype of its tensors are as
// they were then: what `.data = ...` changes without a trace in the version. 5 ns a tensor out of the caches, where
// Python's data_ptr() and stride() take 250.
RF_EXPORT bool tensors_unchanged(const void* watched);

}  // namespace resnet_fused
