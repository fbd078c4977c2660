// Constants and conversions that the sm_90a kernels share.
#pragma once
#include <cuda_runtime_api.h>

#include <cstring>

#include "cuda/ptx90.h"
#include "cuda/tensor_map.h"

namespace resnet_fused::cuda::sm90 {

constexpr int kDepth = 64;      // channels of a stage: one 128-byte row of 16-bit elements, the widest swizzle
constexpr int kRowBytes = 128;  // of kDepth elements
constexpr int kMatrixBytes = 64 * kRowBytes;  // 64 rows of kDepth elements
constexpr int kMaxShared = 227 * 1024;        // dynamic shared memory that a block may have

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

/// Two elements of a 32-bit register, the low half first.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t word) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    __nv_bfloat162 pair;
    memcpy(static_cast<void*>(&pair), &word, sizeof pair);
    return __bfloat1622float2(pair);
  } else {
    __half2 pair;
    memcpy(static_cast<void*>(&pair), &word, sizeof pair);
    return __half22float2(pair);
  }
}

/// By every thread of a kernel that is launched as programmatic, before it touches global memory: until here its start
/// overlaps the end of the kernel ahead of it, and the kernel behind it may come as far from now on.
__device__ inline void take_turn() {
  ptx::grid_wait();
  ptx::grid_launch_dependents();
}

/// By one thread, early: the first TMA of each map then does not wait for its 128 bytes.
template <class... Maps>
__device__ void prefetch_maps(const Maps&... maps) {
  (ptx::tma_prefetch(&maps), ...);
}

/// Offset of 16 bytes (channel chunk `chunk` of row `row`) in a staging buffer as TMA lays it out with a 128-byte
/// swizzle.
template <class T>
__device__ uint32_t staging_offset(int row, int chunk) {
  return chunk / 8 * T::kPanelBytes + row * kRowBytes + (((chunk % 8) ^ (row % 8)) << 4);
}

/// Matrix of 16-bit elements, [rows][pitch], of which `columns` count; boxes of kDepth columns by box_rows rows.
inline TensorMapGeometry matrix_map(const void* pointer, DType dtype, int64_t rows, int columns, int64_t pitch,
                                    int box_rows) {
  TensorMapGeometry g{};
  g.pointer = pointer, g.dtype = dtype, g.rank = 2, g.swizzle = kRowBytes;
  g.size[0] = static_cast<uint64_t>(columns), g.size[1] = static_cast<uint64_t>(rows);
  g.stride[1] = static_cast<uint64_t>(pitch) * 2;
  g.box[0] = kDepth, g.box[1] = static_cast<uint32_t>(box_rows);
  return g;
}

}  // namespace resnet_fused::cuda::sm90
