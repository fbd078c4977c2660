// Tensor maps for TMA, from their geometry.
#pragma once
#include <cuda.h>

#include <string>

#include "cuda/types.h"

namespace resnet_fused::cuda {

// What a TMA copy moves, dimensions from the innermost: sizes in elements, strides in bytes.
struct TensorMapGeometry {
  const void* pointer = nullptr;
  DType dtype{};
  int rank = 0;  // 1..5
  uint64_t size[5] = {};
  uint64_t stride[5] = {};  // [0] is unused: the innermost dimension is dense
  int swizzle = 0;          // bytes: 0, 32, 64, 128
  // Tiled: the box, and the distance between its elements (0 means 1).
  uint32_t box[5] = {};
  uint32_t step[5] = {};
  // im2col (rank 4, sizes {C, W, H, N}): a column of `pixels` pixels with `channels` channels each, walking over the
  // positions of a filter's first tap: from lower[i] to size[i + 1] - 1 + upper[i] by step[i + 1]; i = 0 is W, 1 is H.
  // For a convolution: lower = -padding, upper = padding - dilation * (taps - 1), step = stride.
  bool im2col = false;
  int lower[2] = {}, upper[2] = {};
  uint32_t channels = 0, pixels = 0;
};

// What the hardware would refuse in it, null if nothing.
inline const char* defect(const TensorMapGeometry& g) {
  const uint32_t bytes = static_cast<uint32_t>(element_size(g.dtype));
  if (g.rank < 1 || g.rank > 5) return "tensor map: rank outside 1..5";
  if (reinterpret_cast<uintptr_t>(g.pointer) % 16) return "tensor map: base not aligned to 16 bytes";
  for (int i = 0; i < g.rank; ++i) {
    if (g.size[i] == 0 || g.size[i] > (uint64_t{1} << 32)) return "tensor map: size outside 1..2^32";
    if (i && (g.stride[i] % 16 || g.stride[i] >= (uint64_t{1} << 40)))
      return "tensor map: stride not a multiple of 16 bytes below 2^40";
    if (g.step[i] > 8) return "tensor map: step above 8";
    if (g.step[i] > 1 && !g.im2col) return "tensor map: a tiled box with steps, whose size nobody has needed yet";
    if (!g.im2col && (g.box[i] == 0 || g.box[i] > 256)) return "tensor map: box outside 1..256";
  }
  if (g.im2col) {
    if (g.rank != 4) return "tensor map: im2col of rank other than 4";
    if (g.channels == 0 || g.channels > 256 || g.pixels == 0 || g.pixels > 1024)
      return "tensor map: channels outside 1..256 or pixels outside 1..1024";
    for (int i = 0; i < 2; ++i)
      if (g.lower[i] < -128 || g.lower[i] > 127 || g.upper[i] < -128 || g.upper[i] > 127)
        return "tensor map: corner outside -128..127";
  }
  const uint32_t inner = (g.im2col ? g.channels : g.box[0]) * bytes;
  if (inner % 16) return "tensor map: innermost box not a multiple of 16 bytes";
  if (g.swizzle && inner > static_cast<uint32_t>(g.swizzle)) return "tensor map: innermost box wider than the swizzle";
  return nullptr;
}

// Throws std::runtime_error if the geometry has a defect.
CUtensorMap encode_tensor_map(const TensorMapGeometry&);

}  // namespace resnet_fused::cuda

#ifndef __CUDACC__
#include "tensor_map_emulated.h"
#endif
