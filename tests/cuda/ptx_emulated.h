// Bodies of cuda/ptx.h on the CPU.
#pragma once
#include <type_traits>

#include "builtins.h"
#include "layouts.h"

#define DYN_SMEM(name) unsigned char* name = emu::block().shared

namespace ptx {

inline uint32_t smem_addr(const void* p) { return emu::shared_address(p); }

// ---- asynchronous copies -------------------------------------------------------------------------------------------
template <int B>
void cp_async(uint32_t addr, const void* src, bool valid) {
  static_assert(B == 4 || B == 8 || B == 16);
  if (valid && reinterpret_cast<uintptr_t>(src) % B) emu::fail("cp.async: misaligned global address");
  const emu::Copy copy{emu::shared_bytes(addr, B, B), src, B, valid ? B : 0u};
  if (emu::lands_at_once()) return copy();
  emu::Unwatched quiet;
  emu::self().copies.add(copy);
}
inline void cp_async16(uint32_t addr, const void* src, bool valid) { cp_async<16>(addr, src, valid); }
inline void cp_commit() {
  emu::Unwatched quiet;
  emu::self().copies.commit();
}
template <int N>
void cp_wait() {
  std::vector<emu::Copy> group;
  while (emu::self().copies.pop(N, group))
    for (const emu::Copy& copy : group) copy();
}

// ---- matrices ------------------------------------------------------------------------------------------------------
namespace detail {

struct MatrixRow {
  uint32_t row[4], fragment[4];
};
inline uint32_t half_word(const uint32_t* words, int i) { return words[i / 2] >> i % 2 * 16 & 0xffff; }

inline void load_matrices(uint32_t (&r)[4], uint32_t addr, bool transposed, const char* name) {
  MatrixRow lane;
  std::memcpy(lane.row, emu::shared_bytes(addr, 16, 16), 16);  // by the lane itself: sanitizers see whose row it is
  emu::collective(emu::kAllLanes, name, &lane, [transposed](void** lanes) {
    auto row = [&](int i) { return static_cast<MatrixRow*>(lanes[i])->row; };
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const int first = i * 8, g = l / 4, t = l % 4;
        static_cast<MatrixRow*>(lanes[l])->fragment[i] =
            transposed ? half_word(row(first + 2 * t), g) | half_word(row(first + 2 * t + 1), g) << 16
                       : row(first + g)[t];
      }
  });
  std::memcpy(r, lane.fragment, 16);
}

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
// Element i of a register, as a matrix unit sees it.
template <class T>
float element(uint32_t word, int i) {
  const auto bits = static_cast<uint16_t>(word >> i * 16);
  if constexpr (std::is_same_v<T, float>)
    return bit_cast<float>(word & 0xffffe000u);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  else
    return __half2float(__half(__half_raw{bits}));
}

struct MmaLane {
  const uint32_t* a;
  uint32_t b[2];
  float* d;
};
template <class T>
EMU_UNWATCHED void multiply_warp(void** lanes) {
  constexpr int kPerWord = 4 / sizeof(T), kDepth = 8 * kPerWord;
  float a[16][kDepth], b[kDepth][8], d[16][8];
  for (int l = 0; l < 32; ++l) {
    const auto* lane = static_cast<MmaLane*>(lanes[l]);
    for (int e = 0; e < kPerWord; ++e) {
      for (int i = 0; i < 4; ++i) {
        const layouts::Place p = layouts::mma_a(l, i, e, kPerWord);
        a[p.row][p.column] = element<T>(lane->a[i], e);
      }
      for (int i = 0; i < 2; ++i) {
        const layouts::Place p = layouts::mma_b(l, i, e, kPerWord);
        b[p.row][p.column] = element<T>(lane->b[i], e);
      }
    }
    for (int i = 0; i < 4; ++i) d[layouts::mma_d(l, i).row][layouts::mma_d(l, i).column] = lane->d[i];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < kDepth; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i)
      static_cast<MmaLane*>(lanes[l])->d[i] = d[layouts::mma_d(l, i).row][layouts::mma_d(l, i).column];
}

}  // namespace detail

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr) { detail::load_matrices(r, addr, false, "ldmatrix.x4"); }
inline void ldmatrix_x4_t(uint32_t (&r)[4], uint32_t addr) {
  detail::load_matrices(r, addr, true, "ldmatrix.x4.trans");
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  detail::MmaLane lane{a, {b0, b1}, d};
  emu::collective(emu::kAllLanes, "mma", &lane, [](void** lanes) { detail::multiply_warp<T>(lanes); });
}

inline uint32_t to_tf32(uint32_t bits) {
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;  // infinity, NaN
  return (bits + 0x1000u) & 0xffffe000u;
}

// ---- shared memory by address --------------------------------------------------------------------------------------
inline uint32_t lds32(uint32_t addr) {
  uint32_t v;
  std::memcpy(&v, emu::shared_bytes(addr, 4, 4), 4);
  return v;
}
inline uint4 lds128(uint32_t addr) {
  uint4 v;
  std::memcpy(&v, emu::shared_bytes(addr, 16, 16), 16);
  return v;
}
inline void sts16(uint32_t addr, uint32_t v) {
  std::memcpy(emu::shared_bytes(addr, 2, 2), &v, 2);
  emu::mark_unfenced(addr, 2);
}
inline void sts32(uint32_t addr, uint32_t v) {
  std::memcpy(emu::shared_bytes(addr, 4, 4), &v, 4);
  emu::mark_unfenced(addr, 4);
}
inline void sts128(uint32_t addr, uint4 v) {
  std::memcpy(emu::shared_bytes(addr, 16, 16), &v, 16);
  emu::mark_unfenced(addr, 16);
}
inline void stg128(void* p, uint4 v) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emu::fail("stg128: misaligned global address");
  std::memcpy(p, &v, 16);
}

// ---- barriers ------------------------------------------------------------------------------------------------------
inline void bar_sync(int id, int n) { emu::synchronize(emu::block().barriers[id], n, "bar.sync"); }
inline void bar_arrive(int id, int n) {
  emu::Barrier& barrier = emu::block().barriers[id];
  emu::release(&barrier.token);
  emu::arrive(barrier, n, false, "bar.arrive");
}

// ---- conversions ---------------------------------------------------------------------------------------------------
inline float relu(float v) { return v > 0.f || v != v ? v : 0.f; }
template <class T>
uint32_t pack(float lo, float hi) {
  auto bits = [](float v) -> uint32_t {
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      return detail::bit_cast<uint16_t>(__float2bfloat16(v));
    else
      return detail::bit_cast<uint16_t>(__float2half(v));
  };
  return bits(lo) | bits(hi) << 16;
}
template <class T>
uint32_t pack_relu(float lo, float hi) {
  return pack<T>(relu(lo), relu(hi));
}

}  // namespace ptx
