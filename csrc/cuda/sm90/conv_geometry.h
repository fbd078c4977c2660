// What the convolution kernel (conv.h) is launched with: pure functions of the problem, the tile and the device.
#pragma once
#include <algorithm>
#include <climits>

#include "cuda/api.h"
#include "cuda/sm90/common.h"

namespace resnet_fused::cuda::sm90 {

/// Compile-time size of a kernel instance, as numbers.
struct ConvTile {
  int m, n, stages, groups;
  bool ping_pong;
  int cluster;
  int blocks = 1;  // that fit a multiprocessor
};

/// A convolution that is summed up: where its taps lie, and its depth in steps of kDepth channels of one tap.
struct ConvSource {
  int taps_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int channel_steps, steps;
  bool im2col;
};

/// Parameters of the kernel beside the tensor maps.
struct ConvArgs {
  ConvSource main, projection;
  const float *scale, *shift, *projection_scale;  // [channels_out]; scales may be null
  float* partial;                                 // [splits][pixels][channels_out] if splits > 1
  int pixels, channels_out, out_h, out_w;
  int splits;            // shares in which the depth is summed up
  int tiles_m, tiles_n;  // of the output
  bool residual, relu;
};

/// Tiles times splits, for each of which a cluster of blocks (tiles along M side by side) does one round.
__host__ __device__ inline int conv_items(const ConvArgs& a, int cluster) {
  return (a.tiles_m + cluster - 1) / cluster * a.tiles_n * a.splits;
}

inline ConvSource conv_source(const ConvParams& p) {
  ConvSource s{};
  s.taps_w = p.s, s.stride_h = p.stride_h, s.stride_w = p.stride_w, s.pad_h = p.pad_h, s.pad_w = p.pad_w;
  s.dilation_h = p.dil_h, s.dilation_w = p.dil_w;
  s.channel_steps = ceil_div(p.c, kDepth), s.steps = p.r * p.s * s.channel_steps;
  // Output pixel m reads input pixel m: a plain matrix, without im2col's limits on strides and corners.
  s.im2col = !(p.r == 1 && p.s == 1 && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0);
  return s;
}

/// The 1x1 convolution of another image that is added, as a layer of its own.
inline ConvParams conv_projection(const ConvParams& p) {
  ConvParams q = p;
  q.x = p.projection.x, q.x_pitch = p.projection.x_pitch, q.conv.weight = p.projection.weight;
  q.h = p.projection.h, q.w = p.projection.w, q.c = p.projection.c;
  q.r = q.s = q.dil_h = q.dil_w = 1, q.pad_h = q.pad_w = 0, q.stride_h = q.stride_w = p.projection.stride;
  q.projection = {};
  return q;
}

inline ConvArgs conv_args(const ConvParams& p, const ConvTile& tile, int splits, float* partial) {
  ConvArgs a{};
  a.main = conv_source(p);
  if (p.projection.x != nullptr) a.projection = conv_source(conv_projection(p));
  a.scale = p.conv.scale, a.shift = p.conv.shift, a.projection_scale = p.projection.scale, a.partial = partial;
  a.pixels = p.n * p.p * p.q, a.channels_out = p.k, a.out_h = p.p, a.out_w = p.q, a.splits = splits;
  a.tiles_m = ceil_div(a.pixels, tile.m), a.tiles_n = ceil_div(p.k, tile.n);
  a.residual = p.residual != nullptr, a.relu = p.relu;
  return a;
}

/// Shares of the depth that fill the device: at least 4 steps each, so that a share's loads outlast its pipeline's
/// start, and at most 16, so that adding them up stays short.
inline int conv_splits(const ConvParams& p, const ConvTile& tile, const Device& device) {
  const ConvArgs a = conv_args(p, tile, 1, nullptr);
  return std::max(1,
                  std::min({a.main.steps / 4, device.multiprocessors / std::max(1, conv_items(a, tile.cluster)), 16}));
}

/// Blocks: persistent, at most as many as run at once, whole clusters.
inline int conv_grid(const ConvArgs& a, const ConvTile& tile, const Device& device) {
  const int most = tile.blocks * device.multiprocessors / tile.cluster;
  return std::max(1, std::min(conv_items(a, tile.cluster), most)) * tile.cluster;
}

/// x: [pixels][channels], or [n][h][w][c] that im2col walks over.
inline TensorMapGeometry conv_map_x(const ConvParams& p, const ConvTile& tile) {
  if (!conv_source(p).im2col) return matrix_map(p.x, p.dtype, int64_t{p.n} * p.h * p.w, p.c, p.x_pitch, tile.m);
  TensorMapGeometry g{};
  g.pointer = p.x, g.dtype = p.dtype, g.rank = 4, g.swizzle = kRowBytes, g.im2col = true;
  const int size[] = {p.c, p.w, p.h, p.n};
  for (int i = 0; i < 4; i++) g.size[i] = static_cast<uint64_t>(size[i]);
  g.stride[1] = static_cast<uint64_t>(p.x_pitch) * 2;
  g.stride[2] = g.stride[1] * g.size[1], g.stride[3] = g.stride[2] * g.size[2];
  g.step[0] = g.step[3] = 1, g.step[1] = static_cast<uint32_t>(p.stride_w),
  g.step[2] = static_cast<uint32_t>(p.stride_h);
  g.lower[0] = -p.pad_w, g.upper[0] = p.pad_w - (p.s - 1) * p.dil_w;
  g.lower[1] = -p.pad_h, g.upper[1] = p.pad_h - (p.r - 1) * p.dil_h;
  g.channels = kDepth, g.pixels = static_cast<uint32_t>(tile.m);
  return g;
}

/// Weights [k][r][s][c]; with a cluster each block fetches its share of the tile's rows.
inline TensorMapGeometry conv_map_weight(const ConvParams& p, const ConvTile& tile) {
  TensorMapGeometry g{};
  g.pointer = p.conv.weight, g.dtype = p.dtype, g.rank = 4, g.swizzle = kRowBytes;
  const int size[] = {p.c, p.s, p.r, p.k}, box[] = {kDepth, 1, 1, tile.n / tile.cluster};
  for (int i = 0; i < 4; i++) {
    g.size[i] = static_cast<uint64_t>(size[i]), g.box[i] = static_cast<uint32_t>(box[i]);
    if (i > 0) g.stride[i] = i == 1 ? g.size[0] * 2 : g.stride[i - 1] * g.size[i - 1];
  }
  return g;
}

/// The output or the residual, [pixels][channels_out], in panels of kDepth channels by the rows of one consumer group.
inline TensorMapGeometry conv_map_side(const ConvParams& p, const ConvTile& tile, const void* pointer, int64_t pitch) {
  return matrix_map(pointer, p.dtype, int64_t{p.n} * p.p * p.q, p.k, pitch,
                    tile.ping_pong ? tile.m : tile.m / tile.groups);
}

/// Why the kernel cannot run this, null if it can. kDual: it adds a projection.
template <bool kDual>
const char* conv_unsupported(const ConvParams& p) {
  if (p.in_scale != nullptr) return "it has no scale and ReLU of the input";
  if ((p.projection.x != nullptr) != kDual) return kDual ? "it needs a projection" : "it has no projection";
  if (p.c % 8 != 0 || p.k % 8 != 0 || (kDual && p.projection.c % 8 != 0)) return "TMA needs channels in multiples of 8";
  if (int64_t{p.n} * p.p * p.q > INT_MAX - 256) return "more than 2**31 output pixels";
  if (p.stride_h > 8 || p.stride_w > 8 || p.projection.stride > 8) return "TMA's im2col mode takes strides up to 8";
  const int reach_h = (p.r - 1) * p.dil_h, reach_w = (p.s - 1) * p.dil_w;
  if (std::max(reach_h, reach_w) > 127 || std::max(p.pad_h, p.pad_w) > 127)
    return "TMA's im2col mode takes padding and taps up to 127 pixels away";
  return nullptr;
}

/// Predicted microseconds, from rates of an H100: 2048 fused multiply-adds, 40 bytes from L2 and 13 bytes of device
/// memory a clock and multiprocessor, 1.7 GHz.
inline float conv_estimate(const ConvParams& p, const ConvTile& tile, int splits, const Device& device) {
  const ConvArgs a = conv_args(p, tile, splits, nullptr);
  const float products = static_cast<float>(tile.m) * static_cast<float>(tile.n) * kDepth / 2048;
  const float loads = static_cast<float>((tile.m + tile.n / tile.cluster) * kRowBytes) / 40;
  // Loads and products overlap, but not fully: both use shared memory.
  const float step = std::max(products, loads) + std::min(products, loads) / 4;
  const float main = step * static_cast<float>(a.main.steps + a.projection.steps) / static_cast<float>(splits);
  const float element = splits > 1 ? 8 : a.residual ? 4 : 2;  // bytes to and from memory per result
  const float epilogue = 300 + static_cast<float>(tile.m) * static_cast<float>(tile.n) * element / 13;
  const int grid = conv_grid(a, tile, device);
  const float beside = grid > device.multiprocessors ? 2 : 1;  // tiles that a multiprocessor works on at a time
  const float each = tile.ping_pong ? std::max(main, epilogue) : std::max(beside * main, main + epilogue);
  const float start = splits > 1 ? 6000 : 1500;  // clocks; the second kernel of a split sum included
  const auto rounds = static_cast<float>(ceil_div(conv_items(a, tile.cluster) * tile.cluster, grid));
  return (start + rounds * each) / 1700;
}

}  // namespace resnet_fused::cuda::sm90
