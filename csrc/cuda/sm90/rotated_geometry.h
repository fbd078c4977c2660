// Where everything of the rotated chain (rotated.h) lies: shared memory, tiles, tensor maps.
#pragma once
#include <algorithm>
#include <climits>

#include "cuda/sm90/conv_geometry.h"

namespace resnet_fused::cuda::sm90 {

/// Sizes of an instance.
///   kMid, kOut   channels inside, and of x and the output
///   kStages      of the ring of h1 and weights
///   kSides       buffers of 64 pixels x 64 channels that a group has for x, y and the next h1
///   kCluster     blocks that share every load of weights
template <int kMid_, int kOut_, int kStages_, int kSides_, int kCluster_>
struct RotatedLayout {
  static constexpr int kMid = kMid_, kOut = kOut_, kStages = kStages_, kSides = kSides_, kCluster = kCluster_;
  static constexpr int kThreads = 384, kGroups = 2;
  static constexpr int kTile = 128, kGroupTile = kTile / kGroups;  // pixels in a row, of the images one after another
  static constexpr int kSlices = kMid / kDepth, kChunks = kOut / kDepth;
  static constexpr int kSteps = 9 * kSlices;  // of the 3x3

  // A stage is h1 and W2 of one tap and 64 channels, or what 64 channels of y need of W3 and of W1.
  static constexpr int kBytesH1 = kTile * kRowBytes, kBytesW = kMid * kRowBytes;
  static constexpr int kSecond = std::max(kBytesH1, kBytesW);  // where W2 or W1 begins
  static constexpr int kStageBytes = kSecond + kBytesW;
  static constexpr int kPanelBytes = kGroupTile * kRowBytes;

  // Scales and shifts, numbered.
  static constexpr int kS2 = 0, kB2 = kS2 + kMid, kS3 = kB2 + kMid, kB3 = kS3 + kOut, kS1 = kB3 + kOut;
  static constexpr int kB1 = kS1 + kMid, kVectors = kB1 + kMid;

  static constexpr int kSide = kStages * kStageBytes, kVector = kSide + kGroups * kSides * kPanelBytes;
  static constexpr int kBarriers = kVector + 4 * kVectors;
  static constexpr int kShared = kBarriers + 16 * kStages + 8 * kGroups * kSides;

  static_assert(kMid % kDepth == 0 && kOut % kDepth == 0 && kStageBytes % 1024 == 0 && kShared <= kMaxShared);
  static_assert(kStages >= 2 && kSides >= 2, "products and stores under way hold one while the next is filled");
};

struct RotatedArgs {
  const float *s2, *b2, *s3, *b3, *s1, *b1;  // a scale that is null is 1
  int pixels, height, width;
  bool next;  // the next block's first layer is wanted

  __host__ __device__ int tiles() const { return (pixels + 127) / 128; }
};

/// Value `index` of the vectors in shared memory.
template <class Layout>
__device__ float rotated_vector(const RotatedArgs& a, int index) {
  const auto scale = [](const float* s, int i) { return s != nullptr ? s[i] : 1.f; };
  if (index < Layout::kB2) return scale(a.s2, index);
  if (index < Layout::kS3) return a.b2[index - Layout::kB2];
  if (index < Layout::kB3) return scale(a.s3, index - Layout::kS3);
  if (index < Layout::kS1) return a.b3[index - Layout::kB3];
  if (!a.next) return 0.f;
  if (index < Layout::kB1) return scale(a.s1, index - Layout::kS1);
  return a.b1[index - Layout::kB1];
}

inline RotatedArgs rotated_args(const RotatedParams& p) {
  return {p.conv2.scale, p.conv2.shift,   p.conv3.scale, p.conv3.shift, p.conv1.scale,
          p.conv1.shift, p.n * p.h * p.w, p.h,           p.w,           p.conv1.weight != nullptr};
}

/// Blocks: persistent, at most one a multiprocessor, whole clusters.
template <class Layout>
int rotated_grid(const RotatedArgs& a, const Device& device) {
  constexpr int kCluster = Layout::kCluster;
  return std::max(1, std::min(ceil_div(a.tiles(), kCluster), device.multiprocessors / kCluster)) * kCluster;
}

/// h1 as the 3x3 walks over it: im2col mode, the pixels of a tile.
template <class Layout>
TensorMapGeometry rotated_map_h1(const RotatedParams& p) {
  ConvParams conv{};
  conv.dtype = p.dtype, conv.x = p.h1, conv.x_pitch = p.h1_pitch;
  conv.n = p.n, conv.h = p.h, conv.w = p.w, conv.c = p.mid, conv.r = conv.s = 3, conv.pad_h = conv.pad_w = 1;
  return conv_map_x(conv, {Layout::kTile, 0, 0, 0, false, 1});
}

/// Weights as a matrix, in the boxes of `rows` rows that the blocks of a cluster fetch a share of each.
template <class Layout>
TensorMapGeometry rotated_map_weight(const RotatedParams& p, const Layer& layer, int channels, int columns, int rows) {
  return matrix_map(layer.weight, p.dtype, channels, columns, columns, rows / Layout::kCluster);
}

/// x, y or the next h1 in panels of a group's pixels by 64 channels.
template <class Layout>
TensorMapGeometry rotated_map_side(const RotatedParams& p, const void* pointer, int channels, int64_t pitch) {
  return matrix_map(pointer, p.dtype, int64_t{p.n} * p.h * p.w, channels, pitch, Layout::kGroupTile);
}

/// Why the kernel cannot run this, null if it can.
template <class Layout>
const char* rotated_unsupported(const RotatedParams& p) {
  if (p.mid != Layout::kMid || p.k != Layout::kOut) {
    if (Layout::kMid == 64 && Layout::kOut == 256) return "it is made for 64 channels inside and 256 outside";
    if (Layout::kMid == 128 && Layout::kOut == 512) return "it is made for 128 channels inside and 512 outside";
    return "it is made for other numbers of channels";
  }
  if (int64_t{p.n} * p.h * p.w > INT_MAX - 256) return "more than 2**31 output pixels";
  return nullptr;
}

/// Predicted microseconds, from rates of an H100: 2048 fused multiply-adds, 40 bytes from L2 and 13 bytes of device
/// memory a clock and multiprocessor, 1.7 GHz.
template <class Layout>
float rotated_estimate(const RotatedParams& p, const Device& device) {
  using L = Layout;
  const RotatedArgs a = rotated_args(p);
  const float reads = a.next ? 2 : 1;  // of y's channels by a 1x1, and of h1 to or from memory
  // Clocks of a tile. A group's epilogues overlap with the other group's products, but for the first and the last.
  const float weights = L::kMid * (9.f * L::kMid + reads * L::kOut);
  const float products = L::kTile * weights / 2048 + 1000;
  const float loads = (2 * weights / L::kCluster + 2.f * L::kTile * (9 * L::kMid + L::kOut)) / 40;
  const float memory = 2.f * L::kTile * (2 * L::kOut + reads * L::kMid) / 13;
  const int rounds = ceil_div(a.tiles(), rotated_grid<L>(a, device));
  return 2 + static_cast<float>(rounds) * std::max({products, loads, memory}) / 1700;
}

}  // namespace resnet_fused::cuda::sm90
