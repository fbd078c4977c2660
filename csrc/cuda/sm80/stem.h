// The stem in one kernel: convolution of a few channels (7x7 / 2 over RGB), scale, shift, ReLU and max pooling.
//
// A block computes kColumns channels of a tile of pooled pixels. It holds the weights and the patch of the input under
// the tile in shared memory; the convolution's outputs stay there too, and are pooled from there. Depth runs over
// the taps' rows: the s * c values of one row lie side by side in the patch, so operand A is read straight from it,
// four bytes at a time, without an im2col copy. A row is padded to 16-byte groups: 7 * 3 values to 24.
#pragma once
#include "cuda/api.h"
#include "cuda/sm80/warp_tile.h"

namespace resnet_fused::cuda::sm80 {

template <class T_, int kRows_, int kWarpsM, int kWarpsN>
struct StemTile {
  using T = T_;
  static constexpr int kRows = kRows_;  // convolution outputs of a block, at most
  static constexpr int kColumns = 64;   // channels
  using Grid = WarpGrid<kRows, kColumns, kWarpsM, kWarpsN>;
  static constexpr int kThreads = Grid::kThreads;
  static constexpr int kBlocks = 512 / kThreads;  // a multiprocessor runs at once: 128 registers a thread
  using Results = TileRows<kColumns* static_cast<int>(sizeof(T))>;
};

// Sizes of a block's work, and where it keeps what.
struct StemGeometry {
  int tile_h, tile_w;    // pooled pixels
  int conv_h, conv_w;    // the convolution's outputs under them
  int patch_h, patch_w;  // the input's pixels under those
  int pixel, patch_row;  // elements between pixels and between rows of the patch
  int groups;            // 16-byte groups of a row of taps
  int steps;             // of 32 bytes of depth
  int weight_row;        // bytes: an odd number of 16-byte chunks, so that ldmatrix reads without bank conflicts
  int patch_at, results_at, shared_bytes;

  template <class Tile>
  static StemGeometry of(const StemParams& p, int tile_h, int tile_w) {
    constexpr int kSize = sizeof(typename Tile::T), kGroup = kChunk<typename Tile::T>;
    StemGeometry g{};
    g.tile_h = tile_h;
    g.tile_w = tile_w;
    g.conv_h = (tile_h - 1) * p.pool_stride + p.pool_kernel;
    g.conv_w = (tile_w - 1) * p.pool_stride + p.pool_kernel;
    g.patch_h = (g.conv_h - 1) * p.stride + p.r;
    g.patch_w = (g.conv_w - 1) * p.stride + p.s;
    g.pixel = p.c + (kSize == 2 && p.stride * p.c % 2 != 0);  // every window starts at a multiple of four bytes
    g.groups = (p.s * g.pixel + kGroup - 1) / kGroup;
    g.patch_row = (g.conv_w - 1) * p.stride * g.pixel + g.groups * kGroup;
    if (g.patch_row < g.patch_w * g.pixel) g.patch_row = g.patch_w * g.pixel;
    g.patch_row += g.patch_row % 2;
    g.steps = (p.r * g.groups + 1) / 2;
    g.weight_row = (2 * g.steps + 1) * kChunkBytes;
    g.patch_at = Tile::kColumns * g.weight_row;
    const int patch_bytes = g.patch_h * g.patch_row * kSize;
    g.results_at = g.patch_at + (patch_bytes + kChunkBytes - 1) / kChunkBytes * kChunkBytes;
    g.shared_bytes = g.results_at + g.conv_h * g.conv_w * Tile::kColumns * kSize;
    return g;
  }

  // The tile with the fewest blocks, then the least recomputed, that fits the block's rows and the shared memory;
  // tile_h is 0 if none does.
  template <class Tile>
  static StemGeometry best(const StemParams& p, int shared_limit) {
    StemGeometry best{};
    int64_t least_tiles = 0, least_work = 0;
    for (int tile_h = 1; tile_h <= 16; ++tile_h)
      for (int tile_w = 1; tile_w <= 16; ++tile_w) {
        const StemGeometry g = of<Tile>(p, tile_h, tile_w);
        if (g.conv_h * g.conv_w > Tile::kRows || g.shared_bytes > shared_limit) continue;
        const int64_t tiles = static_cast<int64_t>((p.p + tile_h - 1) / tile_h) * ((p.q + tile_w - 1) / tile_w);
        const int64_t work = tiles * g.conv_h * g.conv_w;
        if (best.tile_h != 0 && (tiles > least_tiles || (tiles == least_tiles && work >= least_work))) continue;
        best = g;
        least_tiles = tiles;
        least_work = work;
      }
    return best;
  }
};

// weights[channel][r][group] from [K][R][S][C], zero where a group is padded and past the last channel.
template <class Tile>
__device__ void load_stem_weights(unsigned char* to, const StemParams& p, const StemGeometry& g, int first_channel) {
  using T = typename Tile::T;
  constexpr int kGroup = kChunk<T>;
  const int depth = 2 * g.steps * kGroup, row_depth = g.groups * kGroup;
  for (int at = threadIdx.x; at < Tile::kColumns * depth; at += Tile::kThreads) {
    const int column = at / depth, k = at % depth, r = k / row_depth, s = k % row_depth / g.pixel,
              c = k % row_depth % g.pixel;
    T value = Element<T>::round(0.f);
    if (first_channel + column < p.k && r < p.r && s < p.s && c < p.c)
      value = static_cast<const T*>(p.conv.weight)[(((first_channel + column) * p.r + r) * p.s + s) * p.c + c];
    *reinterpret_cast<T*>(to + column * g.weight_row + k * sizeof(T)) = value;
  }
}

// The input under a tile whose first convolution output is (conv_y, conv_x); zeros outside the image. A warp takes a
// row. Where the patch's rows are pieces of the image's, as with the 3 channels of a picture, no index is divided: that
// would take about as many instructions as the products.
template <class Tile>
__device__ void load_stem_patch(unsigned char* to, const StemParams& p, const StemGeometry& g, int image, int conv_y,
                                int conv_x) {
  using T = typename Tile::T;
  const int first_y = conv_y * p.stride - p.pad, first_x = conv_x * p.stride - p.pad;
  const int lane = threadIdx.x % 32;
  const bool dense = g.pixel == p.c && p.x_pitch == p.c;
  for (int row = threadIdx.x / 32; row < g.patch_h; row += Tile::kThreads / 32) {
    const int y = first_y + row;
    const bool inside = y >= 0 && y < p.h;
    const T* from = static_cast<const T*>(p.x) + (static_cast<int64_t>(image) * p.h + y) * p.w * p.x_pitch;
    T* const values = reinterpret_cast<T*>(to) + row * g.patch_row;
    if (dense) {
      const int first = first_x * p.c, end = inside ? p.w * p.c : 0;
#pragma unroll 4
      for (int column = lane; column < g.patch_row; column += 32) {
        const int at = first + column;
        values[column] = at >= 0 && at < end ? from[at] : Element<T>::round(0.f);
      }
    } else {
      for (int column = lane; column < g.patch_row; column += 32) {
        const int x = first_x + column / g.pixel, c = column % g.pixel;
        values[column] = inside && x >= 0 && x < p.w && c < p.c ? from[x * p.x_pitch + c] : Element<T>::round(0.f);
      }
    }
  }
}

// acc = patch * weights.
template <class Tile>
__device__ void multiply_stem(const typename Tile::Grid& grid, typename Tile::Grid::Accumulator& acc, uint32_t weights,
                              uint32_t patch, const StemParams& p, const StemGeometry& g) {
  using T = typename Tile::T;
  using Grid = typename Tile::Grid;
  constexpr int kSize = sizeof(T), kWord = 4 / kSize;  // elements of a 32-bit word
  clear<Grid>(acc);
  uint32_t window[Grid::kFragmentsM][2];  // where the windows of this lane's two rows of a fragment start
#pragma unroll
  for (int i = 0; i < Grid::kFragmentsM; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = grid.result_row(i, 2 * half);
      if (row >= g.conv_h * g.conv_w) row = 0;  // never stored
      const int start = row / g.conv_w * p.stride * g.patch_row + row % g.conv_w * p.stride * g.pixel;
      window[i][half] = patch + start * kSize + grid.lane % 4 * 4;
    }
  int r = 0, group = 0;
  for (int step = 0; step < g.steps; ++step) {
    uint32_t a[Grid::kFragmentsM][4], b[Grid::kFragmentsN / 2][4];
#pragma unroll
    for (int side = 0; side < 2; ++side) {  // the two groups of a step
      const int left = r < p.r ? p.s * g.pixel - group * kChunk<T> - grid.lane % 4 * kWord : 0;  // values of the row
      const uint32_t mask = left >= kWord ? 0xffffffffu : left == 1 ? 0xffffu : 0u;
      const int offset = r < p.r ? r * g.patch_row * kSize + group * kChunkBytes : 0;
#pragma unroll
      for (int i = 0; i < Grid::kFragmentsM; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          a[i][side * 2 + half] = Element<T>::operand(ptx::lds32(window[i][half] + offset) & mask);
      if (++group == g.groups) {
        group = 0;
        ++r;
      }
    }
#pragma unroll
    for (int j = 0; j < Grid::kFragmentsN / 2; ++j) {
      ptx::ldmatrix_x4(b[j], weights + grid.b_row(j) * g.weight_row + grid.b_chunk(step) * kChunkBytes);
#pragma unroll
      for (uint32_t& bits : b[j]) bits = Element<T>::operand(bits);
    }
    multiply_fragments<T, Grid>(acc, a, b);
  }
}

// A thread takes one chunk of one pooled pixel. NaN wins over numbers, as in torch.
template <class Tile>
__device__ void pool_stem(const unsigned char* results, const StemParams& p, const StemGeometry& g, int image,
                          int pool_y, int pool_x, int first_channel) {
  using T = typename Tile::T;
  constexpr int kChunks = Tile::Results::kChunks;
  for (int at = threadIdx.x; at < g.tile_h * g.tile_w * kChunks; at += Tile::kThreads) {
    const int chunk = at % kChunks, pixel = at / kChunks, ty = pixel / g.tile_w, tx = pixel % g.tile_w;
    const int y = pool_y + ty, x = pool_x + tx, k = first_channel + chunk * kChunk<T>;
    if (y >= p.p || x >= p.q || k >= p.k) continue;
    float largest[kChunk<T>];
#pragma unroll
    for (float& v : largest) v = -INFINITY;
    for (int dy = 0; dy < p.pool_kernel; ++dy)
      for (int dx = 0; dx < p.pool_kernel; ++dx) {
        const int row = (ty * p.pool_stride + dy) * g.conv_w + tx * p.pool_stride + dx;
        const Chunk<T> values = Chunk<T>::load(results + Tile::Results::offset(row, chunk));
#pragma unroll
        for (int e = 0; e < kChunk<T>; ++e) {
          const float v = Element<T>::to_float(values.element[e]);
          if (v > largest[e] || v != v) largest[e] = v;
        }
      }
    Chunk<T> pooled;
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) pooled.element[e] = Element<T>::round(largest[e]);
    const int64_t to = (static_cast<int64_t>(image) * p.p + y) * p.q + x;
    pooled.store_global(static_cast<T*>(p.out) + to * p.out_pitch + k);
  }
}

// Grid: x over tiles of all images, as many as run at once; y over kColumns channels.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    stem_kernel(const __grid_constant__ StemParams p, const __grid_constant__ StemGeometry g) {
  using T = typename Tile::T;
  using Grid = typename Tile::Grid;
  DYN_SMEM(smem);
  const Grid grid(threadIdx.x);
  const uint32_t shared = ptx::smem_addr(smem);
  const int first_channel = blockIdx.y * Tile::kColumns;
  const int across = (p.q + g.tile_w - 1) / g.tile_w, down = (p.p + g.tile_h - 1) / g.tile_h;
  load_stem_weights<Tile>(smem, p, g, first_channel);
  for (int tile = blockIdx.x; tile < p.n * across * down; tile += gridDim.x) {
    const int image = tile / (across * down), pool_y = tile / across % down * g.tile_h,
              pool_x = tile % across * g.tile_w;
    const int conv_y = pool_y * p.pool_stride - p.pool_padding, conv_x = pool_x * p.pool_stride - p.pool_padding;
    load_stem_patch<Tile>(smem + g.patch_at, p, g, image, conv_y, conv_x);
    __syncthreads();  // weights and patch are there; the last tile has been pooled
    typename Grid::Accumulator acc;
    multiply_stem<Tile>(grid, acc, shared, shared + g.patch_at, p, g);
#pragma unroll
    for (int j = 0; j < Grid::kFragmentsN; ++j) {
      const int column = grid.result_column(j, 0), k = first_channel + column;
      const bool valid = k < p.k;  // with its neighbour: channels come in chunks
      const float scale[2] = {valid && p.conv.scale ? p.conv.scale[k] : 1.f,
                              valid && p.conv.scale ? p.conv.scale[k + 1] : 1.f};
      const float shift[2] = {valid ? p.conv.shift[k] : 0.f, valid ? p.conv.shift[k + 1] : 0.f};
#pragma unroll
      for (int i = 0; i < Grid::kFragmentsM; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = grid.result_row(i, 2 * half), y = conv_y + row / g.conv_w, x = conv_x + row % g.conv_w;
          if (row >= g.conv_h * g.conv_w) continue;
          float v[2] = {-INFINITY, -INFINITY};  // the pooling's padding
          if (y >= 0 && y < p.conv_p && x >= 0 && x < p.conv_q)
#pragma unroll
            for (int e = 0; e < 2; ++e) v[e] = ptx::relu(fmaf(acc[i][j][2 * half + e], scale[e], shift[e]));
          const uint32_t at = Tile::Results::offset(row, column / kChunk<T>) + column % kChunk<T> * sizeof(T);
          store_pair<T>(smem + g.results_at + at, v[0], v[1]);
        }
    }
    __syncthreads();
    pool_stem<Tile>(smem + g.results_at, p, g, image, pool_y, pool_x, first_channel);
  }
}

}  // namespace resnet_fused::cuda::sm80
