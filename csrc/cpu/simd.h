// One vector of float32, as wide as the compiler's flags allow, on GNU vector extensions; the few operations that
// the language has no operator for are written per instruction set. Included by kernels_impl.h only.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define RF_INLINE __attribute__((always_inline)) inline

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));
typedef float VecUnaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t VecHUnaligned __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

RF_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
RF_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }
RF_INLINE Vec splat(float v) { return Vec{} + v; }

RF_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// The larger one. Keeps a NaN of v, as torch's ReLU does: of an unordered pair the instructions return the second
// operand.
RF_INLINE Vec at_least(Vec floor, Vec v) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, floor, v);  // _mm512_max_ps: GCC 12 warns of its header
#elif defined(__AVX2__)
  return _mm256_max_ps(floor, v);
#else
  return v < floor ? floor : v;
#endif
}
RF_INLINE Vec relu(Vec v) { return at_least(Vec{}, v); }

RF_INLINE Vec widen(VecH v) {
#if defined(__AVX512F__)  // GCC 12 makes five instructions of the conversion
  VecU words = (VecU)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#else
  VecU words = __builtin_convertvector(v, VecU);
#endif
  return reinterpret_cast<Vec>(words << 16);
}
RF_INLINE Vec load_bf16(const uint16_t* p) { return widen(*reinterpret_cast<const VecHUnaligned*>(p)); }

// Round to nearest even; a NaN stays a NaN (the plain addition could carry it into infinity).
RF_INLINE VecH to_bf16(Vec v) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<VecH>(_mm512_cvtneps_pbh(v));
#else
  VecU bits = reinterpret_cast<VecU>(v);
  VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  VecU quiet = (bits >> 16) | 0x40u;
  VecI is_nan = v != v;
  VecU chosen = is_nan ? quiet : rounded;
  return __builtin_convertvector(chosen, VecH);
#endif
}
RF_INLINE void store_bf16(uint16_t* p, Vec v) { *reinterpret_cast<VecHUnaligned*>(p) = to_bf16(v); }

RF_INLINE void stream(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#else
  store(p, v);
#endif
}

RF_INLINE void store_bf16_pair(uint16_t* p, Vec low, Vec high) {
#if defined(__AVX512BF16__)
  const auto pair = _mm512_cvtne2ps_pbh(high, low);
  std::memcpy(p, &pair, sizeof pair);
#else
  store_bf16(p, low);
  store_bf16(p + kLanes, high);
#endif
}

RF_INLINE void stream_bf16_pair(uint16_t* p, Vec low, Vec high) {
#if defined(__AVX512BF16__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)_mm512_cvtne2ps_pbh(high, low));
#else
  store_bf16_pair(p, low, high);
#endif
}

// The sums of the lanes of four vectors.
RF_INLINE void sums_of(const Vec (&v)[4], float (&sums)[4]) {
#if defined(__x86_64__)
  __m128 s[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    // Not _mm512_castps512_ps256: GCC 12 warns of its header.
    const __m256 half = _mm256_add_ps(_mm512_extractf32x8_ps(v[i], 0), _mm512_extractf32x8_ps(v[i], 1));
    s[i] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
    s[i] = _mm_add_ps(_mm256_castps256_ps128(v[i]), _mm256_extractf128_ps(v[i], 1));
#else
    s[i] = v[i];
#endif
  }
  _MM_TRANSPOSE4_PS(s[0], s[1], s[2], s[3]);
  _mm_storeu_ps(sums, _mm_add_ps(_mm_add_ps(s[0], s[2]), _mm_add_ps(s[1], s[3])));
#else
  for (int i = 0; i < 4; ++i) {
    sums[i] = 0;
    for (int lane = 0; lane < kLanes; ++lane) sums[i] += v[i][lane];
  }
#endif
}

// The larger of two; a NaN on either side wins.
RF_INLINE Vec max_nan(Vec m, Vec v) {
  VecI take = (v > m) | (v != v);
  return take ? v : m;
}

}  // namespace
