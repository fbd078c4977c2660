// Launcher of the rotated chain, and its rows of the kernel table.
#pragma once
#include "cuda/launch.h"
#include "cuda/sm90/rotated.h"

namespace resnet_fused::cuda::sm90 {

// The sizes that are compiled. During a 3x3 all of the tile's x is on its way (mid width 64), or half of it (128).
using Rotated64 = RotatedLayout<64, 256, 5, 6, 2>;
using Rotated128 = RotatedLayout<128, 512, 4, 5, 2>;

template <class T>
Kernel<RotatedParams> rotated(const char* name, DType dtype) {
  Kernel<RotatedParams> k{name, "rotated", 90, dtype, T::kTile, T::kOut, kDepth, T::kStages, T::kThreads, T::kShared};
  k.function = reinterpret_cast<const void*>(rotated_kernel<T>);
  k.unsupported = rotated_unsupported<T>;
  k.estimate = rotated_estimate<T>;
  k.workspace_bytes = [](const RotatedParams&, const Device&) { return int64_t{0}; };
  k.launch = [](const RotatedParams& p, const Device& device, void*, cudaStream_t stream) {
    const RotatedArgs args = rotated_args(p);
    if (args.pixels == 0) return;
    const auto weights = [&p](const Layer& layer, int channels, int columns, int rows) {
      return encode_tensor_map(rotated_map_weight<T>(p, layer, channels, columns, rows));
    };
    const auto side = [&p](const void* pointer, int channels, int64_t pitch) {
      return encode_tensor_map(rotated_map_side<T>(p, pointer, channels, pitch));
    };
    const CUtensorMap w3 = weights(p.conv3, T::kOut, T::kMid, kDepth), y = side(p.y, T::kOut, p.y_pitch);
    launch(rotated_kernel<T>,
           {dim3(static_cast<unsigned>(rotated_grid<T>(args, device))), T::kThreads, T::kShared, T::kCluster, true},
           stream, encode_tensor_map(rotated_map_h1<T>(p)), weights(p.conv2, T::kMid, 9 * T::kMid, T::kMid), w3,
           args.next ? weights(p.conv1, T::kMid, T::kOut, T::kMid) : w3, side(p.x, T::kOut, p.x_pitch), y,
           args.next ? side(p.h1_next, T::kMid, p.h1_next_pitch) : y, args);
  };
  return k;
}

}  // namespace resnet_fused::cuda::sm90
