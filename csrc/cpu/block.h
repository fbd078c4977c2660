// The CPU kernels' interface, free of torch: a residual block (or one layer, or a stem) as a chain of convolutions
// that is computed band by band, with everything between input and output kept in the core's own cache.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace resnet_fused::cpu {

enum class DType : int { kF32 = 0, kBf16 = 1 };
enum class Algorithm : int { kDirect = 0, kWinograd2 = 1, kWinograd4 = 2 };

inline int64_t element_size(DType t) { return t == DType::kBf16 ? 2 : 4; }
// F(m x m, 3x3): m; 0 for direct.
inline int winograd_m(Algorithm a) { return a == Algorithm::kDirect ? 0 : a == Algorithm::kWinograd2 ? 2 : 4; }

struct ConvShape {
  int c = 1, k = 1;  // input and output channels, over all groups
  int r = 1, s = 1;  // kernel height and width
  int stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dil_h = 1, dil_w = 1, groups = 1;

  int out_h(int h) const { return (h + 2 * pad_h - dil_h * (r - 1) - 1) / stride_h + 1; }
  int out_w(int w) const { return (w + 2 * pad_w - dil_w * (s - 1) - 1) / stride_w + 1; }
};

// A square kernel whose padding keeps the image's size at stride 1.
inline ConvShape square_conv(int c, int k, int kernel, int stride, int dilation) {
  ConvShape s;
  s.c = c;
  s.k = k;
  s.r = s.s = kernel;
  s.stride_h = s.stride_w = stride;
  s.dil_h = s.dil_w = dilation;
  s.pad_h = s.pad_w = kernel / 2 * dilation;
  return s;
}

// fn(begin, end, context) over [0, count), in threads or not.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
struct Parallel {
  void (*run)(int64_t count, ParallelBody body, void* context);
  int threads;
};

constexpr int64_t kKeptWeights = 1 << 20;  // bytes of weights that stay in L2 beside pixels

// ---- packed weights (pack.cpp) -----------------------------------------------------------------------------------
// [group][panel of output channels][tap or frequency][word of input channels][panel], after a header of 64 bytes.
constexpr uint32_t kPackMagic = 0x52464b31;
struct alignas(64) PackHeader {
  uint32_t magic;
  int32_t isa;
  int32_t algorithm;
  int32_t bf16;  // words are pairs of bfloat16; else float32
  int32_t k, c, r, s, groups;
  int32_t words;   // 32-bit words per tap, padding included
  int32_t panels;  // per group
};
struct PackShape {
  bool bf16;
  bool flat;  // one tap over the whole window (few channels): rows of A are gathered
  int panel;  // output channels
  int taps, words, panels;
  int64_t panel_bytes, bytes;  // of one panel; of all, header included
};
// Throws std::invalid_argument where the algorithm cannot take the kernel.
PackShape pack_shape(const Kernels&, const ConvShape&, DType, Algorithm);
// weight: OIHW, dense. `out` has pack_shape().bytes bytes, 64-byte aligned.
void pack(const Kernels&, const ConvShape&, DType, Algorithm, const void* weight, void* out, const Parallel&);

// ---- blocks (chain.cpp) ------------------------------------------------------------------------------------------
struct Layer {
  ConvShape shape;
  Algorithm algorithm = Algorithm::kDirect;
  const PackHeader* packed = nullptr;
  const float* scale = nullptr;  // [k]; null: ones
  const float* shift = nullptr;  // [k]; null: zeros
  bool relu = true;
};

struct Pool {
  int kernel = 0, stride = 1, pad = 0;  // kernel 0: no pooling
  int out(int size) const { return (size + 2 * pad - kernel) / stride + 1; }
};

// An NHWC image or a slice of its channels: elements from pixel to pixel; 0: as many as there are channels.
using Pitch = int64_t;

// out = pool(layers[...]) or relu?(layers[...] + shortcut)
struct Block {
  int n = 0, h = 0, w = 0;  // of x
  DType dtype = DType::kF32;
  const void* x = nullptr;
  void* out = nullptr;
  Pitch x_pitch = 0, out_pitch = 0, residual_pitch = 0;
  bool reread = false;  // out is read again soon, and is to stay in the caches
  // The prologue: the first layer and the projection read relu(x * in_scale + in_shift), padded with zeros after that.
  const float* in_scale = nullptr;  // [c] of x; null: no prologue
  const float* in_shift = nullptr;
  bool average = false;  // ... of which they read the averages of 2x2 pixels; an odd last row or column is dropped
  int layer_count = 0;
  Layer layers[3];
  bool has_projection = false;
  Layer projection;                // 1x1 from x, added before the last layer's activation
  const void* residual = nullptr;  // or a tensor of out's shape
  Pool pool;
};

// How a block is cut up. Workspace per thread: see workspace_bytes.
struct Schedule {
  int images;               // per unit of work
  int bands;                // row bands an image is cut into
  int rows;                 // output rows per step within a band
  bool split_channels;      // threads share each layer's output channels instead of images and bands
  int64_t workspace_bytes;  // per thread: at most the rows of a step, the overlap of the windows, and packed tiles
};
RF_EXPORT Schedule schedule(const Kernels&, const Block&, int threads);

// Blocks that read what those before them wrote: image i of a block nothing but image i of earlier ones. Memory may be
// written again by a block two places further on, if it has images of the same size.
class Sequence {
 public:
  // Throws std::invalid_argument on a pack of another instruction set, shape or algorithm.
  Sequence(const Kernels&, std::vector<Block>, int threads);
  ~Sequence();
  // What block i reads, adds (null: nothing) and writes from now on.
  void bind(size_t i, const void* x, const void* residual, void* out);
  // With as many threads as it was made for; one run at a time.
  void run(const Parallel&);

 private:
  struct Prepared;
  std::unique_ptr<Prepared> prepared_;
};
void run_block(const Kernels&, const Block&, const Parallel&);

// ---- dense blocks (dense.cpp) ------------------------------------------------------------------------------------
// All layers of a dense block share one buffer of c + count * growth channels: layer i reads its first c + i * growth
// and writes the next `growth`. A layer is 1x1 to `mid`, ReLU, 3x3, each with a scale and shift; mid 0: only the 3x3.
struct DenseShape {
  int n = 0, h = 0, w = 0, c = 0, growth = 0, mid = 0, count = 0;
  DType dtype = DType::kF32;
  Algorithm algorithm = Algorithm::kDirect;  // of the 3x3

  int channels(int layer) const { return c + layer * growth; }
};
// Layer `i` on the buffer; the caller sets the weights and vectors.
RF_EXPORT Block dense_layer(const DenseShape&, int i, void* buffer);
// x, NHWC, [n, h, w, c], into the first channels of the buffer.
void copy_into_buffer(const DenseShape&, const void* x, Pitch x_pitch, void* buffer, const Parallel&);
// `layers`: from dense_layer.
void run_dense_block(const Kernels&, const DenseShape&, const void* x, Pitch x_pitch, void* buffer,
                     const std::vector<Block>& layers, const Parallel&);

// ---- heads (head.cpp) --------------------------------------------------------------------------------------------
// out = linear(mean of x over its pixels): the means stay float32.
struct Head {
  int n = 0, h = 0, w = 0, c = 0, k = 0;  // of x; k: outputs
  DType dtype = DType::kF32;
  const void* x = nullptr;
  Pitch x_pitch = 0;
  const void* weight = nullptr;  // [k, c], dense
  const float* bias = nullptr;   // [k]; null: zeros
  void* out = nullptr;           // [n, k]
};
void run_head(const Kernels&, const Head&, const Parallel&);

}  // namespace resnet_fused::cpu
