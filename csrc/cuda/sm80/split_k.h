// The second half of a convolution whose depth was split over blocks: sums added in the order of the splits, so that
// the same input gives the same bits, then the epilogue.
#pragma once
#include "cuda/api.h"
#include "cuda/sm80/element.h"

namespace resnet_fused::cuda::sm80 {

constexpr int kReduceThreads = 256;

// A thread takes one chunk of one pixel.
template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    conv_reduce_kernel(const __grid_constant__ ConvParams p, int splits, const float* workspace) {
  const int64_t rows = static_cast<int64_t>(p.n) * p.p * p.q;
  const int chunks = p.k / kChunk<T>;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (at >= rows * chunks) return;
  const int64_t pixel = at / chunks;
  const int k = static_cast<int>(at % chunks) * kChunk<T>;

  float sum[kChunk<T>] = {};
  for (int split = 0; split < splits; ++split) {
    const float* part = workspace + (split * rows + pixel) * p.k + k;
#pragma unroll
    for (int e = 0; e < kChunk<T>; e += 4) {
      const float4 v = *reinterpret_cast<const float4*>(part + e);
      sum[e] += v.x;
      sum[e + 1] += v.y;
      sum[e + 2] += v.z;
      sum[e + 3] += v.w;
    }
  }
  const Chunk<T> residual = p.residual == nullptr
                                ? Chunk<T>::zero()
                                : Chunk<T>::load(static_cast<const T*>(p.residual) + pixel * p.residual_pitch + k);
  Chunk<T> chunk;
#pragma unroll
  for (int e = 0; e < kChunk<T>; ++e) {
    const float v = fmaf(sum[e], p.conv.scale == nullptr ? 1.f : p.conv.scale[k + e],
                         p.conv.shift == nullptr ? 0.f : p.conv.shift[k + e]) +
                    Element<T>::to_float(residual.element[e]);
    chunk.element[e] = Element<T>::round(p.relu ? ptx::relu(v) : v);
  }
  chunk.store_global(static_cast<T*>(p.out) + pixel * p.out_pitch + k);
}

}  // namespace resnet_fused::cuda::sm80
