// Launchers of the convolution kernels, and their rows of the kernel table.
#pragma once
#include "cuda/launch.h"
#include "cuda/sm90/conv.h"
#include "cuda/sm90/conv_reduce.h"

namespace resnet_fused::cuda::sm90 {

template <class T>
constexpr ConvTile tile_of() {
  return {T::kTileM, T::kTileN, T::kStages, T::kGroups, T::kPingPong, T::kCluster, T::kBlocks};
}

template <class T>
void conv_launch(const ConvParams& p, const Device& device, int splits, float* partial, cudaStream_t stream) {
  constexpr ConvTile kTile = tile_of<T>();
  const ConvArgs args = conv_args(p, kTile, splits, partial);
  if (args.pixels == 0) return;
  const CUtensorMap out = encode_tensor_map(conv_map_side(p, kTile, p.out, p.out_pitch));
  const CUtensorMap residual =
      p.residual != nullptr ? encode_tensor_map(conv_map_side(p, kTile, p.residual, p.residual_pitch)) : out;
  const CUtensorMap x = encode_tensor_map(conv_map_x(p, kTile)), w = encode_tensor_map(conv_map_weight(p, kTile));
  const ConvParams projection = conv_projection(p);
  launch(conv_kernel<T>,
         {dim3(static_cast<unsigned>(conv_grid(args, kTile, device))), T::kThreads, T::kShared, T::kCluster, true},
         stream, x, w, T::kDual ? encode_tensor_map(conv_map_x(projection, kTile)) : x,
         T::kDual ? encode_tensor_map(conv_map_weight(projection, kTile)) : w, residual, out, args);
}

/// The convolution in one launch, with a projection if T::kDual.
template <class T>
Kernel<ConvParams> conv(const char* name, DType dtype) {
  Kernel<ConvParams> k{
      name,      T::kDual ? "dual" : "implicit_gemm", 90, dtype, T::kTileM, T::kTileN, kDepth, T::kStages, T::kThreads,
      T::kShared};
  k.function = reinterpret_cast<const void*>(conv_kernel<T>);
  k.unsupported = conv_unsupported<T::kDual>;
  k.estimate = [](const ConvParams& p, const Device& d) { return conv_estimate(p, tile_of<T>(), 1, d); };
  k.workspace_bytes = [](const ConvParams&, const Device&) { return int64_t{0}; };
  k.launch = [](const ConvParams& p, const Device& d, void*, cudaStream_t stream) {
    conv_launch<T>(p, d, 1, nullptr, stream);
  };
  return k;
}

/// The same with its depth split over blocks, for outputs of few tiles.
template <class T>
Kernel<ConvParams> conv_split(const char* name, DType dtype) {
  Kernel<ConvParams> k = conv<T>(name, dtype);
  k.algorithm = "split_k";
  k.estimate = [](const ConvParams& p, const Device& d) {
    const int splits = conv_splits(p, tile_of<T>(), d);
    // Not worth a second kernel: behind every other choice.
    return conv_estimate(p, tile_of<T>(), splits, d) + (splits == 1 ? 1e6f : 0.f);
  };
  k.workspace_bytes = [](const ConvParams& p, const Device& d) {
    return int64_t{4} * conv_splits(p, tile_of<T>(), d) * p.n * p.p * p.q * p.k;
  };
  k.launch = [](const ConvParams& p, const Device& d, void* workspace, cudaStream_t stream) {
    const int splits = conv_splits(p, tile_of<T>(), d);
    auto* partial = static_cast<float*>(workspace);
    if (splits == 1) return conv_launch<T>(p, d, 1, nullptr, stream);
    conv_launch<T>(p, d, splits, partial, stream);
    const int64_t pixels = int64_t{p.n} * p.p * p.q, threads = pixels * (p.k / 8);
    if (pixels == 0) return;
    const ConvReduceArgs args{partial,          p.conv.scale, p.conv.shift, p.residual, p.out, pixels,
                              p.residual_pitch, p.out_pitch,  p.k,          splits,     p.relu};
    launch(conv_reduce_kernel<typename T::Element>,
           {dim3(static_cast<unsigned>((threads + 255) / 256)), 256, 0, 1, true}, stream, args);
  };
  return k;
}

}  // namespace resnet_fused::cuda::sm90
