// What depends on the element type: how an operand is prepared, and sixteen-byte chunks to and from float32.
//
// All three types share one byte layout: a 16-byte chunk is 8 bfloat16 or half or 4 float32, `ldmatrix` hands a lane
// the four bytes at 4 * (lane % 4) of a chunk, and one matrix instruction multiplies 32 bytes of depth (16 or 8
// elements). Only the instruction's name differs.
#pragma once
#include <cstdint>

#include "cuda/ptx.h"

namespace resnet_fused::cuda::sm80 {

constexpr int kChunkBytes = 16;  // what one cp.async, one ldmatrix row and one global access move

template <class T>
constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));  // elements of a chunk

template <class T>
struct Element;

template <>
struct Element<__nv_bfloat16> {
  __device__ static uint32_t operand(uint32_t bits) { return bits; }
  __device__ static float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
  __device__ static __nv_bfloat16 round(float v) { return __float2bfloat16(v); }
};

template <>
struct Element<__half> {
  __device__ static uint32_t operand(uint32_t bits) { return bits; }
  __device__ static float to_float(__half v) { return __half2float(v); }
  __device__ static __half round(float v) { return __float2half(v); }
};

template <>
struct Element<float> {
  // The matrix instruction drops the low 13 bits; rounding them first halves the error and takes away its bias.
  __device__ static uint32_t operand(uint32_t bits) { return ptx::to_tf32(bits); }
  __device__ static float to_float(float v) { return v; }
  __device__ static float round(float v) { return v; }
};

// Sixteen bytes of elements, read and written in one access.
template <class T>
union Chunk {
  uint4 bits;
  T element[kChunk<T>];

  __device__ Chunk() {}
  __device__ static Chunk zero() {
    Chunk chunk;
    chunk.bits = {0, 0, 0, 0};
    return chunk;
  }
  __device__ static Chunk load(const void* from) {
    Chunk chunk;
    chunk.bits = *static_cast<const uint4*>(from);
    return chunk;
  }
  __device__ void store_shared(void* to) const { *static_cast<uint4*>(to) = bits; }
  __device__ void store_global(void* to) const { ptx::stg128(to, bits); }
};

// Two neighbouring elements of a row: what a lane holds of one row of an accumulator fragment.
template <class T>
__device__ void store_pair(void* to, float first, float second) {
  struct alignas(2 * sizeof(T)) Pair {
    T first, second;
  };
  *static_cast<Pair*>(to) = {Element<T>::round(first), Element<T>::round(second)};
}

}  // namespace resnet_fused::cuda::sm80
