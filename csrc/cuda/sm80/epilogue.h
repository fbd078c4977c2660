// From accumulators to the output, or to an intermediate in shared memory.
//
// To the output: scale and shift in registers, then through shared memory into whole rows, so that
// the residual is read and the output written in 16-byte accesses; one rounding at the end.
#pragma once
#include "cuda/sm80/warp_tile.h"

namespace resnet_fused::cuda::sm80 {

// acc = acc * scale + shift, channel by channel. `first` is the channel of the tile's column 0; a null scale is 1, a
// null shift 0.
template <class Grid>
__device__ void scale_and_shift(const Grid& grid, typename Grid::Accumulator& acc, const float* scale,
                                const float* shift, int first, int channels) {
#pragma unroll
  for (int j = 0; j < Grid::kFragmentsN; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int k = first + grid.result_column(j, e);
      const float a = scale != nullptr && k < channels ? scale[k] : 1.f;
      const float b = shift != nullptr && k < channels ? shift[k] : 0.f;
#pragma unroll
      for (int i = 0; i < Grid::kFragmentsM; ++i) {
        acc[i][j][e] = fmaf(acc[i][j][e], a, b);
        acc[i][j][e + 2] = fmaf(acc[i][j][e + 2], a, b);
      }
    }
  }
}

// acc += sum * scale + shift: a second product into the same results.
template <class Grid>
__device__ void add_scaled(const Grid& grid, typename Grid::Accumulator& acc, typename Grid::Accumulator& sum,
                           const float* scale, const float* shift, int first, int channels) {
  scale_and_shift(grid, sum, scale, shift, first, channels);
#pragma unroll
  for (int i = 0; i < Grid::kFragmentsM; ++i)
#pragma unroll
    for (int j = 0; j < Grid::kFragmentsN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] += sum[i][j][e];
}

// A warp's strip of 16 rows of float32 results, on their way from fragments to rows. The padding of 8 floats
// spreads the rows that a fragment's lanes write over all banks.
template <class Grid>
struct Strip {
  static constexpr int kPitch = Grid::kWarpColumns + 8;
  static constexpr int kBytes = 16 * kPitch * 4;
  static constexpr int kBlockBytes = kBytes * Grid::kThreads / 32;  // of all warps
};

// Where results go, and what is added on the way. Pixels lie `pitch` elements apart.
template <class T>
struct Destination {
  T* out;
  int64_t out_pitch;
  const T* residual;  // or null
  int64_t residual_pitch;
  int channels;
  bool relu;
};

// out[pixel(row)][first + column] = activation(acc + residual). pixel(row) is the output pixel of a row of the tile,
// negative: none. `strip` is this warp's own. `first` and the number of channels are multiples of a chunk.
template <class T, class Grid, class Pixel>
__device__ void store_rows(const Grid& grid, const typename Grid::Accumulator& acc, float* strip,
                           const Destination<T>& to, int first, Pixel pixel) {
  constexpr int kPitch = Strip<Grid>::kPitch, kRowChunks = Grid::kWarpColumns / kChunk<T>;
  constexpr int kChunks = 16 * kRowChunks / 32;  // of a lane
  static_assert(16 * kRowChunks % 32 == 0);
#pragma unroll
  for (int i = 0; i < Grid::kFragmentsM; ++i) {
    int64_t pixels[kChunks];
    Chunk<T> residual[kChunks];
    int columns[kChunks];
#pragma unroll
    for (int n = 0; n < kChunks; ++n) {  // before the strip is written: the reads of the residual take longest
      const int at = grid.lane + n * 32;
      columns[n] = at % kRowChunks * kChunk<T>;
      const int k = first + grid.column + columns[n];
      pixels[n] = k < to.channels ? pixel(grid.row + i * 16 + at / kRowChunks) : -1;
      residual[n] = to.residual != nullptr && pixels[n] >= 0
                        ? Chunk<T>::load(to.residual + pixels[n] * to.residual_pitch + k)
                        : Chunk<T>::zero();
    }
#pragma unroll
    for (int j = 0; j < Grid::kFragmentsN; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* at = strip + (grid.lane / 4 + half * 8) * kPitch + j * 8 + grid.lane % 4 * 2;
        *reinterpret_cast<float2*>(at) = make_float2(acc[i][j][half * 2], acc[i][j][half * 2 + 1]);
      }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kChunks; ++n) {
      if (pixels[n] < 0) continue;
      const float* from = strip + (grid.lane + n * 32) / kRowChunks * kPitch + columns[n];
      Chunk<T> chunk;
#pragma unroll
      for (int e = 0; e < kChunk<T>; e += 4) {
        const float4 sums = *reinterpret_cast<const float4*>(from + e);
        const float sum[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
        for (int f = 0; f < 4; ++f) {
          const float v = sum[f] + Element<T>::to_float(residual[n].element[e + f]);
          chunk.element[e + f] = Element<T>::round(to.relu ? ptx::relu(v) : v);
        }
      }
      chunk.store_global(to.out + pixels[n] * to.out_pitch + first + grid.column + columns[n]);
    }
    __syncwarp();  // the strip has been read before the next fragment overwrites it
  }
}

// A block's intermediate: rows of kChannels channels in shared memory, relu(acc * scale + shift) rounded to T.
// place(row) says where a row of the tile goes: the index of the intermediate's row, or nowhere if negative, and
// whether it is a pixel of the image; if not, it is the padding of the next layer, zero.
struct Place {
  int row;
  bool inside;
};

template <class T, int kChannels, class Grid, class PlaceOf>
__device__ void store_intermediate(const Grid& grid, typename Grid::Accumulator& acc, unsigned char* to,
                                   const float* scale, const float* shift, PlaceOf place_of) {
  using Rows = TileRows<kChannels* static_cast<int>(sizeof(T))>;
  scale_and_shift(grid, acc, scale, shift, 0, kChannels);
#pragma unroll
  for (int i = 0; i < Grid::kFragmentsM; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Place place = place_of(grid.result_row(i, 2 * half));
      if (place.row < 0) continue;
#pragma unroll
      for (int j = 0; j < Grid::kFragmentsN; ++j) {
        const int column = grid.result_column(j, 0);
        const float a = place.inside ? ptx::relu(acc[i][j][2 * half]) : 0.f;
        const float b = place.inside ? ptx::relu(acc[i][j][2 * half + 1]) : 0.f;
        store_pair<T>(to + Rows::offset(place.row, column / kChunk<T>) + column % kChunk<T> * sizeof(T), a, b);
      }
    }
}

}  // namespace resnet_fused::cuda::sm80
