// Where everything of the whole-bottleneck kernel (bottleneck64.h) lies: shared memory, tiles, tensor maps.
#pragma once
#include <algorithm>
#include <climits>

#include "cuda/api.h"
#include "cuda/sm90/common.h"

namespace resnet_fused::cuda::sm90 {

/// Shared memory of a block, in bytes from its start.
template <bool kProjection_>
struct Bottleneck64Layout {
  static constexpr bool kProjection = kProjection_;
  static constexpr int kThreads = 384, kOut = 256;
  static constexpr int kSlices = kProjection ? 1 : 4;  // x in slices of 64 channels
  static constexpr int kTile = 8, kHalo = kTile + 2;
  static constexpr int kStages = kProjection ? 4 : 5;
  static constexpr int kSliceBytes = kHalo * kHalo * kRowBytes;  // 12800
  static constexpr int kSlot = 13 * 1024;                        // swizzled stages start at multiples of 1024 bytes
  static constexpr int kPlane = kHalo * kHalo * 16, kH1Bytes = 8 * kPlane;

  static constexpr int kW1 = 0, kW2 = kW1 + kSlices * kMatrixBytes, kW3 = kW2 + 9 * kMatrixBytes;
  static constexpr int kWd = kW3 + 4 * kMatrixBytes, kRing = kWd + (kProjection ? 4 * kMatrixBytes : 0);
  static constexpr int kH1 = kRing + kStages * kSlot, kTail = kH1 + 2 * kH1Bytes;

  // Scales and shifts, numbered; 128 floats at a time lie in the gaps behind the ring's slices, the rest in the tail.
  static constexpr int kS1 = 0, kB1 = 64, kS2 = 128, kB2 = 192, kS3 = 256, kB3 = kS3 + kOut, kSd = kB3 + kOut;
  static constexpr int kVectors = kProjection ? kSd + kOut : kSd;
  static constexpr int vector_offset(int index) {
    const int piece = index / 128, within = index % 128 * 4;
    return piece < kStages ? kRing + piece * kSlot + kSliceBytes + within : kTail + (piece - kStages) * 512 + within;
  }
  static constexpr int kBarriers = kTail + (kVectors / 128 - kStages) * 512;
  static constexpr int kShared = kBarriers + 16 * kStages + 16 + 16;

  static_assert(kSliceBytes + 512 <= kSlot && 104 * kRowBytes <= kSlot && kShared <= kMaxShared);
};

struct Bottleneck64Args {
  const float *s1, *b1, *s2, *b2, *s3, *b3, *sd, *bd;  // a scale that is null is 1
  void* y;
  int images, height, width, tiles_h, tiles_w;
  int64_t pitch_y;

  __host__ __device__ int tiles() const { return images * tiles_h * tiles_w; }
};

/// Value `index` of the vectors in shared memory; the projection's shift is added to the last layer's.
template <class Layout>
__device__ float bottleneck64_vector(const Bottleneck64Args& a, int index) {
  const auto scale = [](const float* s, int i) { return s != nullptr ? s[i] : 1.f; };
  if (index < Layout::kB1) return scale(a.s1, index);
  if (index < Layout::kS2) return a.b1[index - Layout::kB1];
  if (index < Layout::kB2) return scale(a.s2, index - Layout::kS2);
  if (index < Layout::kS3) return a.b2[index - Layout::kB2];
  if (index < Layout::kB3) return scale(a.s3, index - Layout::kS3);
  if (index < Layout::kSd) return a.b3[index - Layout::kB3] + (Layout::kProjection ? a.bd[index - Layout::kB3] : 0.f);
  return scale(a.sd, index - Layout::kSd);
}

/// The first pixel of an 8x8 output tile.
struct Bottleneck64Tile {
  int n, h, w;

  __host__ __device__ Bottleneck64Tile(const Bottleneck64Args& a, int index)
      : n(index / (a.tiles_h * a.tiles_w)), h(index / a.tiles_w % a.tiles_h * 8), w(index % a.tiles_w * 8) {}
};

inline Bottleneck64Args bottleneck64_args(const BottleneckParams& p) {
  Bottleneck64Args a{};
  a.s1 = p.conv1.scale, a.b1 = p.conv1.shift, a.s2 = p.conv2.scale, a.b2 = p.conv2.shift;
  a.s3 = p.conv3.scale, a.b3 = p.conv3.shift, a.sd = p.projection.scale, a.bd = p.projection.shift;
  a.y = p.out, a.pitch_y = p.out_pitch, a.images = p.n, a.height = p.h, a.width = p.w;
  a.tiles_h = ceil_div(p.h, 8), a.tiles_w = ceil_div(p.w, 8);
  return a;
}

/// Blocks: persistent, with a tile for each of the two groups if there are that many.
inline int bottleneck64_grid(const Bottleneck64Args& a, const Device& device) {
  return std::max(1, std::min(a.tiles(), device.multiprocessors));
}

/// x as halo boxes [1][10][10][64]; outside of the image they hold zeros.
inline TensorMapGeometry bottleneck64_map_x(const BottleneckParams& p) {
  TensorMapGeometry g{};
  g.pointer = p.x, g.dtype = p.dtype, g.rank = 4, g.swizzle = kRowBytes;
  const int size[] = {p.c, p.w, p.h, p.n}, box[] = {kDepth, 10, 10, 1};
  for (int i = 0; i < 4; i++) {
    g.size[i] = static_cast<uint64_t>(size[i]), g.box[i] = static_cast<uint32_t>(box[i]);
    if (i > 0) g.stride[i] = i == 1 ? static_cast<uint64_t>(p.x_pitch) * 2 : g.stride[i - 1] * g.size[i - 1];
  }
  return g;
}

/// Weights of the first two layers: 64 rows, in slices of 64 channels (w1) or taps of 64 channels (w2).
inline TensorMapGeometry bottleneck64_map_rows(const void* weight, DType dtype, int columns) {
  return matrix_map(weight, dtype, 64, columns, columns, 64);
}

/// Weights of the last layer or the projection, [256][64]. Row n of the kernel's matrix is output channel
/// 32a + 8c + 2b + d for n = 32a + 8b + 2c + d (b, c < 4, d < 2): a thread's accumulators of every 32 columns, 2c + d
/// of the four 8-column blocks b, are then 8 neighbouring channels.
inline TensorMapGeometry bottleneck64_map_permuted(const void* weight, DType dtype) {
  TensorMapGeometry g{};
  g.pointer = weight, g.dtype = dtype, g.rank = 5, g.swizzle = kRowBytes;
  const int size[] = {kDepth, 2, 4, 4, 8}, rows[] = {0, 1, 8, 2, 32}, box[] = {kDepth, 2, 4, 4, 2};
  for (int i = 0; i < 5; i++) {
    g.size[i] = static_cast<uint64_t>(size[i]), g.box[i] = static_cast<uint32_t>(box[i]);
    g.stride[i] = static_cast<uint64_t>(rows[i]) * kRowBytes;
  }
  return g;
}

/// Why the kernel cannot run this, null if it can.
template <bool kProjection>
const char* bottleneck64_unsupported(const BottleneckParams& p) {
  if ((p.projection.weight != nullptr) != kProjection)
    return kProjection ? "it needs a projection" : "it has no projection";
  if (p.mid != 64 || p.k != 256) return "it is made for 64 channels inside and 256 out";
  if (p.c != (kProjection ? 64 : 256)) return kProjection ? "it takes 64 channels" : "it takes 256 channels";
  if (p.stride1 != 1 || p.stride2 != 1 || p.dilation != 1) return "it has neither stride nor dilation";
  if (int64_t{p.n} * ceil_div(p.h, 8) * ceil_div(p.w, 8) > INT_MAX / 8) return "more than 2**28 tiles";
  return nullptr;
}

/// Predicted microseconds on an H100: a tile of a group takes about 5060 clocks (identity, bound by memory) or 3160,
/// two groups at a time; loading the weights takes 3 us.
template <bool kProjection>
float bottleneck64_estimate(const BottleneckParams& p, const Device& device) {
  const Bottleneck64Args a = bottleneck64_args(p);
  const int rounds = ceil_div(a.tiles(), bottleneck64_grid(a, device));
  return 3 + static_cast<float>(rounds) * (kProjection ? 3160 : 5060) / 1700;
}

}  // namespace resnet_fused::cuda::sm90
