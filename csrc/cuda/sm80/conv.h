// conv_bn_act as an implicit GEMM: M = N * P * Q output pixels, N = K output channels, depth = R * S * C.
//
// out = activation(conv(x, weight) * scale + shift + residual), float32 sums, one rounding. Variants:
//   kPlain         that
//   kPreActivated  x is relu(x * in_scale + in_shift) first; padding stays zero
//   kDual          plus a 1x1 convolution of another image times its own scale: a block's last layer and its projection
//   in one kernel
// Any of them but kDual may split its depth over blocks (`splits`): each writes float32 sums into a workspace
// [splits][M][K], which conv_reduce_kernel adds up in order.
#pragma once
#include "cuda/api.h"
#include "cuda/sm80/epilogue.h"
#include "cuda/sm80/gemm.h"

namespace resnet_fused::cuda::sm80 {

enum class ConvKind { kPlain, kPreActivated, kDual };

// Dynamic shared memory: the ring, then in its place the strips.
template <class Tile>
constexpr int kConvSharedBytes =
    Tile::kRingBytes > Strip<typename Tile::Grid>::kBlockBytes ? Tile::kRingBytes
                                                               : Strip<typename Tile::Grid>::kBlockBytes;

// Blocks in the order in which they start: kGroup rows of tiles by all columns, then the next rows, so that blocks
// that run together share both operands in L2.
struct TileIndex {
  int m, n;

  static constexpr int kGroup = 8;

  __host__ __device__ static TileIndex of(int block, int tiles_m, int tiles_n) {
    const int first = block / (kGroup * tiles_n) * kGroup, within = block % (kGroup * tiles_n);
    const int rows = tiles_m - first < kGroup ? tiles_m - first : kGroup;
    return {first + within % rows, within / rows};
  }
};

// Where the window of output pixel m starts; nowhere past the last one.
__device__ inline Origin window_of(int m, const ConvParams& p, int stride_h, int stride_w, int pad_h, int pad_w,
                                   const Window& window) {
  if (m >= p.n * p.p * p.q) return Origin::nowhere();
  const int image = m / (p.p * p.q), pixel = m % (p.p * p.q);
  return Origin::of(image, pixel / p.q * stride_h - pad_h, pixel % p.q * stride_w - pad_w, window);
}

template <class Tile, ConvKind kKind>
__global__ void __launch_bounds__(Tile::kThreads)
    conv_kernel(const __grid_constant__ ConvParams p, int splits, float* workspace) {
  using T = typename Tile::T;
  using Grid = typename Tile::Grid;
  DYN_SMEM(smem);
  const SharedMemory shared(smem);
  const Grid grid(threadIdx.x);
  const int rows = p.n * p.p * p.q;
  const TileIndex tile = TileIndex::of(blockIdx.x, ceil_div(rows, Tile::kM), ceil_div(p.k, Tile::kN));
  const int first_row = tile.m * Tile::kM, first_channel = tile.n * Tile::kN;

  typename Grid::Accumulator acc;
  clear<Grid>(acc);
  const Window window{p.h, p.w, p.c, p.r, p.s, p.dil_h, p.dil_w, p.x_pitch};
  const int steps = ceil_div(window.depth(), Tile::kDepth), share = ceil_div(steps, splits);
  const int begin = blockIdx.y * share, end = begin + share < steps ? begin + share : steps;
  accumulate<Tile, kKind == ConvKind::kPreActivated>(
      grid, acc, shared, static_cast<const T*>(p.x), window, static_cast<const T*>(p.conv.weight), first_channel, p.k,
      p.in_scale, p.in_shift, begin, end,
      [&](int row) { return window_of(first_row + row, p, p.stride_h, p.stride_w, p.pad_h, p.pad_w, window); });

  if (splits > 1) {
    float* sums = workspace + static_cast<int64_t>(blockIdx.y) * rows * p.k;
#pragma unroll
    for (int i = 0; i < Grid::kFragmentsM; ++i)
#pragma unroll
      for (int j = 0; j < Grid::kFragmentsN; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const int m = first_row + grid.result_row(i, e), k = first_channel + grid.result_column(j, e);
          if (m < rows && k < p.k)
            *reinterpret_cast<float2*>(sums + static_cast<int64_t>(m) * p.k + k) =
                make_float2(acc[i][j][e], acc[i][j][e + 1]);
        }
    return;
  }

  scale_and_shift(grid, acc, p.conv.scale, p.conv.shift, first_channel, p.k);
  __syncthreads();  // the ring has been read: the strips, or the second product, take its place
  if constexpr (kKind == ConvKind::kDual) {
    typename Grid::Accumulator sum;
    clear<Grid>(sum);
    const auto& side = p.projection;
    const Window side_window{side.h, side.w, side.c, 1, 1, 1, 1, side.x_pitch};
    accumulate<Tile, false>(
        grid, sum, shared, static_cast<const T*>(side.x), side_window, static_cast<const T*>(side.weight),
        first_channel, p.k, nullptr, nullptr, 0, ceil_div(side.c, Tile::kDepth),
        [&](int row) { return window_of(first_row + row, p, side.stride, side.stride, 0, 0, side_window); });
    add_scaled(grid, acc, sum, side.scale, nullptr, first_channel, p.k);
    __syncthreads();
  }
  const Destination<T> to{static_cast<T*>(p.out), p.out_pitch, static_cast<const T*>(p.residual),
                          p.residual_pitch,       p.k,         p.relu};
  float* strip = reinterpret_cast<float*>(smem + threadIdx.x / 32 * Strip<Grid>::kBytes);
  store_rows<T>(grid, acc, strip, to, first_channel, [&](int row) -> int64_t {
    const int m = first_row + row;
    return m < rows ? m : -1;
  });
}

}  // namespace resnet_fused::cuda::sm80
