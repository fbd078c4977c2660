// A chain of bottlenecks with identity shortcuts, cut before each 3x3 and not before each first 1x1, for sm_90a. One
// launch computes the rest of a block and the next block's first layer:
//
//   h2 = relu(W2 (*) h1 * s2 + b2)   y = relu(W3 h2 * s3 + b3 + x)   h1_next = relu(W1 y * s1 + b1)
//
// No pixel is computed twice: what the 3x3 needs of its neighbours, the launch before left in memory. h2 and y's tile
// stay in registers, as in flash attention: the accumulator layout of one product is the layout of the next one's A
// operand. h2 is one operand for all of W3; 64 channels of y at a time are finished, stored, and multiplied by their
// columns of W1.
//
// Persistent blocks of one TMA producer thread and two consumer warpgroups with 64 pixels of a tile of 128 each. Tiles
// are runs of pixels of all images: TMA's im2col mode walks from image to image and gives h1's padding, as for a layer
// (conv.h). h1 and all weights stream through one ring; a cluster's blocks fetch a share of each weight tile and
// multicast it to all. Weights of mid width 64 (136 KB) would fit into shared memory; streamed, half of them a tile and
// block, they take an eighth of what L2 gives in the time that device memory takes for the tile's images, and leave
// room for all of its x on the way during the 3x3. A group's side buffers form a ring of their own, kept by its first
// thread: x comes by TMA, y replaces it there and leaves by TMA; the next h1 takes buffers that nothing was fetched
// into. Not yet run on a GPU; what only one can show: all speed.
#pragma once
#include "cuda/sm90/pipeline.h"
#include "cuda/sm90/rotated_geometry.h"

namespace resnet_fused::cuda::sm90 {

template <class Element_, class Layout>
struct RotatedTraits : Layout {
  using Element = Element_;
};

/// Tensor maps; those of w1 and h1_next count only if the next block's first layer is wanted.
struct RotatedMaps {
  const CUtensorMap *h1, *w2, *w3, *w1, *x, *y, *h1_next;
};

template <class T>
struct RotatedProducer {
  const RotatedMaps& maps;
  const RotatedArgs& a;
  uint32_t shared;
  int rank;
  Ring<T::kStages> ring;
  RingPosition<T::kStages> position;

  /// `kRows` rows of weights from `row` on, 64 columns from `column` on, a share of them by each block.
  template <int kRows>
  __device__ void weights(uint32_t offset, const CUtensorMap* map, int column, int row) const {
    constexpr int kShare = kRows / T::kCluster;
    const uint32_t to = shared + position.stage() * T::kStageBytes + offset, full = ring.full(position.stage());
    if constexpr (T::kCluster == 1)
      ptx::tma_load_2d(to, map, full, column, row);
    else
      ptx::tma_load_multicast_2d(to + rank * kShare * kRowBytes, map, full, (1 << T::kCluster) - 1, column,
                                 row + rank * kShare);
  }

  __device__ void run() {
    for (int first = blockIdx.x - rank; first < a.tiles(); first += gridDim.x) {
      const int m0 = (first + rank) * T::kTile, n = m0 / (a.height * a.width);
      const int h = m0 / a.width % a.height - 1, w = m0 % a.width - 1;
      for (int step = 0; step < T::kSteps; step++, position.use++) {
        const int tap = step / T::kSlices, c = step % T::kSlices * kDepth;
        ring.acquire(position, T::kBytesH1 + T::kBytesW);
        ptx::tma_load_im2col(shared + position.stage() * T::kStageBytes, maps.h1, ring.full(position.stage()), c, w, h,
                             n, tap % 3, tap / 3);
        weights<T::kMid>(T::kSecond, maps.w2, step * kDepth, 0);
      }
      for (int chunk = 0; chunk < T::kChunks; chunk++, position.use++) {
        ring.acquire(position, a.next ? 2 * T::kBytesW : T::kBytesW);
        for (int k = 0; k < T::kSlices; k++) weights<kDepth>(k * kMatrixBytes, maps.w3, k * kDepth, chunk * kDepth);
        if (a.next) weights<T::kMid>(T::kSecond, maps.w1, chunk * kDepth, 0);
      }
    }
  }
};

/// A group's side buffers: `use` counts the panels of 64 channels of y and then of the next h1, tile by tile.
template <class T>
struct RotatedSides {
  const RotatedMaps& maps;
  const RotatedArgs& a;
  uint32_t base, full;  // buffers, and a barrier for each
  int rank, group;
  uint32_t use = 0;

  __device__ bool leader() const { return threadIdx.x % 128 == 0; }
  __device__ uint32_t buffer(uint32_t of) const { return base + of % T::kSides * T::kPanelBytes; }

  /// Leader: fetches x for a use to come into its buffer, which is free, or says that it is free if it is for h1.
  __device__ void prefetch(uint32_t of) const {
    const uint32_t panels = T::kChunks + (a.next ? T::kSlices : 0), tile = of / panels, panel = of % panels;
    const int first = blockIdx.x - rank + static_cast<int>(tile) * gridDim.x;
    if (first >= a.tiles()) return;
    const uint32_t landed = full + of % T::kSides * 8;
    if (panel < T::kChunks) {
      ptx::mbar_expect_tx(landed, T::kPanelBytes);
      ptx::tma_load_2d(buffer(of), maps.x, landed, static_cast<int>(panel) * kDepth,
                       (first + rank) * T::kTile + group * T::kGroupTile);
    } else {
      ptx::mbar_arrive(landed);
    }
  }

  __device__ void start() const {
    if (leader())
      for (int i = 0; i < T::kSides; i++) prefetch(i);
  }

  /// The next buffer, with x if it is for y.
  __device__ uint32_t take() const {
    ptx::mbar_wait(full + use % T::kSides * 8, use / T::kSides & 1);
    return buffer(use);
  }

  /// Stores what the group left in the buffer it took, and fetches into the one that was stored before.
  __device__ void store(const CUtensorMap* map, int channel, int row) {
    ptx::fence_async();
    ptx::bar_sync(1 + group, 128);
    if (leader()) {
      ptx::tma_store_2d(map, buffer(use), channel, row);
      ptx::tma_store_commit();
      if (use > 0) {
        ptx::tma_store_wait<1>();
        prefetch(use - 1 + T::kSides);
      }
    }
    use++;
  }
};

template <class T>
struct RotatedConsumer {
  using Element = typename T::Element;
  const RotatedMaps& maps;
  const RotatedArgs& a;
  uint32_t shared;
  const float* vectors;
  int rank, group, warp, lane;
  Ring<T::kStages> ring;
  RotatedSides<T> sides;
  RingPosition<T::kStages> position{};

  using Operand = uint32_t[4];  // 16 pixels of a warp x 16 channels, as a wgmma A operand

  /// Descriptor of the stage at `position`, which has landed.
  __device__ uint64_t stage() const {
    ring.wait_full(position);
    return ptx::wg_desc<kRowBytes>(shared) + position.stage() * (T::kStageBytes / 16);
  }
  __device__ void release(uint32_t use) const {
    ring.template release<T::kCluster>(RingPosition<T::kStages>{use}.stage());
  }

  /// relu(sums * scale + shift [+ side]) of 16 channels, of which the first is `channel` in its layer.
  __device__ void finish(Operand& y, const float* sums, const uint32_t* side, int scale, int shift, int channel) const {
#pragma unroll
    for (int j = 0; j < 4; j++) {  // 8x8 matrix j: rows j % 2 * 8.., channels j / 2 * 8..
      const int k = channel + j / 2 * 8 + lane % 4 * 2;
      const float2 s = *reinterpret_cast<const float2*>(vectors + scale + k);
      const float2 b = *reinterpret_cast<const float2*>(vectors + shift + k);
      const float* d = sums + j / 2 * 4 + j % 2 * 2;
      float2 v = make_float2(d[0] * s.x + b.x, d[1] * s.y + b.y);
      if (side != nullptr) {
        const float2 x = unpack<Element>(side[j]);
        v.x += x.x, v.y += x.y;
      }
      y[j] = ptx::pack_relu<Element>(v.x, v.y);
    }
  }

  /// Where a lane's row of 16 pixels x 16 channels from channel 16 * block on lies in a side buffer.
  __device__ uint32_t place(uint32_t buffer, int block) const {
    return buffer + staging_offset<T>(warp * 16 + lane % 16, 2 * block + lane / 16);
  }

  /// h2 of the group's pixels.
  __device__ void first(Operand (&h2)[T::kMid / 16]) {
    float sums[T::kMid / 2] = {};
    for (int step = 0; step < T::kSteps; step++, position.use++) {
      const uint64_t landed = stage(), h1 = landed + group * (T::kPanelBytes / 16), w = landed + T::kSecond / 16;
      ptx::wg_fence();
#pragma unroll
      for (int kk = 0; kk < kDepth / 16; kk++) ptx::wgmma<Element>(sums, h1 + kk * 2, w + kk * 2, true);
      ptx::wg_commit();
      if (step > 0) {
        ptx::wg_wait<1>();  // the products of the stage before are done
        release(position.use - 1);
      }
    }
    ptx::wg_wait<0>();
    release(position.use - 1);
#pragma unroll
    for (int i = 0; i < T::kMid / 16; i++) finish(h2[i], sums + 8 * i, nullptr, T::kS2, T::kB2, 16 * i);
  }

  /// y, and the sums of the next h1.
  __device__ void second(const Operand (&h2)[T::kMid / 16], float (&next)[T::kMid / 2], int row) {
    Operand y[kDepth / 16];
    for (int chunk = 0; chunk < T::kChunks; chunk++, position.use++) {
      const uint64_t weights = stage();
      float sums[kDepth / 2] = {};
      ptx::wg_fence();
#pragma unroll
      for (int kk = 0; kk < T::kMid / 16; kk++)
        ptx::wgmma<Element>(sums, h2[kk], weights + kk / 4 * (kMatrixBytes / 16) + kk % 4 * 2, true);
      ptx::wg_commit();
      ptx::wg_wait<0>();
      if (chunk > 0) release(position.use - 1);  // its part of W1 was read until now
      const uint32_t buffer = sides.take();
#pragma unroll
      for (int i = 0; i < kDepth / 16; i++) {
        Operand x;
        ptx::ldmatrix_x4(x, place(buffer, i));
        finish(y[i], sums + 8 * i, x, T::kS3, T::kB3, chunk * kDepth + 16 * i);
        ptx::stmatrix_x4(place(buffer, i), y[i][0], y[i][1], y[i][2], y[i][3]);
      }
      if (a.next) {
        ptx::wg_fence();
#pragma unroll
        for (int kk = 0; kk < kDepth / 16; kk++)
          ptx::wgmma<Element>(next, y[kk], weights + T::kSecond / 16 + kk * 2, true);
        ptx::wg_commit();
      }
      sides.store(maps.y, chunk * kDepth, row);
    }
    ptx::wg_wait<0>();
    release(position.use - 1);
  }

  __device__ void third(const float (&next)[T::kMid / 2], int row) {
#pragma unroll
    for (int panel = 0; panel < T::kSlices; panel++) {
      const uint32_t buffer = sides.take();
#pragma unroll
      for (int i = 0; i < kDepth / 16; i++) {
        const int channel = panel * kDepth + 16 * i;
        Operand h1;
        finish(h1, next + channel / 2, nullptr, T::kS1, T::kB1, channel);
        ptx::stmatrix_x4(place(buffer, i), h1[0], h1[1], h1[2], h1[3]);
      }
      sides.store(maps.h1_next, panel * kDepth, row);
    }
  }

  __device__ void run() {
    sides.start();
    for (int index = blockIdx.x - rank; index < a.tiles(); index += gridDim.x) {
      const int row = (index + rank) * T::kTile + group * T::kGroupTile;
      Operand h2[T::kMid / 16];
      first(h2);
      float next[T::kMid / 2] = {};
      second(h2, next, row);
      if (a.next) third(next, row);
    }
    if (sides.leader()) ptx::tma_store_wait<0>();
  }
};

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    rotated_kernel(const __grid_constant__ CUtensorMap map_h1, const __grid_constant__ CUtensorMap map_w2,
                   const __grid_constant__ CUtensorMap map_w3, const __grid_constant__ CUtensorMap map_w1,
                   const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_y,
                   const __grid_constant__ CUtensorMap map_h1_next, const __grid_constant__ RotatedArgs args) {
  DYN_SMEM(smem);
  const uint32_t shared = ptx::smem_addr(smem);
  const Ring<T::kStages> ring{shared + T::kBarriers};
  const uint32_t sides_full = ring.base + Ring<T::kStages>::kBytes;
  const int rank = T::kCluster == 1 ? 0 : ptx::cluster_rank();
  if (threadIdx.x == 0) {
    prefetch_maps(map_h1, map_w2, map_w3, map_w1, map_x, map_y, map_h1_next);
    ring.init(8 * T::kCluster);
    for (int i = 0; i < T::kGroups * T::kSides; i++) ptx::mbar_init(sides_full + 8 * i, 1);
    ptx::fence_init();
  }
  take_turn();
  float* vectors = reinterpret_cast<float*>(smem + T::kVector);
  for (int i = threadIdx.x; i < T::kVectors; i += T::kThreads) vectors[i] = rotated_vector<T>(args, i);
  if constexpr (T::kCluster == 1) {
    __syncthreads();
  } else {
    ptx::cluster_sync();
  }
  const RotatedMaps maps{&map_h1, &map_w2, &map_w3, &map_w1, &map_x, &map_y, &map_h1_next};
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // uniform, and the compiler knows it
  if (group == T::kGroups) {
    ptx::reg_dec<kProducerRegisters>();
    if (threadIdx.x == T::kGroups * 128) RotatedProducer<T>{maps, args, shared, rank, ring, {}}.run();
  } else {
    ptx::reg_inc<kConsumerRegisters>();
    const RotatedSides<T> sides{
        maps, args, shared + T::kSide + group * T::kSides * T::kPanelBytes, sides_full + group * T::kSides * 8,
        rank, group};
    RotatedConsumer<T> consumer{maps,
                                args,
                                shared,
                                vectors,
                                rank,
                                group,
                                static_cast<int>(threadIdx.x % 128 / 32),
                                static_cast<int>(threadIdx.x % 32),
                                ring,
                                sides};
    consumer.run();
  }
  if constexpr (T::kCluster > 1) {
    __syncwarp();  // one lane of the producer warp comes from its loop, and the cluster's barrier is for whole warps
    ptx::cluster_sync();  // a block that is gone can be neither written to nor signalled
  }
}

}  // namespace resnet_fused::cuda::sm90
