// The two operands of an implicit GEMM on their way into shared memory: gathered pixels and rows of weights.
#pragma once
#include "cuda/sm80/warp_tile.h"

namespace resnet_fused::cuda::sm80 {

// A block's dynamic shared memory, as a pointer and as an address of the shared window. Tiles are offsets into it.
struct SharedMemory {
  unsigned char* bytes;
  uint32_t address;

  __device__ explicit SharedMemory(unsigned char* bytes) : bytes(bytes), address(ptx::smem_addr(bytes)) {}
  __device__ SharedMemory(unsigned char* bytes, uint32_t address) : bytes(bytes), address(address) {}
  __device__ SharedMemory at(int offset) const { return {bytes + offset, address + offset}; }
};

// What a window slides over: an NHWC image whose pixels lie `pitch` elements apart, and the taps.
struct Window {
  int h, w, c;
  int r, s, dil_h, dil_w;
  int64_t pitch;

  __device__ int depth() const { return r * s * c; }
};

// Where the window of one row of A starts: the pixel under tap (0, 0). It may lie outside the image.
struct Origin {
  int64_t pixel;  // index in the tensor
  int y, x;

  __device__ static Origin of(int image, int y, int x, const Window& window) {
    return {(static_cast<int64_t>(image) * window.h + y) * window.w + x, y, x};
  }
  __device__ static Origin nowhere() { return {0, -(1 << 30), 0}; }  // every tap falls outside
};

// Which chunks of a tile with rows of kRowBytes a thread copies: one column, every kRowStep-th row.
template <int kRows, int kRowBytes, int kThreads>
struct CopyPattern {
  using Tile = TileRows<kRowBytes>;
  static constexpr int kRowStep = kThreads / Tile::kChunks;
  static constexpr int kCopies = (kRows + kRowStep - 1) / kRowStep;  // of a thread, at most
  static_assert(kThreads % Tile::kChunks == 0);

  static __device__ int chunk(int thread) { return thread % Tile::kChunks; }
  static __device__ int row(int thread, int copy) { return thread / Tile::kChunks + copy * kRowStep; }
  static __device__ bool copies(int thread, int copy) { return kRows % kRowStep == 0 || row(thread, copy) < kRows; }
};

// A: row m of the tile is the window at one output pixel, its depth runs over taps and channels, [r][s][c].
template <class T, int kRows, int kRowBytes, int kThreads>
class GatheredRows {
 public:
  using Pattern = CopyPattern<kRows, kRowBytes, kThreads>;
  static constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));  // elements of a step

  // Starts at depth `begin`. origin(row) is the Origin of a row.
  template <class OriginOf>
  __device__ GatheredRows(const T* x, const Window& window, int thread, int begin, OriginOf origin)
      : x_(x), window_(window), thread_(thread) {
#pragma unroll
    for (int i = 0; i < Pattern::kCopies; ++i) {
      const Origin from = origin(Pattern::row(thread, i));
      offset_[i] = from.pixel * window.pitch;
      y_[i] = from.y;
      x0_[i] = from.x;
    }
    rewind(begin);
  }

  __device__ void rewind(int begin) {
    const int k = begin + Pattern::chunk(thread_) * kChunk<T>;
    const int tap = k / window_.c;
    channel_ = k % window_.c;
    tap_y_ = tap / window_.s;
    tap_x_ = tap % window_.s;
  }

  // Starts the copies of this step; zeros where the window leaves the image. Returns a bit per copy that has data.
  __device__ uint32_t load(uint32_t tile) {
    const int dy = tap_y_ * window_.dil_h, dx = tap_x_ * window_.dil_w;
    const int64_t delta = (static_cast<int64_t>(dy) * window_.w + dx) * window_.pitch + channel_;
    uint32_t present = 0;
#pragma unroll
    for (int i = 0; i < Pattern::kCopies; ++i) {
      if (!Pattern::copies(thread_, i)) continue;
      const bool inside = tap_y_ < window_.r && static_cast<unsigned>(y_[i] + dy) < static_cast<unsigned>(window_.h) &&
                          static_cast<unsigned>(x0_[i] + dx) < static_cast<unsigned>(window_.w);
      const uint32_t to = Pattern::Tile::offset(Pattern::row(thread_, i), Pattern::chunk(thread_));
      ptx::cp_async16(tile + to, x_ + (inside ? offset_[i] + delta : 0), inside);
      present |= static_cast<uint32_t>(inside) << i;
    }
    channel_ += kDepth;
    while (channel_ >= window_.c) {
      channel_ -= window_.c;
      if (++tap_x_ == window_.s) {
        tap_x_ = 0;
        ++tap_y_;
      }
    }
    return present;
  }

 private:
  const T* x_;
  Window window_;
  int thread_;
  int64_t offset_[Pattern::kCopies];
  int y_[Pattern::kCopies], x0_[Pattern::kCopies];
  int channel_, tap_y_, tap_x_;  // of this thread's chunk
};

// What a pre-activation network does to a convolution's input: relu(x * scale + shift), on the chunks that a
// thread has copied itself. Padding stays zero, so it has to know which of its chunks came from the image.
template <class T, int kRows, int kRowBytes, int kThreads, int kStages>
class InputActivation {
 public:
  using Pattern = CopyPattern<kRows, kRowBytes, kThreads>;
  static_assert(Pattern::kCopies * kStages <= 32, "a bit per copy in flight");

  __device__ InputActivation(const float* scale, const float* shift, int channels, int thread, int begin)
      : scale_(scale), shift_(shift), channels_(channels), thread_(thread) {
    channel_ = (begin + Pattern::chunk(thread) * kChunk<T>) % channels;
  }

  __device__ void loaded(int stage, uint32_t present) {
    const int at = stage * Pattern::kCopies;
    present_ = (present_ & ~(kAll << at)) | present << at;
  }

  __device__ void apply(int stage, unsigned char* tile) {
    const uint32_t present = present_ >> stage * Pattern::kCopies & kAll;
    if (present != 0) {
      float scale[kChunk<T>], shift[kChunk<T>];
#pragma unroll
      for (int e = 0; e < kChunk<T>; e += 4) {
        *reinterpret_cast<float4*>(scale + e) = *reinterpret_cast<const float4*>(scale_ + channel_ + e);
        *reinterpret_cast<float4*>(shift + e) = *reinterpret_cast<const float4*>(shift_ + channel_ + e);
      }
#pragma unroll
      for (int i = 0; i < Pattern::kCopies; ++i) {
        if ((present >> i & 1) == 0) continue;
        unsigned char* at = tile + Pattern::Tile::offset(Pattern::row(thread_, i), Pattern::chunk(thread_));
        Chunk<T> chunk = Chunk<T>::load(at);
#pragma unroll
        for (int e = 0; e < kChunk<T>; ++e)
          chunk.element[e] =
              Element<T>::round(ptx::relu(fmaf(Element<T>::to_float(chunk.element[e]), scale[e], shift[e])));
        chunk.store_shared(at);
      }
    }
    channel_ += kRowBytes / static_cast<int>(sizeof(T));
    while (channel_ >= channels_) channel_ -= channels_;
  }

 private:
  static constexpr uint32_t kAll = (1u << Pattern::kCopies) - 1;
  const float *scale_, *shift_;
  int channels_, thread_, channel_;
  uint32_t present_ = 0;
};

// B: row n of the tile is output channel first + n of weights [channels][depth]; zeros past either end.
template <class T, int kRows, int kRowBytes, int kThreads>
class WeightRows {
 public:
  using Pattern = CopyPattern<kRows, kRowBytes, kThreads>;
  static constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));

  __device__ WeightRows(const T* weight, int first, int channels, int depth, int thread, int begin)
      : weight_(weight), depth_(depth), thread_(thread) {
    const int row = first + Pattern::row(thread, 0);
    rows_left_ = channels - row;
    k_ = begin + Pattern::chunk(thread) * kChunk<T>;
    offset_ = static_cast<int64_t>(row) * depth + k_;
  }

  __device__ void load(uint32_t tile) {
#pragma unroll
    for (int i = 0; i < Pattern::kCopies; ++i) {
      if (!Pattern::copies(thread_, i)) continue;
      const bool inside = k_ < depth_ && i * Pattern::kRowStep < rows_left_;
      const int64_t from = offset_ + static_cast<int64_t>(i * Pattern::kRowStep) * depth_;
      const uint32_t to = Pattern::Tile::offset(Pattern::row(thread_, i), Pattern::chunk(thread_));
      ptx::cp_async16(tile + to, weight_ + (inside ? from : 0), inside);
    }
    k_ += kDepth;
    offset_ += kDepth;
  }

 private:
  const T* weight_;
  int depth_, thread_, rows_left_, k_;
  int64_t offset_;
};

}  // namespace resnet_fused::cuda::sm80
