// What the entries of all sm_80 kernels share: names of types, and a coarse model of time that orders the sizes of one
// problem. Its constants are an A100's published figures; it has not been fitted to measurements.
#pragma once
#include "cuda/api.h"
#include "cuda/sm80/element.h"

namespace resnet_fused::cuda::sm80 {

constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1024;  // of a GEMM: output pixels, with room for a tile past the last

constexpr float kLaunchMicroseconds = 2.f;
constexpr float kBlockMicroseconds = 0.7f;         // to fill and drain a block's pipeline
constexpr float kBytesPerMicrosecond = 1.5e6f;     // of device memory
constexpr float kCacheBytesPerMicrosecond = 4e6f;  // of L2

template <class T>
constexpr DType dtype_of() {
  return sizeof(T) == 4 ? DType::kF32 : std::is_same_v<T, __half> ? DType::kF16 : DType::kBf16;
}
template <class T>
constexpr const char* type_name() {
  return sizeof(T) == 4 ? "tf32" : std::is_same_v<T, __half> ? "fp16" : "bf16";
}
template <class T>
constexpr const char* channels_reason() {
  return sizeof(T) == 4 ? "it needs channels in multiples of 4" : "it needs channels in multiples of 8";
}

struct BlockCost {
  float flops;
  float bytes_per_product;  // of shared memory, relative: (m + n) / (m * n) of the tile
};

// Time of one kernel: the busiest multiprocessor's blocks, or the bytes it moves.
template <class T>
float kernel_microseconds(int64_t blocks, const BlockCost& block, float bytes, const Device& device) {
  constexpr float kFlopsPerMicrosecond = sizeof(T) == 4 ? 1.44e6f : 2.89e6f;  // of a multiprocessor
  // A 128x128 tile (1/64) reaches about 0.8 of the peak, a 64x64 tile (1/32) about 0.65.
  const float efficiency = 1.f / (1.f + 16.f * block.bytes_per_product);
  const int multiprocessors = device.multiprocessors > 0 ? device.multiprocessors : 1;
  const auto turns = static_cast<float>((blocks + multiprocessors - 1) / multiprocessors);
  const float compute = turns * (block.flops / (kFlopsPerMicrosecond * efficiency) + kBlockMicroseconds / 2);
  const float memory = bytes / kBytesPerMicrosecond;
  return kLaunchMicroseconds + kBlockMicroseconds + (compute > memory ? compute : memory);
}

struct TileSize {
  int m, n, k, stages;
};

// An entry of the table. Entry holds its functions.
template <class Entry, class Params, class T, class Function>
Kernel<Params> entry(const char* name, const char* algorithm, const TileSize& tile, int threads, int shared_bytes,
                     Function* function) {
  return {name,
          algorithm,
          80,
          dtype_of<T>(),
          tile.m,
          tile.n,
          tile.k,
          tile.stages,
          threads,
          shared_bytes,
          reinterpret_cast<const void*>(function),
          Entry::unsupported,
          Entry::estimate,
          Entry::workspace_bytes,
          Entry::launch};
}

}  // namespace resnet_fused::cuda::sm80
