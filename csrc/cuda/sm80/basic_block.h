// A whole basic block in one kernel: two 3x3 convolutions with their scales, shifts and ReLUs, and the shortcut.
//
// A block computes a tile of output pixels, all channels of it; the first convolution is computed for the tile's halo
// too (1.4 times the pixels of an 8x16 tile) and stays in shared memory. It pays where memory and launches bound a
// block, with few channels (CIFAR); at 64 channels the halo's FLOPs cost more than the saved bytes.
#pragma once
#include "cuda/api.h"
#include "cuda/sm80/block_tile.h"
#include "cuda/sm80/epilogue.h"

namespace resnet_fused::cuda::sm80 {

template <class T_, int kChannels_, class Pixels_, int kPass, int kWarpsM, int kWarpsN, int kStages>
struct BasicBlockTile {
  using T = T_;
  using Pixels = Pixels_;
  static_assert(Pixels::kStride == 1, "of the second convolution");
  static constexpr int kChannels = kChannels_;  // of the intermediate and the output
  static constexpr int kPixelBytes = kChannels * static_cast<int>(sizeof(T));
  // The halo is computed kPass pixels at a time.
  using First = GemmTile<T, kPass, kChannels, kWarpsM, kWarpsN, 128, kStages>;
  using Second = GemmTile<T, Pixels::kPixels, kChannels, kWarpsM, kWarpsN, 128, kStages>;
  static constexpr int kPasses = ceil_div(Pixels::kHalo, kPass);
  static constexpr int kThreads = First::kThreads;

  // Shared memory: the intermediate; the ring, which the strips replace.
  static constexpr int kRingAt = Pixels::kHalo * kPixelBytes;
  static constexpr int kStripBytes = Strip<typename Second::Grid>::kBlockBytes;
  static constexpr int kRing = First::kRingBytes > Second::kRingBytes ? First::kRingBytes : Second::kRingBytes;
  static constexpr int kSharedBytes = kRingAt + (kRing > kStripBytes ? kRing : kStripBytes);
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) basic_block_kernel(const __grid_constant__ BasicBlockParams p) {
  using T = typename Tile::T;
  using Pixels = typename Tile::Pixels;
  DYN_SMEM(smem);
  const SharedMemory h1(smem), ring = h1.at(Tile::kRingAt);
  const Pixels pixels(blockIdx.x, p.p, p.q);
  const T* x = static_cast<const T*>(p.x);

  const Window window{p.h, p.w, p.c, 3, 3, 1, 1, p.x_pitch};
  for (int pass = 0; pass < Tile::kPasses; ++pass) {
    using Gemm = typename Tile::First;
    const auto place = [&](int row) -> Place {
      const int at = pass * Gemm::kM + row, y = pixels.halo_y(at), x = pixels.halo_x(at);
      return {at < Pixels::kHalo ? at : -1, y >= 0 && y < p.p && x >= 0 && x < p.q};
    };
    const typename Gemm::Grid grid(threadIdx.x);
    typename Gemm::Grid::Accumulator acc;
    clear<typename Gemm::Grid>(acc);
    accumulate<Gemm, false>(grid, acc, ring, x, window, static_cast<const T*>(p.conv1.weight), 0, Tile::kChannels,
                            nullptr, nullptr, 0, ceil_div(9 * p.c, Gemm::kDepth), [&](int row) {
                              const Place at = place(row);
                              if (at.row < 0 || !at.inside) return Origin::nowhere();
                              return Origin::of(pixels.image, pixels.halo_y(at.row) * p.stride - 1,
                                                pixels.halo_x(at.row) * p.stride - 1, window);
                            });
    store_intermediate<T, Tile::kChannels>(grid, acc, h1.bytes, p.conv1.scale, p.conv1.shift, place);
    __syncthreads();  // the intermediate is there, and the ring free
  }

  using Gemm = typename Tile::Second;
  using Grid = typename Gemm::Grid;
  const Grid grid(threadIdx.x);
  typename Grid::Accumulator acc;
  clear<Grid>(acc);
  accumulate_resident<Gemm, 9, Tile::kChannels>(
      grid, acc, ring, h1.address, static_cast<const T*>(p.conv2.weight), 0, Tile::kChannels,
      [&](int i) { return Pixels::window(grid.a_row(i)); }, Pixels::tap_row);
  scale_and_shift(grid, acc, p.conv2.scale, p.conv2.shift, 0, Tile::kChannels);
  __syncthreads();
  const bool projects = p.projection.weight != nullptr;
  if (projects) {
    typename Grid::Accumulator sum;
    clear<Grid>(sum);
    const Window point{p.h, p.w, p.c, 1, 1, 1, 1, p.x_pitch};
    accumulate<Gemm, false>(grid, sum, ring, x, point, static_cast<const T*>(p.projection.weight), 0, Tile::kChannels,
                            nullptr, nullptr, 0, ceil_div(p.c, Gemm::kDepth), [&](int row) {
                              const int y = pixels.pixel_y(row), x = pixels.pixel_x(row);
                              if (y >= p.p || x >= p.q) return Origin::nowhere();
                              return Origin::of(pixels.image, y * p.stride, x * p.stride, point);
                            });
    add_scaled(grid, acc, sum, p.projection.scale, p.projection.shift, 0, Tile::kChannels);
    __syncthreads();
  }
  float* strip = reinterpret_cast<float*>(ring.bytes + threadIdx.x / 32 * Strip<Grid>::kBytes);
  const Destination<T> to{static_cast<T*>(p.out), p.out_pitch, projects ? nullptr : x, p.x_pitch, p.k, true};
  store_rows<T>(grid, acc, strip, to, 0, [&](int row) -> int64_t {
    const int y = pixels.pixel_y(row), x = pixels.pixel_x(row);
    return y < p.p && x < p.q ? (static_cast<int64_t>(pixels.image) * p.p + y) * p.q + x : -1;
  });
}

}  // namespace resnet_fused::cuda::sm80
