// Tiles in shared memory without bank conflicts, and the product of two of them by the warps of a block.
#pragma once
#include "cuda/sm80/element.h"

namespace resnet_fused::cuda::sm80 {

// Rows of kBytes bytes in 16-byte chunks. The chunks of a row are permuted so that the eight rows which one ldmatrix
// phase reads at one chunk number lie in eight different sixteen-byte groups of the 32 banks.
template <int kBytes>
struct TileRows {
  static constexpr int kChunks = kBytes / kChunkBytes;
  static_assert(kChunks >= 1 && (kChunks & (kChunks - 1)) == 0, "the permutation needs a power of two");
  static constexpr int kRowsPerCycle = kChunks >= 8 ? 1 : 8 / kChunks;  // rows that lie side by side in the banks
  static constexpr int kMask = (kChunks < 8 ? kChunks : 8) - 1;

  // Bytes from the tile's start to a chunk.
  __device__ static uint32_t offset(int row, int chunk) {
    return static_cast<uint32_t>(row * kBytes + ((chunk ^ (row / kRowsPerCycle & kMask)) * kChunkBytes));
  }
};

// The position of a thread's warp in a grid of kWarpsM x kWarpsN warps, each with kFragmentsM x kFragmentsN fragments
// of 16 x 8 results.
template <int kRows, int kColumns, int kWarpsM_, int kWarpsN_>
struct WarpGrid {
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpRows = kRows / kWarpsM, kWarpColumns = kColumns / kWarpsN;
  static constexpr int kFragmentsM = kWarpRows / 16, kFragmentsN = kWarpColumns / 8;
  static_assert(kRows == kWarpsM * kFragmentsM * 16 && kColumns == kWarpsN * kFragmentsN * 8);
  static_assert(kFragmentsN % 2 == 0, "ldmatrix.x4 reads two fragments of B");

  using Accumulator = float[kFragmentsM][kFragmentsN][4];

  int lane, row, column;  // of the warp's first result

  __device__ explicit WarpGrid(int thread)
      : lane(thread % 32), row(thread / 32 / kWarpsN * kWarpRows), column(thread / 32 % kWarpsN * kWarpColumns) {}

  // Where accumulator element e of fragment (i, j) lies in the tile; elements 2h and 2h + 1 are neighbours in a row.
  __device__ int result_row(int i, int e) const { return row + i * 16 + lane / 4 + e / 2 * 8; }
  __device__ int result_column(int j, int e) const { return column + j * 8 + lane % 4 * 2 + e % 2; }

  // The row and the chunk that this lane hands to ldmatrix: for fragment i of A and for fragments 2j and 2j + 1 of B.
  __device__ int a_row(int i) const { return row + i * 16 + lane % 16; }
  __device__ int a_chunk(int step) const { return step * 2 + lane / 16; }
  __device__ int b_row(int j) const { return column + j * 16 + lane % 8 + lane / 16 * 8; }
  __device__ int b_chunk(int step) const { return step * 2 + lane / 8 % 2; }
};

template <class Grid>
__device__ void clear(typename Grid::Accumulator& acc) {
#pragma unroll
  for (int i = 0; i < Grid::kFragmentsM; ++i)
#pragma unroll
    for (int j = 0; j < Grid::kFragmentsN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.f;
}

// acc += a * b^T: the fragments of 32 bytes of depth.
template <class T, class Grid>
__device__ void multiply_fragments(typename Grid::Accumulator& acc, const uint32_t (&a)[Grid::kFragmentsM][4],
                                   const uint32_t (&b)[Grid::kFragmentsN / 2][4]) {
#pragma unroll
  for (int i = 0; i < Grid::kFragmentsM; ++i)
#pragma unroll
    for (int j = 0; j < Grid::kFragmentsN; ++j)
      ptx::mma<T>(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
}

// acc += A * B^T over kSteps steps of 32 bytes of depth. a(i, chunk) and b(j, chunk) are the shared addresses of the
// row that this lane hands to ldmatrix.
template <class T, class Grid, int kSteps, class AddressA, class AddressB>
__device__ void multiply(const Grid& grid, typename Grid::Accumulator& acc, AddressA a_address, AddressB b_address) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[Grid::kFragmentsM][4], b[Grid::kFragmentsN / 2][4];
#pragma unroll
    for (int i = 0; i < Grid::kFragmentsM; ++i) {
      ptx::ldmatrix_x4(a[i], a_address(i, grid.a_chunk(step)));
#pragma unroll
      for (uint32_t& bits : a[i]) bits = Element<T>::operand(bits);
    }
#pragma unroll
    for (int j = 0; j < Grid::kFragmentsN / 2; ++j) {
      ptx::ldmatrix_x4(b[j], b_address(j, grid.b_chunk(step)));
#pragma unroll
      for (uint32_t& bits : b[j]) bits = Element<T>::operand(bits);
    }
    multiply_fragments<T, Grid>(acc, a, b);
  }
}

}  // namespace resnet_fused::cuda::sm80
