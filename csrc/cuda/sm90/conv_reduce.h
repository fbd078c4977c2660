// Second kernel of a convolution whose depth was split: adds the shares in their order and finishes the layer.
#pragma once
#include "cuda/sm90/conv_geometry.h"

namespace resnet_fused::cuda::sm90 {

struct ConvReduceArgs {
  const float *partial, *scale, *shift;  // [splits][pixels][channels]; [channels], scale may be null
  const void* residual;                  // [pixels][channels] or null
  void* out;
  int64_t pixels, residual_pitch, out_pitch;
  int channels, splits;
  bool relu;
};

/// A thread finishes 8 channels of a pixel: 16 bytes.
template <class Element>
__global__ void __launch_bounds__(256) conv_reduce_kernel(const __grid_constant__ ConvReduceArgs a) {
  take_turn();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int chunks = a.channels / 8;
  if (index >= a.pixels * chunks) return;
  const int64_t pixel = index / chunks;
  const int channel = static_cast<int>(index % chunks) * 8;
  float sum[8] = {};
  for (int split = 0; split < a.splits; split++) {
    const float* p = a.partial + (split * a.pixels + pixel) * a.channels + channel;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(p + i);
      sum[i] += v.x, sum[i + 1] += v.y, sum[i + 2] += v.z, sum[i + 3] += v.w;
    }
  }
  uint32_t side[4] = {}, y[4];
  if (a.residual != nullptr) {
    const uint4 v =
        *reinterpret_cast<const uint4*>(static_cast<const Element*>(a.residual) + pixel * a.residual_pitch + channel);
    side[0] = v.x, side[1] = v.y, side[2] = v.z, side[3] = v.w;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int k = channel + 2 * i;
    float2 v = make_float2(sum[2 * i], sum[2 * i + 1]);
    if (a.scale != nullptr) v.x *= a.scale[k], v.y *= a.scale[k + 1];
    v.x += a.shift[k], v.y += a.shift[k + 1];
    if (a.residual != nullptr) {
      const float2 r = unpack<Element>(side[i]);
      v.x += r.x, v.y += r.y;
    }
    y[i] = a.relu ? ptx::pack_relu<Element>(v.x, v.y) : ptx::pack<Element>(v.x, v.y);
  }
  *reinterpret_cast<uint4*>(static_cast<Element*>(a.out) + pixel * a.out_pitch + channel) =
      make_uint4(y[0], y[1], y[2], y[3]);
}

}  // namespace resnet_fused::cuda::sm90
