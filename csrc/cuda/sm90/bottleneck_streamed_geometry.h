// Where everything of the streamed bottleneck (bottleneck_streamed.h) lies: shared memory, tiles, tensor maps.
#pragma once
#include <algorithm>
#include <climits>

#include "cuda/api.h"
#include "cuda/sm90/common.h"

namespace resnet_fused::cuda::sm90 {

/// Sizes of an instance.
///   kMid, kOut    channels inside, and of x and the output
///   kTileH        rows of a tile of output pixels; it has 14 columns
///   kPieces       boxes in which a slice of x's halo comes, kTileH + 2 rows of 16 pixels in all
///   kStages       slots of the ring
///   kCluster      blocks that share every load of weights
template <int kMid_, int kOut_, int kTileH_, int kPieces_, int kStages_, int kCluster_>
struct StreamedBottleneckLayout {
  static constexpr int kMid = kMid_, kOut = kOut_, kTileH = kTileH_, kTileW = 14;
  static constexpr int kPieces = kPieces_, kStages = kStages_, kCluster = kCluster_;
  static constexpr int kThreads = 384, kGroups = 2;
  static constexpr int kHaloW = kTileW + 2, kHaloH = kTileH + 2;
  static constexpr int kPixels = kTileH * kHaloW;  // columns of the products: 2 in 16 lie beside the tile
  static constexpr int kHalo = kHaloH * kHaloW;

  // The ring's slots: 128 rows (64 a group) of weights, or a piece of x, of 64 channels each.
  static constexpr int kWeightRows = 128, kWeightBytes = kWeightRows * kRowBytes;
  static constexpr int kPieceH = kHaloH / kPieces, kPiecePixels = kPieceH * kHaloW;
  static constexpr int kPieceBytes = kPiecePixels * kRowBytes;
  static constexpr int kSlot = std::max(kWeightBytes, kPieceBytes);
  static constexpr int kSlices = kOut / kDepth, kMidSlices = kMid / kDepth;
  static constexpr int kBlocks = kMid / kWeightRows;  // 64 channels of a group each
  static constexpr int kPasses = kOut / kWeightRows;

  // h1 and h2: planes of [pixel][8 channels]. The last taps read two pixels past h1's last plane.
  static constexpr int kPlane1 = kHalo * 16, kPlane2 = kPixels * 16;
  static constexpr int kH1Bytes = kMid / 8 * kPlane1, kH2Bytes = kMid / 8 * kPlane2;
  // The output on its way, 64 channels a group, with two rows for the pixels beside the tile; it replaces h1.
  static constexpr int kTilePixels = kTileH * kTileW, kTileBytes = kTilePixels * kRowBytes;
  static constexpr int kStagingBytes = (kTileBytes + 2 * kRowBytes + 1023) / 1024 * 1024;

  static constexpr int kH1 = kStages * kSlot, kH2 = kH1 + kH1Bytes + 1024, kBarriers = kH2 + kH2Bytes;
  static constexpr int kShared = kBarriers + 16 * kStages + 8 * kGroups;

  static_assert(kMid % kWeightRows == 0 && kOut % kWeightRows == 0 && kHaloH % kPieces == 0);
  static_assert(kPiecePixels % 8 == 0 && kPiecePixels <= 256 && kPixels <= 256);
  static_assert(kSlot % 1024 == 0 && kPieceBytes % 1024 == 0 && kH1Bytes % 1024 == 0);
  static_assert(kGroups * kStagingBytes <= kH1Bytes && kShared <= kMaxShared);
  // A group of products holds its slots until the next one has been started: x and weights of two of them.
  static_assert(kStages >= (kBlocks == 1 ? 2 * (1 + kPieces) : kPieces + 3));
};

struct StreamedBottleneckArgs {
  const float *s1, *b1, *s2, *b2, *s3, *b3;  // a scale that is null is 1
  int images, height, width, tiles_h, tiles_w;

  __host__ __device__ int tiles() const { return images * tiles_h * tiles_w; }
};

/// The first pixel of a tile. A tile past the last lies outside of every image: TMA reads zeros and writes nothing.
template <class Layout>
struct StreamedBottleneckTile {
  int n, h, w;

  __host__ __device__ StreamedBottleneckTile(const StreamedBottleneckArgs& a, int index)
      : n(index / (a.tiles_h * a.tiles_w)),
        h(index / a.tiles_w % a.tiles_h * Layout::kTileH),
        w(index % a.tiles_w * Layout::kTileW) {}
};

template <class Layout>
StreamedBottleneckArgs streamed_bottleneck_args(const BottleneckParams& p) {
  return {p.conv1.scale,
          p.conv1.shift,
          p.conv2.scale,
          p.conv2.shift,
          p.conv3.scale,
          p.conv3.shift,
          p.n,
          p.h,
          p.w,
          ceil_div(p.h, Layout::kTileH),
          ceil_div(p.w, Layout::kTileW)};
}

/// Blocks: persistent, at most one a multiprocessor, whole clusters.
template <class Layout>
int streamed_bottleneck_grid(const StreamedBottleneckArgs& a, const Device& device) {
  constexpr int kCluster = Layout::kCluster;
  return std::max(1, std::min(ceil_div(a.tiles(), kCluster), device.multiprocessors / kCluster)) * kCluster;
}

/// An image in boxes of [1][box_h][box_w][64]; what a box has outside of the image is zero and is not stored.
inline TensorMapGeometry streamed_bottleneck_image(const BottleneckParams& p, const void* pointer, int channels,
                                                   int64_t pitch, int box_h, int box_w) {
  TensorMapGeometry g{};
  g.pointer = pointer, g.dtype = p.dtype, g.rank = 4, g.swizzle = kRowBytes;
  const int size[] = {channels, p.w, p.h, p.n}, box[] = {kDepth, box_w, box_h, 1};
  for (int i = 0; i < 4; i++) {
    g.size[i] = static_cast<uint64_t>(size[i]), g.box[i] = static_cast<uint32_t>(box[i]);
    if (i > 0) g.stride[i] = i == 1 ? static_cast<uint64_t>(pitch) * 2 : g.stride[i - 1] * g.size[i - 1];
  }
  return g;
}

/// Weights as a matrix, in the boxes that one block of a cluster fetches for all.
template <class Layout>
TensorMapGeometry streamed_bottleneck_weights(const BottleneckParams& p, const void* weight, int rows, int columns) {
  return matrix_map(weight, p.dtype, rows, columns, columns, Layout::kWeightRows / Layout::kCluster);
}

/// Why the kernel cannot run this, null if it can.
template <class Layout>
const char* streamed_bottleneck_unsupported(const BottleneckParams& p) {
  if (p.projection.weight != nullptr) return "it has no projection";
  if (p.mid != Layout::kMid || p.k != Layout::kOut || p.c != Layout::kOut)
    return "it is made for other numbers of channels";
  if (p.stride1 != 1 || p.stride2 != 1 || p.dilation != 1) return "it has neither stride nor dilation";
  if (int64_t{p.n} * ceil_div(p.h, Layout::kTileH) * ceil_div(p.w, Layout::kTileW) > INT_MAX / 8)
    return "more than 2**28 tiles";
  return nullptr;
}

/// Predicted microseconds, from rates of an H100: 2048 fused multiply-adds, 40 bytes from L2 and 13 bytes of device
/// memory a clock and multiprocessor, 1.7 GHz.
template <class Layout>
float streamed_bottleneck_estimate(const BottleneckParams& p, const Device& device) {
  using L = Layout;
  constexpr float kFirst = static_cast<float>(L::kHalo) * L::kOut * L::kMid;
  constexpr float kRest = static_cast<float>(L::kPixels) * L::kMid * (9 * L::kMid + L::kOut);
  constexpr float kWeights = 2.f * L::kMid * (2 * L::kOut + 9 * L::kMid) / L::kCluster;
  // Clocks of a tile. Neither intermediate's epilogue overlaps with products, every other of the output's does.
  constexpr float kEpilogues = 1500 + 500 * L::kPasses;
  const float products = (kFirst + kRest) / 2048 + kEpilogues;
  const float loads = (kWeights + 2.f * (L::kHalo + L::kTilePixels) * L::kOut) / 40;
  const float memory = 4.f * L::kTilePixels * L::kOut / 13;
  const StreamedBottleneckArgs a = streamed_bottleneck_args<Layout>(p);
  const int grid = streamed_bottleneck_grid<Layout>(a, device);
  return 2 + static_cast<float>(ceil_div(a.tiles(), grid)) * std::max({products, loads, memory}) / 1700;
}

}  // namespace resnet_fused::cuda::sm90
