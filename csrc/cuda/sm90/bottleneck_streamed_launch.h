// Launchers of the streamed bottleneck, and their rows of the kernel table.
#pragma once
#include "cuda/launch.h"
#include "cuda/sm90/bottleneck_streamed.h"

namespace resnet_fused::cuda::sm90 {

// The sizes that are compiled: at 28x28 a tile is a quarter of an image, at 14x14 half of one.
using StreamedBottleneck128 = StreamedBottleneckLayout<128, 512, 14, 2, 6, 2>;
using StreamedBottleneck256 = StreamedBottleneckLayout<256, 1024, 7, 1, 5, 2>;

template <class T>
Kernel<BottleneckParams> streamed_bottleneck(const char* name, DType dtype) {
  Kernel<BottleneckParams> k{name,    "whole", 90,         dtype,       T::kTilePixels,
                             T::kOut, kDepth,  T::kStages, T::kThreads, T::kShared};
  k.function = reinterpret_cast<const void*>(streamed_bottleneck_kernel<T>);
  k.unsupported = streamed_bottleneck_unsupported<T>;
  k.estimate = streamed_bottleneck_estimate<T>;
  k.workspace_bytes = [](const BottleneckParams&, const Device&) { return int64_t{0}; };
  k.launch = [](const BottleneckParams& p, const Device& device, void*, cudaStream_t stream) {
    const StreamedBottleneckArgs args = streamed_bottleneck_args<T>(p);
    if (args.tiles() == 0) return;
    const auto image = [&p](const void* pointer, int64_t pitch, int box_h, int box_w) {
      return encode_tensor_map(streamed_bottleneck_image(p, pointer, T::kOut, pitch, box_h, box_w));
    };
    const auto weights = [&p](const Layer& layer, int rows, int columns) {
      return encode_tensor_map(streamed_bottleneck_weights<T>(p, layer.weight, rows, columns));
    };
    launch(streamed_bottleneck_kernel<T>,
           {dim3(static_cast<unsigned>(streamed_bottleneck_grid<T>(args, device))), T::kThreads, T::kShared,
            T::kCluster, true},
           stream, image(p.x, p.x_pitch, T::kPieceH, T::kHaloW), weights(p.conv1, T::kMid, T::kOut),
           weights(p.conv2, T::kMid, 9 * T::kMid), weights(p.conv3, T::kOut, T::kMid),
           image(p.x, p.x_pitch, T::kTileH, T::kTileW), image(p.out, p.out_pitch, T::kTileH, T::kTileW), args);
  };
  return k;
}

}  // namespace resnet_fused::cuda::sm90
