// Host side of stem.h.
#pragma once
#include <algorithm>
#include <string>

#include "cuda/launch.h"
#include "cuda/sm80/stem.h"
#include "cuda/sm80/table.h"

namespace resnet_fused::cuda::sm80 {

constexpr int kStemSharedBytes = 99 * 1024;  // what a block of every GPU from sm_80 on may have

template <class Tile>
struct StemEntry {
  using T = typename Tile::T;

  static StemGeometry geometry(const StemParams& p) { return StemGeometry::best<Tile>(p, kStemSharedBytes); }
  static int64_t tiles(const StemParams& p, const StemGeometry& g) {
    return static_cast<int64_t>(p.n) * ((p.p + g.tile_h - 1) / g.tile_h) * ((p.q + g.tile_w - 1) / g.tile_w);
  }
  static unsigned column_blocks(const StemParams& p) {
    return static_cast<unsigned>((p.k + Tile::kColumns - 1) / Tile::kColumns);
  }

  static const char* unsupported(const StemParams& p) {
    if (p.k % kChunk<T> != 0) return channels_reason<T>();
    const StemGeometry g = geometry(p);
    if (g.tile_h == 0) return "no tile of it fits shared memory";
    if (tiles(p, g) > kMaxRows) return "it counts tiles in 31 bits";
    return nullptr;
  }
  static float estimate(const StemParams& p, const Device& device) {
    const StemGeometry g = geometry(p);
    const int64_t blocks = tiles(p, g) * column_blocks(p);
    const BlockCost cost{64.f / sizeof(T) * Tile::kRows * Tile::kColumns * static_cast<float>(g.steps),
                         static_cast<float>(Tile::kRows + Tile::kColumns) / (Tile::kRows * Tile::kColumns)};
    const float elements =
        static_cast<float>(p.n) * (static_cast<float>(p.h) * p.w * p.c + static_cast<float>(p.p) * p.q * p.k);
    return kernel_microseconds<T>(blocks, cost, elements * sizeof(T), device);
  }
  static int64_t workspace_bytes(const StemParams&, const Device&) { return 0; }
  static void launch(const StemParams& p, const Device& device, void*, cudaStream_t stream) {
    const StemGeometry g = geometry(p);
    // As many as run at once: each loads the weights, once.
    const int64_t blocks =
        std::min<int64_t>(tiles(p, g), static_cast<int64_t>(Tile::kBlocks) * std::max(1, device.multiprocessors));
    if (blocks == 0) return;
    LaunchShape shape{dim3(static_cast<unsigned>(blocks), column_blocks(p)), Tile::kThreads, g.shared_bytes};
    shape.most_shared_bytes = kStemSharedBytes;
    cuda::launch(stem_kernel<Tile>, shape, stream, p, g);
  }
};

template <class Tile>
Kernel<StemParams> stem() {
  using T = typename Tile::T;
  static const std::string name = std::string("stem80_") + type_name<T>() + "_" + std::to_string(Tile::kRows) + "x" +
                                  std::to_string(Tile::kColumns);
  return entry<StemEntry<Tile>, StemParams, T>(name.c_str(), "whole",
                                               {Tile::kRows, Tile::kColumns, 32 / static_cast<int>(sizeof(T)), 1},
                                               Tile::kThreads, kStemSharedBytes, stem_kernel<Tile>);
}

// A large tile for batches, as large as registers and shared memory allow beside a second block; a small one for single
// images.
template <class T>
using LargeStem = std::conditional_t<sizeof(T) == 2, StemTile<T, 256, 4, 2>, StemTile<T, 160, 2, 4>>;

template <class T>
struct StemInstances {
  Registered<StemParams> large{stem<LargeStem<T>>()};
  Registered<StemParams> small{stem<StemTile<T, 96, 2, 2>>()};
};

}  // namespace resnet_fused::cuda::sm80
