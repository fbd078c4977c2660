// wgmma of cuda/ptx90.h on the CPU. The four warps of a warpgroup gather their operands; the product is computed at the
// wait (or at once), from what the operands hold then.
#pragma once
#include "ptx_emulated.h"

namespace ptx {

template <int S>
uint64_t wg_desc(uint32_t addr) {
  static_assert(S == 32 || S == 64 || S == 128);
  constexpr uint64_t kMode = S == 128 ? 1 : S == 64 ? 2 : 3, kRows8 = 8 * S / 16;
  return static_cast<uint64_t>((addr & 0x3FFFF) >> 4) | (1ull << 16) | (kRows8 << 32) | (kMode << 62);
}
inline uint64_t wg_desc_ns(uint32_t addr, uint32_t lbo, uint32_t sbo) {
  return static_cast<uint64_t>((addr & 0x3FFFF) >> 4) | static_cast<uint64_t>(lbo >> 4) << 16 |
         static_cast<uint64_t>(sbo >> 4) << 32;
}

namespace detail {

struct WgmmaThread {
  float* d;
  uint64_t a, b;
  const uint32_t* a_registers;  // or null
  bool accumulate;
};
using WgmmaOperands = std::vector<WgmmaThread>;  // of the 128 threads

// Where 16 bytes of a K-major operand lie: row `row`, bytes 16 * unit on in K.
EMU_UNWATCHED inline uint32_t unit_offset(uint64_t descriptor, int row, int unit) {
  const auto field = [&](int shift) { return static_cast<uint32_t>(descriptor >> shift & 0x3FFF) << 4; };
  const uint32_t start = field(0), lbo = field(16), sbo = field(32), mode = static_cast<uint32_t>(descriptor >> 62);
  if (mode == 0) return start + row / 8 * sbo + row % 8 * 16 + unit * lbo;
  const uint32_t bytes = mode == 1 ? 128 : mode == 2 ? 64 : 32;
  if (start % (8 * bytes) >= bytes) emu::fail("wgmma: a swizzled operand must start in the first row of an atom");
  const uint32_t offset = start + row / 8 * sbo + row % 8 * bytes + unit * 16;
  return layouts::swizzled(offset, static_cast<int>(bytes));
}
EMU_UNWATCHED inline void read_unit(const emu::Block& b, uint64_t descriptor, int row, int unit, uint32_t (&words)[4]) {
  const uint32_t offset = unit_offset(descriptor, row, unit);
  if (offset + 16 > b.shared_bytes) emu::fail("wgmma: operand past the end of shared memory");
  emu::check_fenced(b, offset, 16, "wgmma");
  std::memcpy(words, b.shared + offset, 16);
}

// The operands' bytes, read by one thread in the sanitizers' sight: writes that no barrier orders before this are
// races.
__attribute__((noinline)) inline void touch([[maybe_unused]] uint64_t descriptor, [[maybe_unused]] int rows) {
#if defined(__SANITIZE_THREAD__)
  for (int row = 0; row < rows; ++row)
    for (int unit = 0; unit < 2; ++unit)
      (void)*reinterpret_cast<volatile uint64_t*>(emu::block().shared + unit_offset(descriptor, row, unit));
#endif
}

template <class T, int N>
EMU_UNWATCHED void multiply_warpgroup(const emu::Block& block, const WgmmaOperands& operands) {
  constexpr int kPerWord = 4 / sizeof(T), kPerUnit = 4 * kPerWord, kDepth = 2 * kPerUnit;
  static thread_local float a[64][kDepth], b[kDepth][N], d[64][N];
  uint32_t words[4];
  for (int row = 0; row < 64 && !operands[0].a_registers; ++row)
    for (int unit = 0; unit < 2; ++unit) {
      read_unit(block, operands[0].a, row, unit, words);
      for (int e = 0; e < kPerUnit; ++e) a[row][unit * kPerUnit + e] = element<T>(words[e / kPerWord], e % kPerWord);
    }
  for (int thread = 0; thread < 128 && operands[0].a_registers; ++thread) {
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < kPerWord; ++e) {
        const layouts::Place p = layouts::mma_a(thread % 32, i, e, kPerWord);
        a[thread / 32 * 16 + p.row][p.column] = element<T>(operands[thread].a_registers[i], e);
      }
  }
  for (int n = 0; n < N; ++n)
    for (int unit = 0; unit < 2; ++unit) {
      read_unit(block, operands[0].b, n, unit, words);
      for (int e = 0; e < kPerUnit; ++e) b[unit * kPerUnit + e][n] = element<T>(words[e / kPerWord], e % kPerWord);
    }
  auto at = [](int thread, int i) -> float& {
    const layouts::Place p = layouts::wgmma_d(thread, i);
    return d[p.row][p.column];
  };
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < N / 2; ++i) at(thread, i) = operands[thread].accumulate ? operands[thread].d[i] : 0.f;
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < kDepth; ++k)
      for (int n = 0; n < N; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < N / 2; ++i) operands[thread].d[i] = at(thread, i);
}

inline emu::Warpgroup& warpgroup() { return emu::block().warpgroups[emu::self().id / 128]; }
inline bool leads_warpgroup() { return emu::self().id % 128 == 0; }

// All 128 threads are here; no happens-before edge, the instruction makes none.
EMU_UNWATCHED inline void join_warpgroup(const char* where) {
  if (!emu::arrive(emu::block().warpgroup_barriers[emu::self().id / 128], 128, true, where)) emu::wait_in(where);
}

template <class T, int N>
EMU_UNWATCHED void issue_wgmma(WgmmaThread mine) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  emu::Unwatched quiet;
  emu::Warpgroup& group = warpgroup();
  if (!emu::self().wgmma_fenced) emu::fail("wgmma: no wgmma.fence since the last commit");
  const int warp = emu::self().id / 32 % 4;
  group.operands.resize(128 * sizeof(WgmmaThread));
  emu::collective(emu::kAllLanes, "wgmma", &mine, [&group, warp](void** lanes) {
    auto* operands = reinterpret_cast<WgmmaThread*>(group.operands.data());
    for (int l = 0; l < 32; ++l) {
      const auto* lane = static_cast<WgmmaThread*>(lanes[l]);
      const auto* first = static_cast<WgmmaThread*>(lanes[0]);
      if (lane->a != first->a || lane->b != first->b) emu::fail("wgmma: descriptors differ inside a warp");
      operands[warp * 32 + l] = *lane;
    }
  });
  join_warpgroup("wgmma");
  if (leads_warpgroup()) {
    const auto* operands = reinterpret_cast<const WgmmaThread*>(group.operands.data());
    auto product = [block = &emu::block(), all = WgmmaOperands(operands, operands + 128)] {
      emu::Unwatched quiet;
      multiply_warpgroup<T, N>(*block, all);
    };
    if (group.products.empty() && emu::lands_at_once())  // products keep their order
      product();
    else
      group.products.add(product);
  }
  join_warpgroup("wgmma");
}

}  // namespace detail

inline void wg_fence() { emu::self().wgmma_fenced = true; }

template <class T, int F>
void wgmma(float (&d)[F], uint64_t a, uint64_t b, bool accumulate) {
  if (detail::leads_warpgroup()) {
    detail::touch(a, 64);
    detail::touch(b, 2 * F);
  }
  detail::issue_wgmma<T, 2 * F>({d, a, b, nullptr, accumulate});
}
template <class T, int F>
void wgmma(float (&d)[F], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  if (detail::leads_warpgroup()) detail::touch(b, 2 * F);
  detail::issue_wgmma<T, 2 * F>({d, 0, b, a, accumulate});
}

EMU_UNWATCHED inline void wg_commit() {
  emu::Unwatched quiet;
  detail::join_warpgroup("wgmma.commit_group");
  emu::self().wgmma_fenced = false;
  if (detail::leads_warpgroup()) detail::warpgroup().products.commit();
}
template <int N>
EMU_UNWATCHED void wg_wait() {
  emu::Unwatched quiet;
  detail::join_warpgroup("wgmma.wait_group");
  std::vector<emu::Operation> group;
  while (detail::leads_warpgroup() && detail::warpgroup().products.pop(N, group))
    for (const emu::Operation& op : group) op();
  detail::join_warpgroup("wgmma.wait_group");
}

}  // namespace ptx
