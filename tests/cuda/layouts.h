// Who holds what: the places of matrix elements in the registers of mma and wgmma, and in swizzled shared memory. The
// emulation computes by these formulas; tests/test_cuda_layouts.py compares them with Triton's own.
#pragma once
#include <cstdint>

namespace layouts {

struct Place {
  int row, column;
};

// Element e of register i of a lane; a register holds `per_word` elements (2 of 16 bits, 1 of TF32).
inline Place mma_a(int lane, int i, int e, int per_word) {
  return {lane / 4 + (i & 1) * 8, (lane % 4 + (i >> 1) * 4) * per_word + e};
}
inline Place mma_b(int lane, int i, int e, int per_word) { return {(lane % 4 + i * 4) * per_word + e, lane / 4}; }
inline Place mma_d(int lane, int i) { return {lane / 4 + (i >> 1) * 8, lane % 4 * 2 + (i & 1)}; }

// wgmma: 16 rows a warp, 8 columns every four registers.
inline Place wgmma_d(int thread, int i) {
  const Place p = mma_d(thread % 32, i % 4);
  return {thread / 32 * 16 + p.row, i / 4 * 8 + p.column};
}

// Byte offset in shared memory of a tile whose rows of `bytes` bytes (0: not swizzled) TMA and wgmma permute.
inline uint32_t swizzled(uint32_t offset, int bytes) {
  const uint32_t units = static_cast<uint32_t>(bytes) / 16;
  return units ? offset ^ (offset >> 7 & (units - 1)) << 4 : offset;
}

}  // namespace layouts
