// Launchers of the whole-bottleneck kernel, and their rows of the kernel table.
#pragma once
#include "cuda/launch.h"
#include "cuda/sm90/bottleneck64.h"

namespace resnet_fused::cuda::sm90 {

template <class T>
Kernel<BottleneckParams> bottleneck64(const char* name, DType dtype) {
  Kernel<BottleneckParams> k{name,    "whole", 90,         dtype,       T::kTile * T::kTile,
                             T::kOut, kDepth,  T::kStages, T::kThreads, T::kShared};
  k.function = reinterpret_cast<const void*>(bottleneck64_kernel<T>);
  k.unsupported = bottleneck64_unsupported<T::kProjection>;
  k.estimate = bottleneck64_estimate<T::kProjection>;
  k.workspace_bytes = [](const BottleneckParams&, const Device&) { return int64_t{0}; };
  k.launch = [](const BottleneckParams& p, const Device& device, void*, cudaStream_t stream) {
    const Bottleneck64Args args = bottleneck64_args(p);
    if (args.tiles() == 0) return;
    const CUtensorMap w3 = encode_tensor_map(bottleneck64_map_permuted(p.conv3.weight, p.dtype));
    const CUtensorMap wd =
        T::kProjection ? encode_tensor_map(bottleneck64_map_permuted(p.projection.weight, p.dtype)) : w3;
    launch(bottleneck64_kernel<T>,
           {dim3(static_cast<unsigned>(bottleneck64_grid(args, device))), T::kThreads, T::kShared, 1, true}, stream,
           encode_tensor_map(bottleneck64_map_x(p)),
           encode_tensor_map(bottleneck64_map_rows(p.conv1.weight, p.dtype, p.c)),
           encode_tensor_map(bottleneck64_map_rows(p.conv2.weight, p.dtype, 9 * 64)), w3, wd, args);
  };
  return k;
}

}  // namespace resnet_fused::cuda::sm90
