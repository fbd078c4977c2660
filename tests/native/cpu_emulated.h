// Included before every source of csrc/cpu (RESNET_FUSED_EMULATED_CPU): the processor is what the environment variable
// RESNET_FUSED_TEST_CPU names, "zen4" or "sapphire_rapids", if it is set, and AMX's tiles are computed in C++. So the
// kernels and choices of either run on the other, where AddressSanitizer also sees what tile loads and stores touch.
// AVX-512, and for AMX and bfloat16 AVX-512 BF16, are this machine's own.
//
// Tiles as in Intel's "Architecture Instruction Set Extensions Programming Reference", chapter 3: where the processor
// would raise an exception, the process ends with the reason.
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {
namespace {

// Whether the processor is the one of that name, by the environment; -1: the environment does not say.
inline int is_cpu(const char* name) {
  const char* const wanted = std::getenv("RESNET_FUSED_TEST_CPU");
  return wanted && *wanted ? !std::strcmp(wanted, name) : -1;
}

inline bool cpu_is(const char* vendor, bool real) {
  const int answer = is_cpu(std::strcmp(vendor, "intel") ? "zen4" : "sapphire_rapids");
  return answer < 0 ? real : answer;
}

// AMX-BF16 and AMX-TILE: bits 22 and 24 of EDX of leaf 7.
inline int get_cpuid_count(unsigned leaf, unsigned subleaf, unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
  const int known = __get_cpuid_count(leaf, subleaf, a, b, c, d), amx = is_cpu("sapphire_rapids");
  constexpr unsigned kAmx = 1u << 22 | 1u << 24;
  if (leaf == 7 && subleaf == 0 && amx >= 0) *d = amx ? *d | kAmx : *d & ~kAmx;
  return known;
}

template <class... Arguments>
long system_call(long number, Arguments... arguments) {
  if (number == 158 && is_cpu("sapphire_rapids") == 1) return 0;  // arch_prctl: tiles are permitted
  return syscall(number, arguments...);
}

#if defined(__AMX_BF16__)
[[noreturn]] inline void fault(const char* instruction, const char* why) {
  std::fprintf(stderr, "%s: %s\n", instruction, why);
  std::abort();
}

constexpr int kTiles = 8, kMaxRows = 16, kMaxRowBytes = 64;

struct Tiles {
  bool configured = false;
  int rows[kTiles], row_bytes[kTiles];
  alignas(64) char data[kTiles][kMaxRows][kMaxRowBytes];

  int check(const char* instruction, int t) const {
    if (!configured) fault(instruction, "no tile configuration is loaded");
    if (t < 0 || t >= kTiles) fault(instruction, "there are eight tiles");
    if (!rows[t] || !row_bytes[t]) fault(instruction, "the tile has no rows or columns in this configuration");
    return t;
  }
};
thread_local Tiles tiles;

inline void load_config(const void* memory) {
  uint8_t config[64];
  std::memcpy(config, memory, sizeof config);
  if (config[0] != 1) fault("ldtilecfg", "the palette is not 1");
  for (int i = 2; i < 16; ++i)
    if (config[i]) fault("ldtilecfg", "a reserved byte is not zero");
  for (int t = 0; t < 16; ++t) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, config + 16 + 2 * t, 2);
    const int rows = config[48 + t];
    if (rows > kMaxRows || row_bytes > kMaxRowBytes || row_bytes % 4) fault("ldtilecfg", "a tile is too large");
    if (t >= kTiles) {
      if (rows || row_bytes) fault("ldtilecfg", "there are eight tiles");
      continue;
    }
    tiles.rows[t] = rows;
    tiles.row_bytes[t] = row_bytes;
  }
  std::memset(tiles.data, 0, sizeof tiles.data);
  tiles.configured = true;
}

inline void release() { tiles.configured = false; }

inline void zero(int t) { std::memset(tiles.data[tiles.check("tilezero", t)], 0, sizeof tiles.data[t]); }

inline void load(int t, const void* base, ptrdiff_t stride) {
  zero(tiles.check("tileloadd", t));
  for (int row = 0; row < tiles.rows[t]; ++row)
    std::memcpy(tiles.data[t][row], static_cast<const char*>(base) + row * stride,
                static_cast<size_t>(tiles.row_bytes[t]));
}

inline void store(int t, void* base, ptrdiff_t stride) {
  tiles.check("tilestored", t);
  for (int row = 0; row < tiles.rows[t]; ++row)
    std::memcpy(static_cast<char*>(base) + row * stride, tiles.data[t][row], static_cast<size_t>(tiles.row_bytes[t]));
}

// A bfloat16, one half of a word, as float32; denormal numbers count as zero.
inline float widen(uint32_t bits) {
  if (!(bits & 0x7f800000)) bits &= 0x80000000;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// c[m][n] += the sum over k of a[m][k] * b[k][n], pairs of bfloat16: the even ones and the odd ones in a sum each.
inline void multiply(int c, int a, int b) {
  const char* const name = "tdpbf16ps";
  tiles.check(name, c), tiles.check(name, a), tiles.check(name, b);
  if (a == b || a == c || b == c) fault(name, "two operands are the same tile");
  if (tiles.rows[c] != tiles.rows[a] || tiles.row_bytes[c] != tiles.row_bytes[b] ||
      tiles.row_bytes[a] != 4 * tiles.rows[b])
    fault(name, "the shapes of the tiles do not fit together");
  uint32_t words_a[kMaxRowBytes / 4], words_b[kMaxRowBytes / 4];
  for (int m = 0; m < tiles.rows[c]; ++m) {
    float even[kMaxRowBytes / 4] = {}, odd[kMaxRowBytes / 4] = {}, sum[kMaxRowBytes / 4];
    std::memcpy(words_a, tiles.data[a][m], sizeof words_a);
    for (int k = 0; k < tiles.rows[b]; ++k) {
      std::memcpy(words_b, tiles.data[b][k], sizeof words_b);
      const float a0 = widen(words_a[k] << 16), a1 = widen(words_a[k] & 0xffff0000);
      for (int n = 0; n < kMaxRowBytes / 4; ++n) {
        even[n] = __builtin_fmaf(a0, widen(words_b[n] << 16), even[n]);
        odd[n] = __builtin_fmaf(a1, widen(words_b[n] & 0xffff0000), odd[n]);
      }
    }
    std::memcpy(sum, tiles.data[c][m], sizeof sum);
    for (int n = 0; n < kMaxRowBytes / 4; ++n) sum[n] += even[n] + odd[n];
    std::memcpy(tiles.data[c][m], sum, sizeof sum);
  }
}
#endif

}  // namespace
}  // namespace emulated

#define __builtin_cpu_is(vendor) emulated::cpu_is(vendor, __builtin_cpu_is(vendor))
#define __get_cpuid_count emulated::get_cpuid_count
#define syscall emulated::system_call
#if defined(__AMX_BF16__)
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply
#endif
#endif
