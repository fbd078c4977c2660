// Convolution + scale/shift + residual + ReLU for sm_90a: persistent, warp-specialised implicit GEMM.
//
//   out[m, k] = activation(scale[k] * sum over taps and channels of x * weight + shift[k] + residual[m, k])
//
// M = N*P*Q output pixels, columns = output channels, depth = taps x channels in steps of 64 channels of one tap. One
// producer thread fills a ring of stages by TMA: x as a plain matrix (1x1, stride 1) or in im2col mode, where the
// hardware walks the output pixels, applies stride and dilation and zero-fills padding; channels past the last are
// zero-filled as well, in x and in the weights. Consumer warpgroups run wgmma from shared memory and write their tile
// through shared memory by TMA, which clips it. The residual is fetched into the same staging buffer while the products
// run.
//
// kPingPong: each group has tiles of its own, so that one group's epilogue hides behind the other's products.
// Otherwise the groups share a tile, stacked along M.
// kCluster: that many blocks along M fetch a share of the weights each and multicast it to all.
// kDual: adds projection_scale * (1x1 convolution of another image), in accumulators of its own: a block's last layer
// and its projection in one kernel.
// Not yet run on a GPU; what only one can show: all speed, and how im2col mode walks with strides above 1.
#pragma once
#include "cuda/sm90/conv_geometry.h"
#include "cuda/sm90/pipeline.h"

namespace resnet_fused::cuda::sm90 {

template <class Element_, int kTileM_, int kTileN_, int kStages_, int kGroups_, bool kPingPong_, int kCluster_ = 1,
          bool kDual_ = false>
struct ConvTraits {
  using Element = Element_;
  static constexpr int kTileM = kTileM_, kTileN = kTileN_, kStages = kStages_, kGroups = kGroups_, kCluster = kCluster_;
  static constexpr bool kPingPong = kPingPong_, kDual = kDual_;
  static constexpr int kSums = kDual ? 2 : 1;
  static constexpr int kGroupM = kPingPong ? kTileM : kTileM / kGroups;  // rows of one consumer warpgroup
  static constexpr int kMmaM = kGroupM / 64;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kReleases = 4 * (kPingPong ? 1 : kGroups) * kCluster;  // warps that let go of a stage

  static constexpr int kBytesX = kTileM * kRowBytes, kBytesW = kTileN * kRowBytes, kStageBytes = kBytesX + kBytesW;
  static constexpr int kPanels = kTileN / kDepth, kPanelBytes = kGroupM * kRowBytes;  // staging: panels of 64 channels
  static constexpr int kStaging = kStages * kStageBytes, kVectors = kStaging + kGroups * kPanels * kPanelBytes;
  static constexpr int kBarriers = kVectors + kGroups * (1 + kSums) * kTileN * 4;
  static constexpr int kShared = kBarriers + Ring<kStages>::kBytes + Turns::kBytes + 8 * kGroups;

  static constexpr int kBlocks = kGroups == 1 && 2 * (kShared + 1024) <= 228 * 1024 ? 2 : 1;  // a multiprocessor runs

  static_assert(kGroupM % 64 == 0 && kTileN % 64 == 0 && kTileN <= 256 && kStages >= 2 && kShared <= kMaxShared);
  static_assert(!kPingPong || kGroups == 2);
  static_assert(kMmaM * kTileN * kSums <= 256, "at most 128 accumulators a thread");
};

/// A tile of the output and the share of the depth to sum up.
struct ConvWork {
  int m0, n0, split, first_step, end_step;

  __device__ ConvWork(const ConvArgs& a, int index, int tile_m, int tile_n, int cluster, int rank) {
    n0 = index % a.tiles_n * tile_n;
    const int rest = index / a.tiles_n, clusters_m = (a.tiles_m + cluster - 1) / cluster;
    m0 = (rest % clusters_m * cluster + rank) * tile_m;
    split = rest / clusters_m;
    first_step = static_cast<int>(static_cast<int64_t>(a.main.steps) * split / a.splits);
    end_step = static_cast<int>(static_cast<int64_t>(a.main.steps) * (split + 1) / a.splits);
  }
};

/// One convolution of the sum: tensor maps and geometry.
struct ConvOperands {
  const CUtensorMap *x, *w;
  const ConvSource& source;
};

template <class T>
struct ConvProducer {
  const ConvArgs& a;
  uint32_t shared;
  int rank;
  Ring<T::kStages> ring;
  RingPosition<T::kStages> position;

  /// Fetches steps first..end of one convolution.
  __device__ void fetch(const ConvWork& work, const ConvOperands& o, int first, int end) {
    const ConvSource& s = o.source;
    const int image = work.m0 / (a.out_h * a.out_w);
    const int h = work.m0 / a.out_w % a.out_h * s.stride_h - s.pad_h, w = work.m0 % a.out_w * s.stride_w - s.pad_w;
    // Counted, not divided: two divisions a step would take this one thread longer than the products of a small tile.
    const int tap = first / s.channel_steps;
    int tap_h = tap / s.taps_w, tap_w = tap % s.taps_w, chunk = first % s.channel_steps;
    for (int step = first; step < end; step++, position.use++) {
      const int c = chunk * kDepth;
      const uint32_t stage = shared + position.stage() * T::kStageBytes, full = ring.full(position.stage());
      ring.acquire(position, T::kStageBytes);
      if (s.im2col) {
        ptx::tma_load_im2col(stage, o.x, full, c, w, h, image, tap_w * s.dilation_w, tap_h * s.dilation_h);
      } else {
        ptx::tma_load_2d(stage, o.x, full, c, work.m0);
      }
      if constexpr (T::kCluster == 1) {
        ptx::tma_load_4d(stage + T::kBytesX, o.w, full, c, tap_w, tap_h, work.n0);
      } else {
        constexpr int kShare = T::kTileN / T::kCluster;
        ptx::tma_load_multicast_4d(stage + T::kBytesX + rank * kShare * kRowBytes, o.w, full, (1 << T::kCluster) - 1, c,
                                   tap_w, tap_h, work.n0 + rank * kShare);
      }
      if (++chunk == s.channel_steps) {
        chunk = 0;
        if (++tap_w == s.taps_w) tap_w = 0, ++tap_h;
      }
    }
  }

  __device__ void run(const ConvOperands& main, const ConvOperands& projection) {
    const int items = conv_items(a, T::kCluster);
    for (int item = blockIdx.x / T::kCluster; item < items; item += gridDim.x / T::kCluster) {
      const ConvWork work(a, item, T::kTileM, T::kTileN, T::kCluster, rank);
      fetch(work, main, work.first_step, work.end_step);
      if constexpr (T::kDual) fetch(work, projection, 0, projection.source.steps);
    }
  }
};

template <class T>
struct ConvConsumer {
  using Element = typename T::Element;
  const CUtensorMap *map_residual, *map_out;
  const ConvArgs& a;
  uint32_t shared, staging, residual_full;
  float* vectors;  // in shared memory, kTileN each: scale, shift and projection_scale of the tile's channels
  int group, warp, lane;
  Ring<T::kStages> ring;
  using Sum = float[T::kMmaM][T::kTileN / 2];
  Sum sums[T::kSums];  // of the main convolution, and of the projection

  __device__ bool leader() const { return threadIdx.x % 128 == 0; }
  __device__ void group_sync() const { ptx::bar_sync(T::kGroups == 1 ? 1 : 1 + group, 128); }

  /// Frees the staging buffer, starts fetching the residual into it, and fetches scale and shift.
  __device__ void prefetch(const ConvWork& work) {
    if (leader()) {
      ptx::tma_store_wait<0>();
      if (a.residual) {
        ptx::mbar_expect_tx(residual_full, T::kPanels * T::kPanelBytes);
        for (int panel = 0; panel < T::kPanels; panel++)
          ptx::tma_load_2d(staging + panel * T::kPanelBytes, map_residual, residual_full, work.n0 + panel * kDepth,
                           row0(work));
      }
    }
    for (int i = threadIdx.x % 128; i < T::kTileN; i += 128) {
      const int k = work.n0 + i;
      const bool inside = k < a.channels_out;
      vectors[i] = inside && a.scale != nullptr ? a.scale[k] : 1.f;
      vectors[T::kTileN + i] = inside ? a.shift[k] : 0.f;
      if constexpr (T::kDual)
        vectors[2 * T::kTileN + i] = inside && a.projection_scale != nullptr ? a.projection_scale[k] : 1.f;
    }
  }

  __device__ int row0(const ConvWork& work) const { return work.m0 + (T::kPingPong ? 0 : group * T::kGroupM); }

  /// Sums up `steps` stages; `behind`: the products of the stage before are still on their way.
  __device__ void multiply(Sum& acc, int steps, RingPosition<T::kStages>& position, bool behind) {
    const uint64_t base = ptx::wg_desc<kRowBytes>(shared);
    for (int i = 0; i < steps; i++, position.use++) {
      ring.wait_full(position);
      const uint32_t stage = position.stage() * T::kStageBytes;
      const uint64_t x = base + (stage + (T::kPingPong ? 0 : group * T::kGroupM * kRowBytes)) / 16;
      const uint64_t w = base + (stage + T::kBytesX) / 16;
      ptx::wg_fence();
#pragma unroll
      for (int kk = 0; kk < kDepth / 16; kk++)
#pragma unroll
        for (int m = 0; m < T::kMmaM; m++)
          ptx::wgmma<Element>(acc[m], x + (m * 64 * kRowBytes + kk * 32) / 16, w + kk * 32 / 16, i != 0 || kk != 0);
      ptx::wg_commit();
      if (i != 0 || behind) {
        ptx::wg_wait<1>();  // the products of the stage before are done
        release(position.use - 1);
      }
    }
  }

  __device__ void release(uint32_t use) const {
    ring.template release<T::kCluster>(RingPosition<T::kStages>{use}.stage());
  }

  /// Float32 sums of this share of the depth, to partial[split][pixel][channel].
  __device__ void store_partial(const ConvWork& work) const {
    float* plane = a.partial + static_cast<int64_t>(work.split) * a.pixels * a.channels_out;
#pragma unroll
    for (int i = 0; i < T::kMmaM; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int m = row0(work) + i * 64 + warp * 16 + lane / 4 + half * 8;
        if (m >= a.pixels) continue;
#pragma unroll
        for (int nb = 0; nb < T::kTileN / 8; nb++) {
          const int k = work.n0 + nb * 8 + lane % 4 * 2;
          if (k >= a.channels_out) break;
          *reinterpret_cast<float2*>(plane + static_cast<int64_t>(m) * a.channels_out + k) =
              make_float2(sums[0][i][nb * 4 + half * 2], sums[0][i][nb * 4 + half * 2 + 1]);
        }
      }
  }

  __device__ void store_tile(const ConvWork& work, uint32_t residual_phase) {
    group_sync();  // scale and shift are there, the staging buffer is free
    if (a.residual) ptx::mbar_wait(residual_full, residual_phase);
#pragma unroll
    for (int i = 0; i < T::kMmaM; i++)
#pragma unroll
      for (int nb = 0; nb < T::kTileN / 8; nb += 2) {  // 16 rows x 16 channels of a warp: one stmatrix
        const int row = i * 64 + warp * 16 + lane % 16;
        const uint32_t address = staging + staging_offset<T>(row, nb + lane / 16);
        uint32_t r[4] = {};
        if (a.residual) ptx::ldmatrix_x4(r, address);
        uint32_t packed[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {  // 8x8 matrix j: rows j % 2 * 8.., channels j / 2 * 8..
          const int channel = (nb + j / 2) * 8 + lane % 4 * 2, e = (nb + j / 2) * 4 + j % 2 * 2;
          const float2 s = *reinterpret_cast<const float2*>(vectors + channel);
          const float2 b = *reinterpret_cast<const float2*>(vectors + T::kTileN + channel);
          float2 y = make_float2(sums[0][i][e] * s.x + b.x, sums[0][i][e + 1] * s.y + b.y);
          if constexpr (T::kDual) {
            const float2 d = *reinterpret_cast<const float2*>(vectors + 2 * T::kTileN + channel);
            y.x += sums[1][i][e] * d.x;
            y.y += sums[1][i][e + 1] * d.y;
          }
          if (a.residual) {
            const float2 side = unpack<Element>(r[j]);
            y.x += side.x;
            y.y += side.y;
          }
          packed[j] = a.relu ? ptx::pack_relu<Element>(y.x, y.y) : ptx::pack<Element>(y.x, y.y);
        }
        ptx::stmatrix_x4(address, packed[0], packed[1], packed[2], packed[3]);
      }
    ptx::fence_async();
    group_sync();
    if (leader()) {
      for (int panel = 0; panel < T::kPanels; panel++)
        ptx::tma_store_2d(map_out, staging + panel * T::kPanelBytes, work.n0 + panel * kDepth, row0(work));
      ptx::tma_store_commit();
    }
  }

  __device__ void run(int rank) {
    const Turns turns{ring.base + Ring<T::kStages>::kBytes};
    const int items = conv_items(a, T::kCluster);
    RingPosition<T::kStages> position;
    int it = 0;
    uint32_t tiles = 0;
    for (int item = blockIdx.x / T::kCluster; item < items; item += gridDim.x / T::kCluster, it++) {
      const ConvWork work(a, item, T::kTileM, T::kTileN, T::kCluster, rank);
      if (T::kPingPong && it % 2 != group) {
        position.use += work.end_step - work.first_step + a.projection.steps;
        continue;
      }
      if (a.splits == 1) prefetch(work);
      if (T::kPingPong) turns.wait(it);
      multiply(sums[0], work.end_step - work.first_step, position, false);
      if constexpr (T::kDual) multiply(sums[1], a.projection.steps, position, true);
      if (T::kPingPong) turns.pass_on(it);
      ptx::wg_wait<0>();
      release(position.use - 1);
      if (a.splits == 1) {
        store_tile(work, tiles++ & 1);
      } else {
        store_partial(work);
      }
    }
    if (leader()) ptx::tma_store_wait<0>();
  }
};

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    conv_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_w,
                const __grid_constant__ CUtensorMap map_projection_x,
                const __grid_constant__ CUtensorMap map_projection_w, const __grid_constant__ CUtensorMap map_residual,
                const __grid_constant__ CUtensorMap map_out, const __grid_constant__ ConvArgs args) {
  DYN_SMEM(smem);
  const uint32_t shared = ptx::smem_addr(smem);
  const Ring<T::kStages> ring{shared + T::kBarriers};
  const Turns turns{ring.base + Ring<T::kStages>::kBytes};
  const uint32_t residual_full = turns.base + Turns::kBytes;
  const int rank = T::kCluster == 1 ? 0 : ptx::cluster_rank();
  if (threadIdx.x == 0) {
    prefetch_maps(map_x, map_w, map_projection_x, map_projection_w, map_residual, map_out);
    ring.init(T::kReleases);
    turns.init(4);
    for (int g = 0; g < T::kGroups; g++) ptx::mbar_init(residual_full + 8 * g, 1);
    ptx::fence_init();
  }
  take_turn();
  if constexpr (T::kCluster == 1) {
    __syncthreads();
  } else {
    ptx::cluster_sync();
  }
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // uniform, and the compiler knows it
  if (group == T::kGroups) {
    if constexpr (T::kGroups == 2) ptx::reg_dec<kProducerRegisters>();
    if (threadIdx.x == T::kGroups * 128)
      ConvProducer<T>{args, shared, rank, ring, {}}.run({&map_x, &map_w, args.main},
                                                        {&map_projection_x, &map_projection_w, args.projection});
  } else {
    if constexpr (T::kGroups == 2) ptx::reg_inc<kConsumerRegisters>();
    float* vectors = reinterpret_cast<float*>(smem + T::kVectors) + group * (1 + T::kSums) * T::kTileN;
    ConvConsumer<T> consumer{&map_residual,
                             &map_out,
                             args,
                             shared,
                             shared + T::kStaging + group * T::kPanels * T::kPanelBytes,
                             residual_full + 8 * group,
                             vectors,
                             group,
                             static_cast<int>(threadIdx.x % 128 / 32),
                             static_cast<int>(threadIdx.x % 32),
                             ring};
    consumer.run(rank);
  }
  if constexpr (T::kCluster > 1) {
    __syncwarp();  // one lane of the producer warp comes from its loop, and the cluster's barrier is for whole warps
    ptx::cluster_sync();  // a block that is gone can be neither written to nor signalled
  }
}

}  // namespace resnet_fused::cuda::sm90
