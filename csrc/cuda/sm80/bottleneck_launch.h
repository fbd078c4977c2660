// Host side of bottleneck.h.
#pragma once
#include <string>

#include "cuda/launch.h"
#include "cuda/sm80/bottleneck.h"
#include "cuda/sm80/table.h"

namespace resnet_fused::cuda::sm80 {

template <class Tile>
struct BottleneckEntry {
  using T = typename Tile::T;
  using Pixels = typename Tile::Pixels;

  static const char* unsupported(const BottleneckParams& p) {
    if (p.mid != Tile::kMid) return "it is compiled for another width";
    if (p.stride2 != Pixels::kStride) return "it is compiled for another stride of the 3x3";
    if (p.dilation != 1) return "it has no dilation";
    if (p.c % kChunk<T> != 0 || p.k % kChunk<T> != 0) return channels_reason<T>();
    if (Pixels::blocks(p.n, p.p, p.q) > kMaxRows) return "it counts tiles in 31 bits";
    return nullptr;
  }
  static float estimate(const BottleneckParams& p, const Device& device) {
    const float first = 2.f * Tile::First::kM * Tile::kPasses * Tile::kMid * static_cast<float>(p.c);
    const float second = 18.f * Pixels::kPixels * Tile::kMid * Tile::kMid;
    const float third =
        2.f * Pixels::kPixels * static_cast<float>(p.k) * (Tile::kMid + (p.projection.weight ? p.c : 0));
    const BlockCost cost{first + second + third,
                         static_cast<float>(Pixels::kPixels + Tile::kN) / (Pixels::kPixels * Tile::kN)};
    const float elements =
        static_cast<float>(p.n) * (static_cast<float>(p.h) * p.w * p.c + static_cast<float>(p.p) * p.q * p.k);
    return kernel_microseconds<T>(Pixels::blocks(p.n, p.p, p.q), cost, elements * sizeof(T), device);
  }
  static int64_t workspace_bytes(const BottleneckParams&, const Device&) { return 0; }
  static void launch(const BottleneckParams& p, const Device&, void*, cudaStream_t stream) {
    const auto blocks = static_cast<unsigned>(Pixels::blocks(p.n, p.p, p.q));
    if (blocks != 0)
      cuda::launch(bottleneck_kernel<Tile>, LaunchShape{dim3(blocks), Tile::kThreads, Tile::kSharedBytes}, stream, p);
  }
};

template <class Tile>
Kernel<BottleneckParams> bottleneck() {
  using T = typename Tile::T;
  using Pixels = typename Tile::Pixels;
  static const std::string name = std::string("bottleneck80_") + type_name<T>() + "_mid" + std::to_string(Tile::kMid) +
                                  "_" + std::to_string(Pixels::kH) + "x" + std::to_string(Pixels::kW) + "_stride" +
                                  std::to_string(Pixels::kStride);
  return entry<BottleneckEntry<Tile>, BottleneckParams, T>(
      name.c_str(), "whole", {Pixels::kPixels, Tile::kN, Tile::Third::kDepth, Tile::Third::kStages}, Tile::kThreads,
      Tile::kSharedBytes, bottleneck_kernel<Tile>);
}

// The sizes that are compiled: width, tile of output pixels, pixels of the halo at a time, warps, stages.
template <class T>
struct BottleneckInstances {
  Registered<BottleneckParams> mid64{bottleneck<BottleneckTile<T, 64, PixelTile<8, 8, 1>, 128, 2, 2, 3>>()};
  Registered<BottleneckParams> mid128{bottleneck<BottleneckTile<T, 128, PixelTile<8, 8, 1>, 128, 2, 4, 3>>()};
};
// Only where an element has 16 bits do these fit.
template <class T>
struct BottleneckInstances16 : BottleneckInstances<T> {
  Registered<BottleneckParams> mid64_wide{bottleneck<BottleneckTile<T, 64, PixelTile<8, 16, 1>, 192, 4, 2, 3>>()};
  Registered<BottleneckParams> mid128_stride2{bottleneck<BottleneckTile<T, 128, PixelTile<8, 8, 2>, 128, 4, 2, 3>>()};
};

}  // namespace resnet_fused::cuda::sm80
