// Whole bottleneck whose weights do not fit into shared memory (mid widths 128 and 256, stride 1, identity shortcut)
// in one launch for sm_90a.
//
//   h1 = relu(W1 x * s1 + b1)   h2 = relu(W2 (*) h1 * s2 + b2)   y = relu(W3 h2 * s3 + b3 + x)
//
// Persistent blocks of one TMA producer thread and two consumer warpgroups that share a tile of kTileH x 14 output
// pixels (28 = 2 * 14 and 14 leave no waste) and compute h1 on its halo, 16 pixels wide. Weights and x stream through
// one ring of slots of 64 channels; a cluster's blocks fetch a share of each weight slot and multicast it to all. h1
// and h2 stay in shared memory. x is read a second time, as the shortcut, from L2.
//
// All products are transposed: 64 channels of a group x the tile's pixels, so that the number of pixels need only be a
// multiple of 8. Sums start from zeros: were the first product told not to accumulate, ptxas would take the registers
// for live from the tile before on and run out of them. h1 and h2 are planes of [pixel][8 channels] under unswizzled
// descriptors, with rows of 16 pixels one after another: a tap of the 3x3 is a start address, the last 2 pixels of a
// row are computed and dropped.
//   GEMM 1: kMid channels x the halo.   GEMM 2: kMid x kPixels, 9 taps.   GEMM 3: 128 channels x kPixels a pass.
// stmatrix.trans turns a result round on its way to shared memory; ldmatrix.trans does so with the shortcut, which TMA
// brings to where the result will go.
// Not yet run on a GPU; what only one can show: that unswizzled descriptors may start at any multiple of 16 bytes.
#pragma once
#include "cuda/sm90/bottleneck_streamed_geometry.h"
#include "cuda/sm90/pipeline.h"

namespace resnet_fused::cuda::sm90 {

template <class Element_, class Layout>
struct StreamedBottleneckTraits : Layout {
  using Element = Element_;
};

/// Tensor maps: x in halo pieces, x and y in tiles, weights.
struct StreamedBottleneckMaps {
  const CUtensorMap *x, *w1, *w2, *w3, *shortcut, *y;
};

template <class T>
struct StreamedBottleneckProducer {
  const StreamedBottleneckMaps& maps;
  const StreamedBottleneckArgs& a;
  uint32_t base;
  int rank;
  Ring<T::kStages> ring;
  RingPosition<T::kStages> position;

  /// A slot of weights: rows from `row` on of 64 columns from `column` on, a share of them by each block.
  __device__ void weights(const CUtensorMap* map, int column, int row) {
    constexpr int kShare = T::kWeightRows / T::kCluster;
    const uint32_t slot = base + position.stage() * T::kSlot, full = ring.full(position.stage());
    ring.acquire(position, T::kWeightBytes);
    if constexpr (T::kCluster == 1)
      ptx::tma_load_2d(slot, map, full, column, row);
    else
      ptx::tma_load_multicast_2d(slot + rank * kShare * kRowBytes, map, full, (1 << T::kCluster) - 1, column,
                                 row + rank * kShare);
    position.use++;
  }

  __device__ void run() {
    for (int first = blockIdx.x - rank; first < a.tiles(); first += gridDim.x) {
      const StreamedBottleneckTile<T> tile(a, first + rank);
      for (int k = 0; k < T::kSlices; k++)
        for (int block = 0; block < T::kBlocks; block++) {
          weights(maps.w1, k * kDepth, block * T::kWeightRows);
          for (int i = 0; block == 0 && i < T::kPieces; i++, position.use++) {
            ring.acquire(position, T::kPieceBytes);
            ptx::tma_load_4d(base + position.stage() * T::kSlot, maps.x, ring.full(position.stage()), k * kDepth,
                             tile.w - 1, tile.h - 1 + i * T::kPieceH, tile.n);
          }
        }
      for (int k = 0; k < 9 * T::kMidSlices; k++)
        for (int block = 0; block < T::kBlocks; block++) weights(maps.w2, k * kDepth, block * T::kWeightRows);
      for (int pass = 0; pass < T::kPasses; pass++)
        for (int k = 0; k < T::kMidSlices; k++) weights(maps.w3, k * kDepth, pass * T::kWeightRows);
    }
  }
};

template <class T>
struct StreamedBottleneckConsumer {
  using Element = typename T::Element;
  const StreamedBottleneckMaps& maps;
  const StreamedBottleneckArgs& a;
  uint32_t base, staging, shortcut_full;
  int rank, group, warp, lane;
  Ring<T::kStages> ring;
  RingPosition<T::kStages> position;  // the next slot to take
  uint32_t held = 0;                  // the oldest slot that is not let go of
  uint32_t done = 0;                  // slots before this one are free once the products under way are done

  __device__ bool leader() const { return threadIdx.x % 128 == 0; }
  __device__ void group_sync() const { ptx::bar_sync(1 + group, 128); }
  __device__ void sync() const { ptx::bar_sync(3, 256); }

  // ---- the ring ----------------------------------------------------------------------------------------------------
  /// Descriptor of the next slot, which has landed.
  __device__ uint64_t take() {
    ring.wait_full(position);
    return ptx::wg_desc<kRowBytes>(base) + position.use++ % T::kStages * (T::kSlot / 16);
  }
  /// Of this group's 64 rows of weights.
  __device__ uint64_t take_weights() { return take() + group * (kMatrixBytes / 16); }

  __device__ void release_until(uint32_t end) {
    for (; held != end; held++) ring.template release<T::kCluster>(RingPosition<T::kStages>{held}.stage());
  }
  /// Closes a group of products, after which the slots before `end` are free; waits for the group before.
  __device__ void commit(uint32_t end) {
    ptx::wg_commit();
    ptx::wg_wait<1>();
    release_until(done);
    done = end;
  }
  __device__ void drain() {
    ptx::wg_wait<0>();
    release_until(done);
  }

  // ---- results -----------------------------------------------------------------------------------------------------
  /// Scale and shift of a thread's two channels out of 64: acc[4 * j + 2 * r ..] is of channel r.
  struct Vectors {
    float s[2], b[2];
    __device__ Vectors(const float* scale, const float* shift, int channel) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        s[r] = scale != nullptr ? scale[channel + 8 * r] : 1.f;
        b[r] = shift[channel + 8 * r];
      }
    }
  };

  /// This thread's first channel of the group's share of `block`.
  __device__ int channel(int block) const { return block * T::kWeightRows + group * 64 + warp * 16 + lane / 4; }

  /// 64 channels x 8 * kColumns pixels, from pixel `first` on, of h1 or h2. keep[row][i]: what survives of register i
  /// of a row of 16 pixels.
  template <int kPlane, int kColumns, class Keep>
  __device__ void store_planes(const float* acc, uint32_t planes, int block, int first, const Vectors& v,
                               Keep keep) const {
    const int plane = block * 16 + group * 8 + warp * 2 + (lane >> 3 & 1);
    const uint32_t to = planes + plane * kPlane + (first + (lane >> 4) * 8 + lane % 8) * 16;
#pragma unroll
    for (int nb = 0; nb < kColumns; nb += 2) {  // 16 channels x 16 pixels of a warp: one stmatrix
      uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {  // 8x8 matrix i: channels i % 2 * 8.., pixels i / 2 * 8..
        const float* d = acc + (nb + i / 2) * 4 + i % 2 * 2;
        r[i] = ptx::pack_relu<Element>(d[0] * v.s[i % 2] + v.b[i % 2], d[1] * v.s[i % 2] + v.b[i % 2]) &
               keep(nb / 2, i / 2);
      }
      ptx::stmatrix_x4_t(to + nb * 128, r[0], r[1], r[2], r[3]);
    }
  }

  // ---- the three layers --------------------------------------------------------------------------------------------
  /// h1 on the halo, in shared memory; zero outside of the image, where relu(b1) would be.
  __device__ void first(const StreamedBottleneckTile<T>& tile) {
    float acc[T::kBlocks][T::kPieces][T::kPiecePixels / 2] = {};
    for (int k = 0; k < T::kSlices; k++) {
      uint64_t x[T::kPieces];
#pragma unroll
      for (int block = 0; block < T::kBlocks; block++) {
        const uint64_t w = take_weights();
        const uint32_t weights_end = position.use;
        if (block == 0)
#pragma unroll
          for (int i = 0; i < T::kPieces; i++) x[i] = take();
        ptx::wg_fence();
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
#pragma unroll
          for (int i = 0; i < T::kPieces; i++) ptx::wgmma<Element>(acc[block][i], w + kk * 2, x[i] + kk * 2, true);
        commit(block + 1 < T::kBlocks ? weights_end : position.use);  // the last one is done with x as well
      }
    }
    drain();

    if (leader()) ptx::tma_store_wait<0>();
    sync();  // the tile before is stored, and nobody reads h1 or h2 any more
    // Registers are of two neighbouring pixels of a row, 2t and 2t + 1, or 8 further on.
    uint32_t columns[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int w = tile.w - 1 + i * 8 + lane % 4 * 2;
      columns[i] = (static_cast<unsigned>(w) < static_cast<unsigned>(a.width) ? 0xffffu : 0u) |
                   (static_cast<unsigned>(w + 1) < static_cast<unsigned>(a.width) ? 0xffff0000u : 0u);
    }
#pragma unroll
    for (int block = 0; block < T::kBlocks; block++) {
      const Vectors v(a.s1, a.b1, channel(block));
#pragma unroll
      for (int i = 0; i < T::kPieces; i++)
        store_planes<T::kPlane1, T::kPiecePixels / 8>(
            acc[block][i], base + T::kH1, block, i * T::kPiecePixels, v, [&](int row, int half) {
              const int h = tile.h - 1 + i * T::kPieceH + row;
              return static_cast<unsigned>(h) < static_cast<unsigned>(a.height) ? columns[half] : 0u;
            });
    }
    ptx::fence_async();
    sync();
  }

  __device__ void second() {
    float acc[T::kBlocks][T::kPixels / 2] = {};
    const uint64_t pixels = ptx::wg_desc_ns(base + T::kH1, T::kPlane1, 128);
    for (int tap = 0; tap < 9; tap++)
      for (int k = 0; k < T::kMidSlices; k++) {
        const uint64_t x = pixels + (tap / 3 * T::kHaloW + tap % 3) + k * 8 * (T::kPlane1 / 16);
#pragma unroll
        for (int block = 0; block < T::kBlocks; block++) {
          const uint64_t w = take_weights();
          ptx::wg_fence();
#pragma unroll
          for (int kk = 0; kk < 4; kk++)
            ptx::wgmma<Element>(acc[block], w + kk * 2, x + kk * 2 * (T::kPlane1 / 16), true);
          commit(position.use);
        }
      }
    drain();
#pragma unroll
    for (int block = 0; block < T::kBlocks; block++)
      store_planes<T::kPlane2, T::kPixels / 8>(acc[block], base + T::kH2, block, 0, Vectors(a.s2, a.b2, channel(block)),
                                               [](int, int) { return ~0u; });
    ptx::fence_async();
    sync();  // h2 is there, and h1 makes way for the staging buffers
  }

  __device__ void third(const StreamedBottleneckTile<T>& tile) {
    const uint64_t pixels = ptx::wg_desc_ns(base + T::kH2, T::kPlane2, 128);
    for (int pass = 0; pass < T::kPasses; pass++) {
      const int panel = pass * T::kWeightRows + group * 64;
      if (leader()) {
        ptx::tma_store_wait<0>();
        ptx::mbar_expect_tx(shortcut_full, T::kTileBytes);
        ptx::tma_load_4d(staging, maps.shortcut, shortcut_full, panel, tile.w, tile.h, tile.n);
      }
      float acc[T::kPixels / 2] = {};
      for (int k = 0; k < T::kMidSlices; k++) {
        const uint64_t w = take_weights();
        ptx::wg_fence();
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
          ptx::wgmma<Element>(acc, w + kk * 2, pixels + (k * 4 + kk) * 2 * (T::kPlane2 / 16), true);
        commit(position.use);
      }
      const Vectors v(a.s3, a.b3, channel(pass));
      drain();
      ptx::mbar_wait(shortcut_full, (shortcuts++) & 1);
      finish(acc, v);
      ptx::fence_async();
      group_sync();
      if (leader()) {
        ptx::tma_store_4d(maps.y, staging, panel, tile.w, tile.h, tile.n);
        ptx::tma_store_commit();
      }
    }
  }
  uint32_t shortcuts = 0;  // that have been waited for

  /// Adds the shortcut and leaves the result in its place: rows of 64 channels, 14 pixels of 16; the others go to two
  /// rows past the tile.
  __device__ void finish(const float* acc, const Vectors& v) const {
    const int pixel = (lane >> 4) * 8 + lane % 8, chunk = warp * 2 + (lane >> 3 & 1);
#pragma unroll
    for (int nb = 0; nb < T::kPixels / 8; nb += 2) {
      const int row = pixel < T::kTileW ? nb / 2 * T::kTileW + pixel : T::kTilePixels + pixel - T::kTileW;
      const uint32_t address = staging + row * kRowBytes + ((chunk ^ (row & 7)) << 4);
      uint32_t x[4], y[4];
      ptx::ldmatrix_x4_t(x, address);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float* d = acc + (nb + i / 2) * 4 + i % 2 * 2;
        const float2 side = unpack<Element>(x[i]);
        y[i] =
            ptx::pack_relu<Element>(d[0] * v.s[i % 2] + v.b[i % 2] + side.x, d[1] * v.s[i % 2] + v.b[i % 2] + side.y);
      }
      ptx::stmatrix_x4_t(address, y[0], y[1], y[2], y[3]);
    }
  }

  __device__ void run() {
    for (int index = blockIdx.x - rank; index < a.tiles(); index += gridDim.x) {
      const StreamedBottleneckTile<T> tile(a, index + rank);
      first(tile);
      second();
      third(tile);
    }
    if (leader()) ptx::tma_store_wait<0>();
  }
};

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    streamed_bottleneck_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_w1,
                               const __grid_constant__ CUtensorMap map_w2, const __grid_constant__ CUtensorMap map_w3,
                               const __grid_constant__ CUtensorMap map_shortcut,
                               const __grid_constant__ CUtensorMap map_y,
                               const __grid_constant__ StreamedBottleneckArgs args) {
  DYN_SMEM(smem);
  const uint32_t base = ptx::smem_addr(smem);
  const Ring<T::kStages> ring{base + T::kBarriers};
  const uint32_t shortcut_full = ring.base + Ring<T::kStages>::kBytes;
  const int rank = T::kCluster == 1 ? 0 : ptx::cluster_rank();
  if (threadIdx.x == 0) {
    prefetch_maps(map_x, map_w1, map_w2, map_w3, map_shortcut, map_y);
    ring.init(8 * T::kCluster);
    for (int g = 0; g < T::kGroups; g++) ptx::mbar_init(shortcut_full + 8 * g, 1);
    ptx::fence_init();
  }
  take_turn();
  if constexpr (T::kCluster == 1) {
    __syncthreads();
  } else {
    ptx::cluster_sync();
  }
  const StreamedBottleneckMaps maps{&map_x, &map_w1, &map_w2, &map_w3, &map_shortcut, &map_y};
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // uniform, and the compiler knows it
  if (group == T::kGroups) {
    ptx::reg_dec<kProducerRegisters>();
    if (threadIdx.x == T::kGroups * 128) StreamedBottleneckProducer<T>{maps, args, base, rank, ring, {}}.run();
  } else {
    ptx::reg_inc<kConsumerRegisters>();
    StreamedBottleneckConsumer<T> consumer{maps,
                                           args,
                                           base,
                                           base + T::kH1 + group * T::kStagingBytes,
                                           shortcut_full + 8 * group,
                                           rank,
                                           group,
                                           static_cast<int>(threadIdx.x % 128 / 32),
                                           static_cast<int>(threadIdx.x % 32),
                                           ring,
                                           {}};
    consumer.run();
  }
  if constexpr (T::kCluster > 1) {
    __syncwarp();  // one lane of the producer warp comes from its loop, and the cluster's barrier is for whole warps
    ptx::cluster_sync();  // a block that is gone can be neither written to nor signalled
  }
}

}  // namespace resnet_fused::cuda::sm90
