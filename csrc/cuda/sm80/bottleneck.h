// A whole bottleneck in one kernel: 1x1, 3x3 and 1x1 convolutions with their scales, shifts and ReLUs, and the
// shortcut.
//
// A block computes a tile of output pixels, all channels of it. The first convolution is computed for the tile's halo
// too (h1, 1.6 times the pixels of an 8x8 tile), the second over it (h2); both stay in shared memory. The third runs
// over the output channels kN at a time, with the projection, if there is one, in an accumulator of its own. Weights
// are streamed from L2 in every block.
#pragma once
#include "cuda/api.h"
#include "cuda/sm80/block_tile.h"
#include "cuda/sm80/epilogue.h"

namespace resnet_fused::cuda::sm80 {

template <class T_, int kMid_, class Pixels_, int kPass, int kWarpsM, int kWarpsN, int kStages>
struct BottleneckTile {
  using T = T_;
  using Pixels = Pixels_;
  static constexpr int kMid = kMid_, kN = 64;
  static constexpr int kPixelBytes = kMid * static_cast<int>(sizeof(T));
  // The halo is computed kPass pixels at a time.
  using First = GemmTile<T, kPass, kMid, kWarpsM, kWarpsN, 64, kStages>;
  using Second = GemmTile<T, Pixels::kPixels, kMid, kWarpsM, kWarpsN, 128, kStages>;
  using Third = GemmTile<T, Pixels::kPixels, kN, kWarpsM, kWarpsN, 64, kStages>;
  static constexpr int kPasses = ceil_div(Pixels::kHalo, kPass);
  static constexpr int kThreads = First::kThreads;

  // Shared memory: h1, which the strips replace; h2; the ring, which in Second holds weights only.
  static constexpr int kStripBytes = Strip<typename Third::Grid>::kBlockBytes;
  static constexpr int kFirstBytes =
      Pixels::kHalo * kPixelBytes > kStripBytes ? Pixels::kHalo * kPixelBytes : kStripBytes;
  static constexpr int kRingAt = kFirstBytes + Pixels::kPixels * kPixelBytes;
  static constexpr int kSecondRing = kStages * Second::kN * Second::kRowBytes;
  static constexpr int kRing = First::kRingBytes > Third::kRingBytes ? First::kRingBytes : Third::kRingBytes;
  static constexpr int kSharedBytes = kRingAt + (kRing > kSecondRing ? kRing : kSecondRing);
};

template <class Tile>
// Any number of registers: left to guess, ptxas keeps to 168 for sm_100 and spills 8 bytes.
__global__ void __launch_bounds__(Tile::kThreads, 256 / Tile::kThreads)
    bottleneck_kernel(const __grid_constant__ BottleneckParams p) {
  using T = typename Tile::T;
  using Pixels = typename Tile::Pixels;
  DYN_SMEM(smem);
  const SharedMemory h1(smem), h2 = h1.at(Tile::kFirstBytes), ring = h1.at(Tile::kRingAt);
  const Pixels pixels(blockIdx.x, p.p, p.q);
  const int h1_h = (p.h - 1) / p.stride1 + 1, h1_w = (p.w - 1) / p.stride1 + 1;
  const Window window{p.h, p.w, p.c, 1, 1, 1, 1, p.x_pitch};
  const T* x = static_cast<const T*>(p.x);

  for (int pass = 0; pass < Tile::kPasses; ++pass) {
    using Gemm = typename Tile::First;
    const auto place = [&](int row) -> Place {
      const int at = pass * Gemm::kM + row, y = pixels.halo_y(at), x = pixels.halo_x(at);
      return {at < Pixels::kHalo ? at : -1, y >= 0 && y < h1_h && x >= 0 && x < h1_w};
    };
    const typename Gemm::Grid grid(threadIdx.x);
    typename Gemm::Grid::Accumulator acc;
    clear<typename Gemm::Grid>(acc);
    accumulate<Gemm, false>(grid, acc, ring, x, window, static_cast<const T*>(p.conv1.weight), 0, Tile::kMid, nullptr,
                            nullptr, 0, ceil_div(p.c, Gemm::kDepth), [&](int row) {
                              const Place at = place(row);
                              if (at.row < 0 || !at.inside) return Origin::nowhere();
                              return Origin::of(pixels.image, pixels.halo_y(at.row) * p.stride1,
                                                pixels.halo_x(at.row) * p.stride1, window);
                            });
    store_intermediate<T, Tile::kMid>(grid, acc, h1.bytes, p.conv1.scale, p.conv1.shift, place);
    __syncthreads();  // h1 is there, and the ring free
  }

  {
    using Gemm = typename Tile::Second;
    const typename Gemm::Grid grid(threadIdx.x);
    typename Gemm::Grid::Accumulator acc;
    clear<typename Gemm::Grid>(acc);
    accumulate_resident<Gemm, 9, Tile::kMid>(
        grid, acc, ring, h1.address, static_cast<const T*>(p.conv2.weight), 0, Tile::kMid,
        [&](int i) { return Pixels::window(grid.a_row(i)); }, Pixels::tap_row);
    store_intermediate<T, Tile::kMid>(grid, acc, h2.bytes, p.conv2.scale, p.conv2.shift,
                                      [](int row) -> Place { return {row, true}; });
    __syncthreads();  // the ring is free; the third product's own barriers cover h2 and h1
  }

  using Gemm = typename Tile::Third;
  using Grid = typename Gemm::Grid;
  const Grid grid(threadIdx.x);
  float* strip = reinterpret_cast<float*>(h1.bytes + threadIdx.x / 32 * Strip<Grid>::kBytes);
  const bool projects = p.projection.weight != nullptr;
  const Destination<T> to{static_cast<T*>(p.out), p.out_pitch, projects ? nullptr : x, p.x_pitch, p.k, true};
  for (int first = 0; first < p.k; first += Tile::kN) {
    typename Grid::Accumulator acc;
    clear<Grid>(acc);
    accumulate_resident<Gemm, 1, Tile::kMid>(
        grid, acc, ring, h2.address, static_cast<const T*>(p.conv3.weight), first, p.k,
        [&](int i) { return grid.a_row(i); }, [](int) { return 0; });
    scale_and_shift(grid, acc, p.conv3.scale, p.conv3.shift, first, p.k);
    __syncthreads();
    if (projects) {
      typename Grid::Accumulator sum;
      clear<Grid>(sum);
      const int stride = p.stride1 * p.stride2;
      accumulate<Gemm, false>(grid, sum, ring, x, window, static_cast<const T*>(p.projection.weight), first, p.k,
                              nullptr, nullptr, 0, ceil_div(p.c, Gemm::kDepth), [&](int row) {
                                const int y = pixels.pixel_y(row), x = pixels.pixel_x(row);
                                if (y >= p.p || x >= p.q) return Origin::nowhere();
                                return Origin::of(pixels.image, y * stride, x * stride, window);
                              });
      add_scaled(grid, acc, sum, p.projection.scale, p.projection.shift, first, p.k);
      __syncthreads();
    }
    store_rows<T>(grid, acc, strip, to, first, [&](int row) -> int64_t {
      const int y = pixels.pixel_y(row), x = pixels.pixel_x(row);
      return y < p.p && x < p.q ? (static_cast<int64_t>(pixels.image) * p.p + y) * p.q + x : -1;
    });
  }
}

}  // namespace resnet_fused::cuda::sm80
