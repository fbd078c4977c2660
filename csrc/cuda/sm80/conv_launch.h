// Host side of conv.h: what a compiled size takes, how long it should take, how it is started, its entry in the table.
#pragma once
#include <algorithm>
#include <string>

#include "cuda/launch.h"
#include "cuda/sm80/conv.h"
#include "cuda/sm80/split_k.h"
#include "cuda/sm80/table.h"

namespace resnet_fused::cuda::sm80 {

constexpr int kMaxSplits = 32;

inline int64_t conv_rows(const ConvParams& p) { return static_cast<int64_t>(p.n) * p.p * p.q; }

template <class Tile, ConvKind kKind>
const char* conv_unsupported(const ConvParams& p) {
  constexpr int kStep = kChunk<typename Tile::T>;
  if ((p.in_scale != nullptr) != (kKind == ConvKind::kPreActivated))
    return kKind == ConvKind::kPreActivated ? "it is compiled for an activated input"
                                            : "it does not activate its input";
  if ((p.projection.x != nullptr) != (kKind == ConvKind::kDual))
    return kKind == ConvKind::kDual ? "it is compiled for a projection" : "it has no projection";
  if (p.c % kStep != 0 || p.k % kStep != 0 || (kKind == ConvKind::kDual && p.projection.c % kStep != 0))
    return channels_reason<typename Tile::T>();
  if (conv_rows(p) > kMaxRows) return "it counts output pixels in 31 bits";
  return nullptr;
}

// Microseconds, with the depth of every result split over `splits` blocks.
template <class Tile>
float conv_estimate(const ConvParams& p, const Device& device, int splits) {
  const int64_t rows = conv_rows(p);
  const int64_t blocks = (rows + Tile::kM - 1) / Tile::kM * ceil_div(p.k, Tile::kN) * splits;
  const int steps = ceil_div(p.r * p.s * p.c, Tile::kDepth), second_steps = ceil_div(p.projection.c, Tile::kDepth);
  const BlockCost cost{2.f * Tile::kM * Tile::kN * Tile::kDepth * (ceil_div(steps, splits) + second_steps),
                       static_cast<float>(Tile::kM + Tile::kN) / (Tile::kM * Tile::kN)};
  constexpr float kSize = sizeof(typename Tile::T);
  const float images = static_cast<float>(p.n) * p.h * p.w * p.c +
                       static_cast<float>(rows) * p.k * (p.residual ? 2 : 1) +
                       static_cast<float>(p.n) * p.projection.h * p.projection.w * p.projection.c;
  const float weights = static_cast<float>(p.k) * (p.r * p.s * p.c + p.projection.c);
  float us = kernel_microseconds<typename Tile::T>(blocks, cost, kSize * (images + weights), device);
  if (splits > 1)
    us += kLaunchMicroseconds + 4.f * (2 * splits + 1) * static_cast<float>(rows) * p.k / kCacheBytesPerMicrosecond;
  return us;
}

// Into how many parts the depth is split: at least 2; 1 if it has a single step.
template <class Tile>
int conv_splits(const ConvParams& p, const Device& device) {
  const int steps = ceil_div(p.r * p.s * p.c, Tile::kDepth);
  int best = std::min(2, steps);
  for (int splits = 3; splits <= std::min(steps, kMaxSplits); ++splits)
    if (conv_estimate<Tile>(p, device, splits) < conv_estimate<Tile>(p, device, best)) best = splits;
  return ceil_div(steps, ceil_div(steps, best));  // no block without a step
}

template <class Tile, ConvKind kKind, bool kSplit>
struct ConvEntry {
  using T = typename Tile::T;

  static int splits(const ConvParams& p, const Device& device) { return kSplit ? conv_splits<Tile>(p, device) : 1; }
  static const char* unsupported(const ConvParams& p) { return conv_unsupported<Tile, kKind>(p); }
  static float estimate(const ConvParams& p, const Device& device) {
    return conv_estimate<Tile>(p, device, splits(p, device));
  }
  static int64_t workspace_bytes(const ConvParams& p, const Device& device) {
    const int count = splits(p, device);
    return count == 1 ? 0 : 4 * count * conv_rows(p) * p.k;
  }
  static void launch(const ConvParams& p, const Device& device, void* workspace, cudaStream_t stream) {
    const int64_t rows = conv_rows(p);
    if (rows == 0) return;
    const int count = splits(p, device);
    const auto tiles = static_cast<unsigned>(ceil_div(static_cast<int>(rows), Tile::kM) * ceil_div(p.k, Tile::kN));
    float* sums = static_cast<float*>(workspace);
    cuda::launch(conv_kernel<Tile, kKind>,
                 LaunchShape{dim3(tiles, static_cast<unsigned>(count)), Tile::kThreads, kConvSharedBytes<Tile>}, stream,
                 p, count, sums);
    if (count == 1) return;
    const int64_t chunks = rows * (p.k / kChunk<T>);
    cuda::launch(
        conv_reduce_kernel<T>,
        LaunchShape{dim3(static_cast<unsigned>((chunks + kReduceThreads - 1) / kReduceThreads)), kReduceThreads},
        stream, p, count, sums);
  }
};

// The table's entry of a size.
template <class Tile, ConvKind kKind = ConvKind::kPlain, bool kSplit = false>
Kernel<ConvParams> conv() {
  using T = typename Tile::T;
  using Entry = ConvEntry<Tile, kKind, kSplit>;
  static const std::string name = std::string("conv80_") + type_name<T>() + "_" + std::to_string(Tile::kM) + "x" +
                                  std::to_string(Tile::kN) + "x" + std::to_string(Tile::kDepth) + "_s" +
                                  std::to_string(Tile::kStages) +
                                  (kKind == ConvKind::kPreActivated ? "_activated"
                                   : kKind == ConvKind::kDual       ? "_dual"
                                                                    : "") +
                                  (kSplit ? "_split" : "");
  const char* algorithm = kSplit ? "split_k" : kKind == ConvKind::kDual ? "dual" : "implicit_gemm";
  return entry<Entry, ConvParams, T>(name.c_str(), algorithm, {Tile::kM, Tile::kN, Tile::kDepth, Tile::kStages},
                                     Tile::kThreads, kConvSharedBytes<Tile>, conv_kernel<Tile, kKind>);
}

// The sizes that are compiled. Results per block, warps, bytes of depth a step, stages. 64-byte steps leave
// shared memory for two blocks a multiprocessor; of Square only bf16 and fp16 without activation have the registers for
// it, and held to 128 the others spill 4 to 28 bytes.
template <class T>
struct ConvSizes {
  using Large = GemmTile<T, 256, 128, 4, 2, 64, 3>;   // warp tile 64 x 64: least shared-memory traffic
  using Square = GemmTile<T, 128, 128, 2, 4, 64, 4>;  // 64 x 32
  using Tall = GemmTile<T, 128, 64, 2, 2, 64, 4>;     // 64 x 32
  using Wide = GemmTile<T, 64, 128, 2, 2, 64, 4>;     // 32 x 64
  using Small = GemmTile<T, 64, 64, 2, 2, 128, 3>;    // 32 x 32
};

template <class T>
struct ConvInstances {
  using Sizes = ConvSizes<T>;
  Registered<ConvParams> large{conv<typename Sizes::Large>()};
  Registered<ConvParams> square{conv<typename Sizes::Square>()};
  Registered<ConvParams> tall{conv<typename Sizes::Tall>()};
  Registered<ConvParams> wide{conv<typename Sizes::Wide>()};
  Registered<ConvParams> small{conv<typename Sizes::Small>()};
  Registered<ConvParams> square_split{conv<typename Sizes::Square, ConvKind::kPlain, true>()};
  Registered<ConvParams> small_split{conv<typename Sizes::Small, ConvKind::kPlain, true>()};
  Registered<ConvParams> square_activated{conv<typename Sizes::Square, ConvKind::kPreActivated>()};
  Registered<ConvParams> tall_activated{conv<typename Sizes::Tall, ConvKind::kPreActivated>()};
  Registered<ConvParams> small_activated{conv<typename Sizes::Small, ConvKind::kPreActivated>()};
  Registered<ConvParams> small_activated_split{conv<typename Sizes::Small, ConvKind::kPreActivated, true>()};
  Registered<ConvParams> tall_dual{conv<typename Sizes::Tall, ConvKind::kDual>()};
  Registered<ConvParams> small_dual{conv<typename Sizes::Small, ConvKind::kDual>()};
};

}  // namespace resnet_fused::cuda::sm80
