// Host side of basic_block.h.
#pragma once
#include <string>

#include "cuda/launch.h"
#include "cuda/sm80/basic_block.h"
#include "cuda/sm80/table.h"

namespace resnet_fused::cuda::sm80 {

template <class Tile>
struct BasicBlockEntry {
  using T = typename Tile::T;
  using Pixels = typename Tile::Pixels;

  static const char* unsupported(const BasicBlockParams& p) {
    if (p.mid != Tile::kChannels || p.k != Tile::kChannels) return "it is compiled for another width";
    if (p.dilation != 1) return "it has no dilation";
    if (p.c % kChunk<T> != 0) return channels_reason<T>();
    if (Pixels::blocks(p.n, p.p, p.q) > kMaxRows) return "it counts tiles in 31 bits";
    return nullptr;
  }
  static float estimate(const BasicBlockParams& p, const Device& device) {
    const float first = 18.f * Tile::First::kM * Tile::kPasses * static_cast<float>(p.mid) * static_cast<float>(p.c);
    const float second =
        2.f * Pixels::kPixels * static_cast<float>(p.k) * (9.f * p.mid + (p.projection.weight ? p.c : 0));
    const BlockCost cost{first + second,
                         static_cast<float>(Pixels::kPixels + Tile::kChannels) / (Pixels::kPixels * Tile::kChannels)};
    const float elements =
        static_cast<float>(p.n) * (static_cast<float>(p.h) * p.w * p.c + static_cast<float>(p.p) * p.q * p.k);
    return kernel_microseconds<T>(Pixels::blocks(p.n, p.p, p.q), cost, elements * sizeof(T), device);
  }
  static int64_t workspace_bytes(const BasicBlockParams&, const Device&) { return 0; }
  static void launch(const BasicBlockParams& p, const Device&, void*, cudaStream_t stream) {
    const auto blocks = static_cast<unsigned>(Pixels::blocks(p.n, p.p, p.q));
    if (blocks != 0)
      cuda::launch(basic_block_kernel<Tile>, LaunchShape{dim3(blocks), Tile::kThreads, Tile::kSharedBytes}, stream, p);
  }
};

template <class Tile>
Kernel<BasicBlockParams> basic_block() {
  using T = typename Tile::T;
  using Pixels = typename Tile::Pixels;
  static const std::string name = std::string("basic_block80_") + type_name<T>() + "_" +
                                  std::to_string(Tile::kChannels) + "_" + std::to_string(Pixels::kH) + "x" +
                                  std::to_string(Pixels::kW);
  return entry<BasicBlockEntry<Tile>, BasicBlockParams, T>(
      name.c_str(), "whole", {Pixels::kPixels, Tile::kChannels, Tile::Second::kDepth, Tile::Second::kStages},
      Tile::kThreads, Tile::kSharedBytes, basic_block_kernel<Tile>);
}

// CIFAR's widths, and ImageNet's first: channels, tile of output pixels, pixels of the halo at a time, warps, stages.
template <class T>
struct BasicBlockInstances {
  using Pixels = PixelTile<8, 16, 1>;
  Registered<BasicBlockParams> channels16{basic_block<BasicBlockTile<T, 16, Pixels, 64, 4, 1, 3>>()};
  Registered<BasicBlockParams> channels32{basic_block<BasicBlockTile<T, 32, Pixels, 64, 4, 1, 3>>()};
  Registered<BasicBlockParams> channels64{basic_block<BasicBlockTile<T, 64, Pixels, 64, 4, 2, 3>>()};
};

}  // namespace resnet_fused::cuda::sm80
