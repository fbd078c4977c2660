// The products that all kernels are made of: an implicit GEMM whose pixels are gathered from global memory, and one
// whose pixels are a block's own intermediate in shared memory.
#pragma once
#include "cuda/sm80/operands.h"
#include "cuda/sm80/pipeline.h"

namespace resnet_fused::cuda::sm80 {

// One size of the product: kM x kN results a block, rows of kRowBytes of depth a step, kStages of them in flight.
template <class T_, int kM_, int kN_, int kWarpsM, int kWarpsN, int kRowBytes_, int kStages_>
struct GemmTile {
  using T = T_;
  using Grid = WarpGrid<kM_, kN_, kWarpsM, kWarpsN>;
  static constexpr int kM = kM_, kN = kN_, kRowBytes = kRowBytes_, kStages = kStages_;
  static constexpr int kThreads = Grid::kThreads;
  static constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kStageBytes = (kM + kN) * kRowBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
};

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// acc += the product of one convolution's gathered pixels and weights, over the steps [begin, end) of its depth.
template <class Tile, bool kPreActivated, class OriginOf>
__device__ void accumulate(const typename Tile::Grid& grid, typename Tile::Grid::Accumulator& acc,
                           const SharedMemory& shared, const typename Tile::T* x, const Window& window,
                           const typename Tile::T* weight, int first_channel, int channels, const float* in_scale,
                           const float* in_shift, int begin, int end, OriginOf origin) {
  using T = typename Tile::T;
  using Rows = TileRows<Tile::kRowBytes>;
  const int thread = threadIdx.x;
  constexpr int kOffsetB = Tile::kM * Tile::kRowBytes;
  GatheredRows<T, Tile::kM, Tile::kRowBytes, Tile::kThreads> a(x, window, thread, begin * Tile::kDepth, origin);
  WeightRows<T, Tile::kN, Tile::kRowBytes, Tile::kThreads> b(weight, first_channel, channels, window.depth(), thread,
                                                             begin * Tile::kDepth);
  const auto compute = [&](int stage, int) {
    const uint32_t tile = shared.address + stage * Tile::kStageBytes;
    multiply<T, typename Tile::Grid, Tile::kRowBytes / 32>(
        grid, acc, [&](int i, int chunk) { return tile + Rows::offset(grid.a_row(i), chunk); },
        [&](int j, int chunk) { return tile + kOffsetB + Rows::offset(grid.b_row(j), chunk); });
  };
  if constexpr (kPreActivated) {
    InputActivation<T, Tile::kM, Tile::kRowBytes, Tile::kThreads, Tile::kStages> activation(
        in_scale, in_shift, window.c, thread, begin * Tile::kDepth);
    pipeline<Tile::kStages>(
        end - begin,
        [&](int stage, int) {
          const uint32_t tile = shared.address + stage * Tile::kStageBytes;
          activation.loaded(stage, a.load(tile));
          b.load(tile + kOffsetB);
        },
        [&](int stage, int) { activation.apply(stage, shared.bytes + stage * Tile::kStageBytes); }, compute);
  } else {
    pipeline<Tile::kStages>(
        end - begin,
        [&](int stage, int) {
          const uint32_t tile = shared.address + stage * Tile::kStageBytes;
          a.load(tile);
          b.load(tile + kOffsetB);
        },
        compute);
  }
}

// acc += the same with pixels in shared memory: rows of kChannels channels at `resident`, of which row_of(i) is the
// one that this lane hands to ldmatrix for fragment i at tap 0, and tap_row(tap) the distance to another tap's. The
// ring holds weights only.
template <class Tile, int kTaps, int kChannels, class RowOf, class TapRow>
__device__ void accumulate_resident(const typename Tile::Grid& grid, typename Tile::Grid::Accumulator& acc,
                                    const SharedMemory& ring, uint32_t resident, const typename Tile::T* weight,
                                    int first_channel, int channels, RowOf row_of, TapRow tap_row) {
  using T = typename Tile::T;
  using Grid = typename Tile::Grid;
  using Rows = TileRows<Tile::kRowBytes>;
  constexpr int kPixelBytes = kChannels * static_cast<int>(sizeof(T));
  using Resident = TileRows<kPixelBytes>;
  constexpr int kProducts = kTaps * kPixelBytes / 32, kStepProducts = Tile::kRowBytes / 32;
  static_assert(kPixelBytes % 32 == 0);
  WeightRows<T, Tile::kN, Tile::kRowBytes, Tile::kThreads> b(weight, first_channel, channels, kTaps * kChannels,
                                                             threadIdx.x, 0);
  pipeline<Tile::kStages>(
      ceil_div(kProducts, kStepProducts),
      [&](int stage, int) { b.load(ring.address + stage * Tile::kN * Tile::kRowBytes); },
      [&](int stage, int step) {
        const uint32_t tile = ring.address + stage * Tile::kN * Tile::kRowBytes;
#pragma unroll
        for (int q = 0; q < kStepProducts; ++q) {
          const int product = step * kStepProducts + q;  // 32 bytes of depth, within one tap
          if (kProducts % kStepProducts != 0 && product >= kProducts) break;
          const int from = tap_row(product / (kPixelBytes / 32)), first_chunk = product % (kPixelBytes / 32) * 2;
          multiply<T, Grid, 1>(
              grid, acc,
              [&](int i, int chunk) { return resident + Resident::offset(row_of(i) + from, first_chunk + chunk); },
              [&](int j, int chunk) { return tile + Rows::offset(grid.b_row(j), 2 * q + chunk); });
        }
      });
}

}  // namespace resnet_fused::cuda::sm80
