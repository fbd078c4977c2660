// Whole bottleneck of mid width 64 and 256 output channels (ResNet's stage 1, stride 1) in one launch for sm_90a.
//
//   h1 = relu(W1 x * s1 + b1)   h2 = relu(W2 (*) h1 * s2 + b2)   y = relu(W3 h2 * s3 + b3 + shortcut)
//   identity: shortcut = x (256 channels); projection: shortcut = Wd x * sd + bd (x has 64 channels)
//
// Persistent blocks of one TMA producer thread and two consumer warpgroups; all weights stay in shared memory. Each
// group has 8x8 output tiles of its own (56 = 7 * 8 leaves no waste) and computes h1 on the 10x10 halo: 1.56 times
// conv1's products, 14% of the block's. x halo tiles stream through one ring of slices of 64 channels; h1 lives in
// shared memory, h2 and the shortcut in registers, so that x is read from memory once and y written once.
//   GEMM 1, transposed: 64 mid channels x 104 halo pixels; stmatrix.trans turns h1 round on its way to shared memory.
//   GEMM 2, 3x3: h1 as 8 planes of [halo pixel][8 channels] under unswizzled descriptors, where a tap is a start
//   address and a
//     group of 8 rows is 8 pixels of a halo row.
//   GEMM 3: the accumulator layout of h2 is the layout of a wgmma A operand. W3's rows are permuted by its tensor map
//   such that
//     a thread owns 8 neighbouring channels of every 32 and stores 16 bytes at a time.
// Not yet run on a GPU; what only one can show: that unswizzled descriptors may start at any multiple of 16 bytes.
#pragma once
#include "cuda/sm90/bottleneck64_geometry.h"
#include "cuda/sm90/pipeline.h"

namespace resnet_fused::cuda::sm90 {

template <class Element_, bool kProjection_>
struct Bottleneck64Traits : Bottleneck64Layout<kProjection_> {
  using Element = Element_;
  using Layout = Bottleneck64Layout<kProjection_>;
  static constexpr int kPassN = 64;  // output channels of a pass of GEMM 3: 128 spill, beside the shortcut
};

template <class T>
struct Bottleneck64Consumer {
  using Element = typename T::Element;
  static constexpr int kTile = T::kTile, kHalo = T::kHalo;
  const Bottleneck64Args& a;
  const unsigned char* smem;
  uint32_t base, h1;
  int group, warp, lane;
  Ring<T::kStages> ring;
  // What GEMM 1 keeps of x: the tile's own pixels as the shortcut, or as A operands of the projection.
  uint4 shortcut[T::kProjection ? 1 : 16];
  uint32_t centre[T::kProjection ? 4 : 1][4];

  __device__ void group_sync() const { ptx::bar_sync(1 + group, 128); }
  __device__ const float* vector(int index) const {
    return reinterpret_cast<const float*>(smem + T::vector_offset(index));
  }
  __device__ uint64_t weights(int offset, int kk) const {
    return ptx::wg_desc<kRowBytes>(base) + (offset + kk * 32) / 16;
  }

  __device__ void keep_shortcut(uint32_t slice, int k) {
    if constexpr (T::kProjection) {
      const int p = (2 * warp + (lane >> 3 & 1) + 1) * kHalo + lane % 8 + 1;
#pragma unroll
      for (int kk = 0; kk < 4; kk++)
        ptx::ldmatrix_x4(centre[kk], slice + p * kRowBytes + (((kk * 2 + (lane >> 4)) ^ (p & 7)) << 4));
    } else {
      const int g = lane / 4, t = lane % 4;
#pragma unroll
      for (int r = 0; r < 2;
           r++) {  // 8 channels at a time; the halves of 64 swapped on some rows to spread over the banks
        const int p = (2 * warp + r + 1) * kHalo + g + 1, swapped = (g ^ (p >> 2)) & 1;
        const uint4 u = ptx::lds128(slice + p * kRowBytes + (((swapped * 4 + t) ^ (p & 7)) << 4));
        const uint4 v = ptx::lds128(slice + p * kRowBytes + ((((swapped ^ 1) * 4 + t) ^ (p & 7)) << 4));
        shortcut[(k * 2) * 2 + r] = swapped ? v : u;
        shortcut[(k * 2 + 1) * 2 + r] = swapped ? u : v;
      }
    }
  }

  /// h1 on the halo, in shared memory; zero outside of the image, where relu(b1) would be.
  __device__ void first(const Bottleneck64Tile& tile, RingPosition<T::kStages> position, const Turns& turns, int it) {
    float acc[52];  // 64 channels x 104 pixels; the last 4 columns are what lies behind the slice, and are dropped
#pragma unroll
    for (int k = 0; k < T::kSlices; k++, position.use++) {
      const int offset = T::kRing + position.stage() * T::kSlot;
      ring.wait_full(position);
      if (k == T::kSlices - 1) turns.pass_on(it);
      ptx::wg_fence();
#pragma unroll
      for (int kk = 0; kk < 4; kk++)
        ptx::wgmma<Element>(acc, weights(T::kW1 + k * kMatrixBytes, kk), weights(offset, kk), (k | kk) != 0);
      ptx::wg_commit();
      keep_shortcut(base + offset, k);
      if (k > 0) {
        ptx::wg_wait<1>();
        ring.release(RingPosition<T::kStages>{position.use - 1}.stage());
      }
    }
    ptx::wg_wait<0>();
    ring.release(RingPosition<T::kStages>{position.use - 1}.stage());
    group_sync();  // every warp is past GEMM 2 of the tile before, which reads h1

    const int g = lane / 4, t = lane % 4, channel = warp * 16 + g;
    const float s[2] = {*vector(T::kS1 + channel), *vector(T::kS1 + channel + 8)};
    const float b[2] = {*vector(T::kB1 + channel), *vector(T::kB1 + channel + 8)};
    uint32_t v[26];
#pragma unroll
    for (int i = 0; i < 26; i++)
      v[i] = ptx::pack_relu<Element>(acc[2 * i] * s[i & 1] + b[i & 1], acc[2 * i + 1] * s[i & 1] + b[i & 1]);
    const uint32_t plane = h1 + (2 * warp + (lane >> 3 & 1)) * T::kPlane + ((lane >> 4) * 8 + lane % 8) * 16;
#pragma unroll
    for (int nb = 0; nb < 12; nb += 2)
      ptx::stmatrix_x4_t(plane + nb * 128, v[2 * nb], v[2 * nb + 1], v[2 * nb + 2], v[2 * nb + 3]);
    if (t < 2) {  // pixels 96 to 99
      const uint32_t last = h1 + 2 * warp * T::kPlane + (96 + 2 * t) * 16 + 2 * g;
      ptx::sts16(last, v[24]);
      ptx::sts16(last + 16, v[24] >> 16);
      ptx::sts16(last + T::kPlane, v[25]);
      ptx::sts16(last + T::kPlane + 16, v[25] >> 16);
    }
    if (tile.h == 0 || tile.w == 0 || tile.h + kTile >= a.height || tile.w + kTile >= a.width) {
      group_sync();
      const int p = threadIdx.x % 128, h = tile.h - 1 + p / kHalo, w = tile.w - 1 + p % kHalo;
      if (p < kHalo * kHalo && !(static_cast<unsigned>(h) < static_cast<unsigned>(a.height) &&
                                 static_cast<unsigned>(w) < static_cast<unsigned>(a.width)))
#pragma unroll
        for (int nb = 0; nb < 8; nb++) ptx::sts128(h1 + nb * T::kPlane + p * 16, make_uint4(0, 0, 0, 0));
    }
    ptx::fence_async();
    group_sync();
  }

  /// h2 of the tile: wgmma A operands of GEMM 3.
  __device__ void second(uint32_t (&h2)[4][4]) const {
    float acc[32];
    const uint64_t pixels = ptx::wg_desc_ns(h1, T::kPlane, kHalo * 16);
    ptx::wg_fence();
#pragma unroll
    for (int tap = 0; tap < 9; tap++)
#pragma unroll
      for (int kk = 0; kk < 4; kk++)
        ptx::wgmma<Element>(acc, pixels + (tap / 3 * kHalo + tap % 3) + kk * 2 * T::kPlane / 16,
                            weights(T::kW2 + tap * kMatrixBytes, kk), (tap | kk) != 0);
    ptx::wg_commit();
    ptx::wg_wait<0>();
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int nb = kk * 2 + i / 2, r = i % 2, channel = nb * 8 + lane % 4 * 2;
        const float2 s = *reinterpret_cast<const float2*>(vector(T::kS2 + channel));
        const float2 b = *reinterpret_cast<const float2*>(vector(T::kB2 + channel));
        h2[kk][i] = ptx::pack_relu<Element>(acc[nb * 4 + r * 2] * s.x + b.x, acc[nb * 4 + r * 2 + 1] * s.y + b.y);
      }
  }

  /// 8 output channels from `channel` on of one pixel: which = 0, 1 the pixel's row in the warp's pair, `block` of 32
  /// channels.
  __device__ uint4 finish(const float* acc, const float* projected, int channel, int which, const uint4& x) const {
    const uint32_t side[4] = {x.x, x.y, x.z, x.w};
    uint32_t y[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float2 s = *reinterpret_cast<const float2*>(vector(T::kS3 + channel + 2 * e));
      const float2 b = *reinterpret_cast<const float2*>(vector(T::kB3 + channel + 2 * e));
      float2 v = make_float2(acc[e * 4 + which * 2] * s.x + b.x, acc[e * 4 + which * 2 + 1] * s.y + b.y);
      if constexpr (T::kProjection) {
        const float2 sd = *reinterpret_cast<const float2*>(vector(T::kSd + channel + 2 * e));
        v.x += projected[e * 4 + which * 2] * sd.x;
        v.y += projected[e * 4 + which * 2 + 1] * sd.y;
      } else {
        const float2 shortcut_value = unpack<Element>(side[e]);
        v.x += shortcut_value.x;
        v.y += shortcut_value.y;
      }
      y[e] = ptx::pack_relu<Element>(v.x, v.y);
    }
    return make_uint4(y[0], y[1], y[2], y[3]);
  }

  __device__ void third(const Bottleneck64Tile& tile, const uint32_t (&h2)[4][4]) const {
    constexpr int kPasses = T::kOut / T::kPassN, kBlocks = T::kPassN / 32;
    const int g = lane / 4, t = lane % 4, w = tile.w + g;
    Element* y = static_cast<Element*>(a.y);
#pragma unroll
    for (int pass = 0; pass < kPasses; pass++) {
      float acc[T::kPassN / 2], projected[T::kProjection ? T::kPassN / 2 : 16];
      ptx::wg_fence();
#pragma unroll
      for (int kk = 0; kk < 4; kk++)
        ptx::wgmma<Element>(acc, h2[kk], weights(T::kW3 + pass * T::kPassN * kRowBytes, kk), kk != 0);
      if constexpr (T::kProjection)
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
          ptx::wgmma<Element>(projected, centre[kk], weights(T::kWd + pass * T::kPassN * kRowBytes, kk), kk != 0);
      ptx::wg_commit();
      ptx::wg_wait<0>();
#pragma unroll
      for (int block = 0; block < kBlocks; block++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int h = tile.h + 2 * warp + r, channel = pass * T::kPassN + block * 32 + t * 8;
          const uint4 v = finish(acc + block * 16, projected + (T::kProjection ? block * 16 : 0), channel, r,
                                 shortcut[T::kProjection ? 0 : (pass * kBlocks + block) * 2 + r]);
          if (h < a.height && w < a.width)
            *reinterpret_cast<uint4*>(y + ((static_cast<int64_t>(tile.n) * a.height + h) * a.width + w) * a.pitch_y +
                                      channel) = v;
        }
    }
  }

  __device__ void run() {
    const Turns turns{ring.base + Ring<T::kStages>::kBytes};
    const uint32_t weights_full = turns.base + Turns::kBytes;
    int it = group;
    for (int index = blockIdx.x + group * gridDim.x; index < a.tiles(); index += 2 * gridDim.x, it += 2) {
      const Bottleneck64Tile tile(a, index);
      if (it < 2) ptx::mbar_wait(weights_full, 0);
      turns.wait(it);
      first(tile, {static_cast<uint32_t>(it) * T::kSlices}, turns, it);
      if (it < 2) ptx::mbar_wait(weights_full + 8, 0);
      uint32_t h2[4][4];
      second(h2);
      third(tile, h2);
    }
  }
};

template <class T>
__device__ void bottleneck64_producer(const CUtensorMap* map_x, const CUtensorMap* map_w1, const CUtensorMap* map_w2,
                                      const CUtensorMap* map_w3, const CUtensorMap* map_wd, const Bottleneck64Args& a,
                                      uint32_t base) {
  const Ring<T::kStages> ring{base + T::kBarriers};
  const uint32_t weights_full = ring.base + Ring<T::kStages>::kBytes + Turns::kBytes;
  if (static_cast<int>(blockIdx.x) >= a.tiles()) return;
  ptx::mbar_expect_tx(weights_full, T::kW2 - T::kW1);
  for (int k = 0; k < T::kSlices; k++)
    ptx::tma_load_2d(base + T::kW1 + k * kMatrixBytes, map_w1, weights_full, k * 64, 0);
  RingPosition<T::kStages> position;
  for (int index = blockIdx.x; index < a.tiles(); index += gridDim.x) {
    const Bottleneck64Tile tile(a, index);
    for (int k = 0; k < T::kSlices; k++, position.use++) {
      ring.acquire(position, T::kSliceBytes);
      ptx::tma_load_4d(base + T::kRing + position.stage() * T::kSlot, map_x, ring.full(position.stage()), k * 64,
                       tile.w - 1, tile.h - 1, tile.n);
    }
    if (index == static_cast<int>(blockIdx.x)) {  // the other weights queue behind the first tile
      ptx::mbar_expect_tx(weights_full + 8, T::kRing - T::kW2);
      for (int tap = 0; tap < 9; tap++)
        ptx::tma_load_2d(base + T::kW2 + tap * kMatrixBytes, map_w2, weights_full + 8, tap * 64, 0);
      for (int i = 0; i < T::kOut / 64; i++) {
        ptx::tma_load_5d(base + T::kW3 + i * kMatrixBytes, map_w3, weights_full + 8, 0, 0, 0, 0, 2 * i);
        if constexpr (T::kProjection)
          ptx::tma_load_5d(base + T::kWd + i * kMatrixBytes, map_wd, weights_full + 8, 0, 0, 0, 0, 2 * i);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    bottleneck64_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_w1,
                        const __grid_constant__ CUtensorMap map_w2, const __grid_constant__ CUtensorMap map_w3,
                        const __grid_constant__ CUtensorMap map_wd, const __grid_constant__ Bottleneck64Args args) {
  DYN_SMEM(smem);
  const uint32_t base = ptx::smem_addr(smem);
  const Ring<T::kStages> ring{base + T::kBarriers};
  const Turns turns{ring.base + Ring<T::kStages>::kBytes};
  const uint32_t weights_full = turns.base + Turns::kBytes;
  if (threadIdx.x == 0) {
    prefetch_maps(map_x, map_w1, map_w2, map_w3, map_wd);
    ring.init(4);
    turns.init(4);
    ptx::mbar_init(weights_full, 1);
    ptx::mbar_init(weights_full + 8, 1);
    ptx::fence_init();
  }
  take_turn();
  for (int i = threadIdx.x; i < T::kVectors; i += T::kThreads)
    *reinterpret_cast<float*>(smem + T::vector_offset(i)) = bottleneck64_vector<T>(args, i);
  __syncthreads();
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // uniform, and the compiler knows it
  if (group == 2) {
    ptx::reg_dec<kProducerRegisters>();
    if (threadIdx.x == 256) bottleneck64_producer<T>(&map_x, &map_w1, &map_w2, &map_w3, &map_wd, args, base);
  } else {
    ptx::reg_inc<kConsumerRegisters>();
    Bottleneck64Consumer<T> consumer{args,
                                     smem,
                                     base,
                                     base + T::kH1 + group * T::kH1Bytes,
                                     group,
                                     static_cast<int>(threadIdx.x % 128 / 32),
                                     static_cast<int>(threadIdx.x % 32),
                                     ring};
    consumer.run();
  }
}

}  // namespace resnet_fused::cuda::sm90
