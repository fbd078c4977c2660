// Memory that stays mapped between calls: on Linux the page faults of fresh tensors cost as much as the convolutions
// that fill them (ResNet-50, batch 16, float32: 51 MB of output a block in stage 1).
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace resnet_fused::cpu {

// Scratch of the calling thread, 64-byte aligned: zeros, or what earlier calls left. Grows, and stays until
// release_memory().
enum class Slot : int {
  kLevel0,
  kLevel1,
  kLevel2,
  kTransformed,
  kProducts,
  kTiles,
  kPacked,
  kProjection,
  kVectors,
  kCount
};
void* workspace(Slot slot, size_t bytes);

// Output tensors: a cache of freed blocks. Idle blocks beyond the limit (pool_limit) go back to the system.
void* pool_allocate(size_t bytes);
void pool_free(void* data);
RF_EXPORT size_t pool_limit();
RF_EXPORT void set_pool_limit(size_t bytes);

RF_EXPORT int64_t cached_bytes();    // idle output blocks and all threads' workspaces
RF_EXPORT void release_memory();     // call while no kernel runs
RF_EXPORT void poison_workspaces();  // tests: NaN everywhere, so that a read of what was not written shows

}  // namespace resnet_fused::cpu
