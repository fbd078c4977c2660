// Tensor maps in CPU execution: the 128 opaque bytes hold the address of the geometry.
#pragma once
#include <cuda.h>

#include <cstring>
#include <deque>
#include <mutex>
#include <stdexcept>

#include "cuda/tensor_map.h"

namespace resnet_fused::cuda {

inline CUtensorMap encode_tensor_map(const TensorMapGeometry& geometry) {
  if (const char* reason = defect(geometry)) throw std::runtime_error(reason);
  static std::mutex mutex;
  static std::deque<TensorMapGeometry> kept;  // for the life of the process
  const std::lock_guard<std::mutex> lock(mutex);
  kept.push_back(geometry);
  const TensorMapGeometry* p = &kept.back();
  CUtensorMap map{};
  std::memcpy(&map, &p, sizeof p);
  return map;
}

inline const TensorMapGeometry& decode(const CUtensorMap& map) {
  const TensorMapGeometry* p;
  std::memcpy(&p, &map, sizeof p);
  return *p;
}

}  // namespace resnet_fused::cuda
