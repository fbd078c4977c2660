// A block's tile of output pixels, and the halo of the first intermediate around it that its 3x3 convolution reads.
#pragma once
#include "cuda/sm80/gemm.h"

namespace resnet_fused::cuda::sm80 {

// kH x kW output pixels; the 3x3 convolution has the given stride, padding 1 and no dilation.
template <int kH_, int kW_, int kStride_>
struct PixelTile {
  static constexpr int kH = kH_, kW = kW_, kStride = kStride_, kPixels = kH * kW;
  static constexpr int kHaloH = (kH - 1) * kStride + 3, kHaloW = (kW - 1) * kStride + 3;
  static constexpr int kHalo = kHaloH * kHaloW;

  int image, y, x;  // of the first output pixel

  __device__ PixelTile(int block, int height, int width) {
    const int across = ceil_div(width, kW), down = ceil_div(height, kH);
    image = block / (across * down);
    y = block / across % down * kH;
    x = block % across * kW;
  }
  static int64_t blocks(int images, int height, int width) {
    return static_cast<int64_t>(images) * ceil_div(width, kW) * ceil_div(height, kH);
  }

  __device__ int pixel_y(int row) const { return y + row / kW; }
  __device__ int pixel_x(int row) const { return x + row % kW; }
  // The halo's pixels in the first intermediate's image.
  __device__ int halo_y(int row) const { return y * kStride - 1 + row / kHaloW; }
  __device__ int halo_x(int row) const { return x * kStride - 1 + row % kHaloW; }
  // The halo's row under tap (0, 0) of an output pixel, and from there to another tap's.
  __device__ static int window(int row) { return (row / kW * kHaloW + row % kW) * kStride; }
  __device__ static int tap_row(int tap) { return tap / 3 * kHaloW + tap % 3; }
};

}  // namespace resnet_fused::cuda::sm80
