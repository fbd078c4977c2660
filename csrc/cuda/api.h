// The CUDA kernels as the rest of the library sees them: parameters of an op, and the table of compiled kernels that
// run it. Free of torch and Python. A kernel joins the table where it is instantiated (csrc/cuda/sm80, csrc/cuda/sm90):
//
//   const Registered<ConvParams> conv_128x128x32{implicit_gemm<__nv_bfloat16, 128, 128, 32, 4>()};
//
// Images are NHWC; `pitch` is the number of elements from one pixel to the next, so that an image may be a slice of the
// channels of a wider one. Weights are [k][r][s][c] without gaps. Pointers to images and weights are aligned to 16
// bytes and pitches are multiples of 16 bytes, unless a kernel says otherwise; so are in_scale and in_shift. Scales may
// be null, which means 1.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/types.h"

namespace resnet_fused::cuda {

struct Layer {  // weight, and what BatchNorm became
  const void* weight = nullptr;
  const float* scale = nullptr;
  const float* shift = nullptr;
};

// out = activation(conv(x) * scale + shift [+ residual] [+ (1x1 conv of x2) * scale2]), where conv's input is x or,
// with in_scale, relu(x * in_scale + in_shift) rounded to the dtype, padded with zeros after that.
struct ConvParams {
  DType dtype{};
  const void* x = nullptr;
  int64_t x_pitch = 0;
  Layer conv;
  const void* residual = nullptr;  // [n][p][q][k] or null
  int64_t residual_pitch = 0;
  const float* in_scale = nullptr;  // [c], with in_shift, or null
  const float* in_shift = nullptr;
  void* out = nullptr;
  int64_t out_pitch = 0;
  int n = 0, h = 0, w = 0, c = 0, k = 0, r = 1, s = 1;
  int stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dil_h = 1, dil_w = 1;
  int p = 0, q = 0;  // output height and width
  bool relu = true;

  // Dual accumulation: a 1x1 convolution of another image into the same output; its shift is part of conv.shift.
  struct Projection {
    const void* x = nullptr;  // [n][h][w][c], null for none
    int64_t x_pitch = 0;
    const void* weight = nullptr;  // [k][c]
    const float* scale = nullptr;
    int h = 0, w = 0, c = 0, stride = 1;
  } projection;
};

// relu(conv3(relu(conv2(relu(conv1(x))))) + shortcut): 1x1, 3x3, 1x1; the shortcut is x or projection(x).
struct BottleneckParams {
  DType dtype{};
  const void* x = nullptr;
  int64_t x_pitch = 0;
  Layer conv1, conv2, conv3, projection;  // projection.weight is null for an identity
  void* out = nullptr;
  int64_t out_pitch = 0;
  int n = 0, h = 0, w = 0, c = 0, mid = 0, k = 0;
  int stride1 = 1, stride2 = 1, dilation = 1;
  int p = 0, q = 0;
};

// relu(conv2(relu(conv1(x))) + shortcut): 3x3, 3x3.
struct BasicBlockParams {
  DType dtype{};
  const void* x = nullptr;
  int64_t x_pitch = 0;
  Layer conv1, conv2, projection;
  void* out = nullptr;
  int64_t out_pitch = 0;
  int n = 0, h = 0, w = 0, c = 0, mid = 0, k = 0;
  int stride = 1, dilation = 1;
  int p = 0, q = 0;
};

// A bottleneck with an identity shortcut from its 3x3 on, and the next block's first layer: one launch of a chain.
//   h2 = relu(conv2(h1))   y = relu(conv3(h2) + x)   h1_next = relu(conv1(y))
struct RotatedParams {
  DType dtype{};
  const void* h1 = nullptr;  // [n][h][w][mid], what this block's first layer gave
  int64_t h1_pitch = 0;
  const void* x = nullptr;  // [n][h][w][k], this block's input
  int64_t x_pitch = 0;
  Layer conv2, conv3, conv1;  // conv1 is of the next block; its weight is null at the end of a chain
  void* y = nullptr;          // [n][h][w][k]
  int64_t y_pitch = 0;
  void* h1_next = nullptr;  // [n][h][w][mid], with conv1
  int64_t h1_next_pitch = 0;
  int n = 0, h = 0, w = 0, mid = 0, k = 0;
};

// max_pool(relu(conv(x))). Any alignment of x: c is 3.
struct StemParams {
  DType dtype{};
  const void* x = nullptr;
  int64_t x_pitch = 0;
  Layer conv;
  void* out = nullptr;
  int64_t out_pitch = 0;
  int n = 0, h = 0, w = 0, c = 0, k = 0, r = 0, s = 0, stride = 1, pad = 0;
  int pool_kernel = 1, pool_stride = 1, pool_padding = 0;
  int conv_p = 0, conv_q = 0;  // the convolution's output
  int p = 0, q = 0;            // after pooling
};

// A compiled kernel that runs an op. The functions are pure: `device` stands for a GPU, none need be there.
template <class Params>
struct Kernel {
  const char* name;       // unique: "conv80_bf16_128x128x32_s4"
  const char* algorithm;  // "implicit_gemm", "split_k", "whole", ...
  int arch;               // 80: that and everything later; 90: sm_90a only
  DType dtype;
  int tile_m, tile_n, tile_k, stages;
  int threads;
  int shared_bytes;      // dynamic shared memory of a block, the most it can ask for
  const void* function;  // the __global__ function, for its registers

  // Why it cannot run this, null if it can. dtype, arch and shared_bytes are checked by whoever asks.
  const char* (*unsupported)(const Params&);
  // Predicted microseconds: only the order of the kernels matters.
  float (*estimate)(const Params&, const Device&);
  // Bytes of device memory it needs, uninitialised, aligned to 256.
  int64_t (*workspace_bytes)(const Params&, const Device&);
  // Throws std::runtime_error; nothing but kernel launches on the stream.
  void (*launch)(const Params&, const Device&, void* workspace, cudaStream_t);
};

// All kernels of an op, ordered by name.
template <class Params>
const std::vector<Kernel<Params>>& kernels();

// Why this kernel cannot run this here, empty if it can.
template <class Params>
std::string unsupported(const Kernel<Params>&, const Params&, const Device&);

// The kernel of the least estimate among those that can run this. `wanted` is empty, an algorithm or a kernel's name.
// Null if there is none; then `why` says what the last one lacked.
template <class Params>
const Kernel<Params>* choose(const Params&, const Device&, const std::string& wanted, std::string* why);

// One of these with static storage in a .cu file puts a kernel into the table.
template <class Params>
struct Registered {
  explicit Registered(const Kernel<Params>&);
};

}  // namespace resnet_fused::cuda
