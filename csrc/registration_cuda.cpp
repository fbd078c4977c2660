// The CUDA ops of the native library, on the LibTorch stable ABI like registration.cpp. Their schemas are defined in
// resnet_fused/kernels/cuda.py; here are the checks, the output, the workspace and the launch on torch's current
// stream. Nothing waits for the GPU and all memory is torch's, so every op can be captured in a CUDA graph.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <climits>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/api.h"

// Defined in libtorch_cuda.so: null beside a torch without CUDA, where the library loads all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace {

namespace stable = torch::stable;
namespace cuda = resnet_fused::cuda;
using stable::Tensor;
using torch::headeronly::ScalarType;
using Ints = std::vector<int64_t>;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) cudaGetLastError();  // or a later call would report it again
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

cudaStream_t current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch has no CUDA support");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

const cuda::Device& device_of(int32_t index) {
  constexpr int kMost = 64;
  static std::array<std::once_flag, kMost> asked;
  static std::array<cuda::Device, kMost> devices;
  STD_TORCH_CHECK(index >= 0 && index < kMost, "device index: expected 0 to ", kMost - 1, ", got ", index);
  std::call_once(asked[index], [&] {
    int major = 0, minor = 0;
    cuda::Device d;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, index), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&d.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
          "cudaDeviceGetAttribute");
    d.arch = 10 * major + minor;
    devices[index] = d;
  });
  return devices[index];
}

// ---- arguments -----------------------------------------------------------------------------------------------------
cuda::DType dtype_of(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) return cuda::DType::kF32;
  if (x.scalar_type() == ScalarType::Half) return cuda::DType::kF16;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16,
                  "x: expected float32, float16 or bfloat16, got another dtype");
  return cuda::DType::kBf16;
}

void check_beside(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.is_cuda(), name, ": expected a CUDA tensor");
  STD_TORCH_CHECK(t.get_device_index() == x.get_device_index(), name, ": expected device ", x.get_device_index(),
                  " as x, got ", t.get_device_index());
}

// NCHW sizes in NHWC order, dense or a slice of the channels; strides of dimensions of size 1 do not matter. Returns
// the elements from pixel to pixel.
int64_t pitch_of(const Tensor& t, const Tensor& x, const char* name) {
  check_beside(t, x, name);
  STD_TORCH_CHECK(t.dim() == 4, name, ": expected 4 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, ": expected the dtype of x, got another");
  const int64_t n = t.size(0), c = t.size(1), h = t.size(2), w = t.size(3);
  const int64_t pitch = w > 1 ? t.stride(3) : h > 1 ? t.stride(2) : n > 1 ? t.stride(0) : c;
  STD_TORCH_CHECK(pitch >= c && (c == 1 || t.stride(1) == 1) && (h == 1 || t.stride(2) == w * pitch) &&
                      (n == 1 || t.stride(0) == h * w * pitch),
                  name, ": expected channels_last memory format, or a slice of its channels");
  for (int64_t size : {n, c, h, w}) STD_TORCH_CHECK(size <= INT_MAX, name, ": expected sizes below 2**31, got ", size);
  return pitch;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// pitch_of, of memory that is read and written 16 bytes at a time. Whether the channels are multiples of as much, each
// kernel says.
int64_t aligned_pitch_of(const Tensor& t, const Tensor& x, const char* name) {
  const int64_t pitch = pitch_of(t, x, name), size = cuda::element_size(dtype_of(t));
  STD_TORCH_CHECK(is_aligned(t.const_data_ptr()) && (pitch == t.size(1) || pitch * size % 16 == 0), name,
                  ": expected its start and the distance from pixel to pixel to be multiples of 16 bytes");
  return pitch;
}

const float* vector_of(const std::optional<Tensor>& t, const Tensor& x, int64_t size, const char* name) {
  if (!t) return nullptr;
  check_beside(*t, x, name);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->dim() == 1 && t->is_contiguous() && t->size(0) == size,
                  name, ": expected a contiguous float32 vector of ", size);
  return static_cast<const float*>(t->const_data_ptr());
}

cuda::Layer layer_of(const Tensor& weight, const std::optional<Tensor>& scale, const Tensor& shift, const Tensor& x,
                     int64_t channels, int64_t taps, const char* name) {
  STD_TORCH_CHECK(aligned_pitch_of(weight, x, name) == weight.size(1), name,
                  ": expected dense channels_last memory format");
  STD_TORCH_CHECK(weight.size(1) == channels, name, ": expected ", channels, " input channels, got ", weight.size(1));
  STD_TORCH_CHECK(taps == 0 || (weight.size(2) == taps && weight.size(3) == taps), name, ": expected ", taps, "x", taps,
                  " taps, got ", weight.size(2), "x", weight.size(3));
  return {weight.const_data_ptr(), vector_of(scale, x, weight.size(0), "scale"),
          vector_of(shift, x, weight.size(0), "shift")};
}

int pick(const Ints& values, size_t i, const char* name) {
  STD_TORCH_CHECK(values.size() == 2, name, ": expected 2 numbers, got ", values.size());
  STD_TORCH_CHECK(values[i] >= 0 && values[i] <= 1 << 20, name, ": out of range, ", values[i]);
  return static_cast<int>(values[i]);
}

int output_size(int64_t size, int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
  STD_TORCH_CHECK(stride > 0 && dilation > 0, "stride, dilation: expected positive numbers");
  const int64_t room = size + 2 * padding - dilation * (taps - 1) - 1;
  STD_TORCH_CHECK(room >= 0, "x: the image is smaller than the kernel, ", size);
  return static_cast<int>(room / stride + 1);
}

template <class Params>
Params image_params(const Tensor& x) {
  Params p;
  p.x_pitch = std::is_same_v<Params, cuda::StemParams> ? pitch_of(x, x, "x") : aligned_pitch_of(x, x, "x");
  p.dtype = dtype_of(x);
  p.x = x.const_data_ptr();
  p.n = static_cast<int>(x.size(0));
  p.c = static_cast<int>(x.size(1));
  p.h = static_cast<int>(x.size(2));
  p.w = static_cast<int>(x.size(3));
  return p;
}

Tensor new_output(const Tensor& x, int64_t n, int64_t k, int64_t p, int64_t q) {
  const int64_t sizes[] = {n, k, p, q};
  return stable::empty({sizes, 4}, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                       torch::headeronly::MemoryFormat::ChannelsLast);
}

// ---- launch --------------------------------------------------------------------------------------------------------
template <class Params>
void run(const Tensor& x, const Params& params, const std::string& algorithm) {
  // A thread may come here without a context, which tensor maps are not encoded without: torch's guard sets none where
  // the device is the thread's own.
  check(cudaSetDevice(x.get_device_index()), "cudaSetDevice");
  const cuda::Device& device = device_of(x.get_device_index());
  std::string why;
  const cuda::Kernel<Params>* kernel = cuda::choose(params, device, algorithm, &why);
  STD_TORCH_CHECK(kernel, "algorithm ", algorithm, " cannot run this: ", why);
  const int64_t bytes = kernel->workspace_bytes(params, device);
  std::optional<Tensor> workspace;
  if (bytes) workspace = stable::empty({&bytes, 1}, ScalarType::Byte, std::nullopt, x.device());
  kernel->launch(params, device, workspace ? workspace->mutable_data_ptr() : nullptr,
                 current_stream(x.get_device_index()));
}

// A new output [n, k, p, q], computed unless it is empty.
template <class Params>
Tensor compute(const Tensor& x, Params& params, const std::string& algorithm) {
  Tensor out = new_output(x, params.n, params.k, params.p, params.q);
  params.out = out.mutable_data_ptr();
  params.out_pitch = params.k;
  if (out.numel()) run(x, params, algorithm);
  return out;
}

// ---- ops -----------------------------------------------------------------------------------------------------------
struct ConvArguments {
  const Tensor &x, &weight;
  const std::optional<Tensor>& scale;
  const Tensor& shift;
  const std::optional<Tensor>&residual, &in_scale, &in_shift, &x2, &weight2, &scale2;
  int64_t stride2;
  const Ints &stride, &padding, &dilation;
  bool relu;
};

cuda::ConvParams conv_params(const ConvArguments& a) {
  auto p = image_params<cuda::ConvParams>(a.x);
  p.conv = layer_of(a.weight, a.scale, a.shift, a.x, p.c, 0, "weight");
  p.in_scale = vector_of(a.in_scale, a.x, p.c, "in_scale");
  p.in_shift = vector_of(a.in_shift, a.x, p.c, "in_shift");
  STD_TORCH_CHECK(!p.in_scale == !p.in_shift, "in_scale, in_shift: expected both or neither");
  STD_TORCH_CHECK(is_aligned(p.in_scale) && is_aligned(p.in_shift), "in_scale, in_shift: expected starts at 16 bytes");
  p.k = static_cast<int>(a.weight.size(0));
  p.r = static_cast<int>(a.weight.size(2));
  p.s = static_cast<int>(a.weight.size(3));
  p.stride_h = pick(a.stride, 0, "stride");
  p.stride_w = pick(a.stride, 1, "stride");
  p.pad_h = pick(a.padding, 0, "padding");
  p.pad_w = pick(a.padding, 1, "padding");
  p.dil_h = pick(a.dilation, 0, "dilation");
  p.dil_w = pick(a.dilation, 1, "dilation");
  p.p = output_size(p.h, p.r, p.stride_h, p.pad_h, p.dil_h);
  p.q = output_size(p.w, p.s, p.stride_w, p.pad_w, p.dil_w);
  p.relu = a.relu;
  auto check_shape = [&](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.size(0) == p.n && t.size(1) == p.k && t.size(2) == p.p && t.size(3) == p.q, name, ": expected [",
                    p.n, ", ", p.k, ", ", p.p, ", ", p.q, "], got [", t.size(0), ", ", t.size(1), ", ", t.size(2), ", ",
                    t.size(3), "]");
  };
  if (a.residual) {
    p.residual_pitch = aligned_pitch_of(*a.residual, a.x, "residual");
    check_shape(*a.residual, "residual");
    p.residual = a.residual->const_data_ptr();
  }
  STD_TORCH_CHECK(a.x2.has_value() == a.weight2.has_value(), "x2, weight2: expected both or neither");
  if (a.x2) {
    cuda::ConvParams::Projection& second = p.projection;
    second.x_pitch = aligned_pitch_of(*a.x2, a.x, "x2");
    second.c = static_cast<int>(a.x2->size(1));
    second.h = static_cast<int>(a.x2->size(2));
    second.w = static_cast<int>(a.x2->size(3));
    second.stride = static_cast<int>(a.stride2);
    STD_TORCH_CHECK(a.x2->size(0) == p.n && output_size(second.h, 1, second.stride, 0, 1) == p.p &&
                        output_size(second.w, 1, second.stride, 0, 1) == p.q,
                    "x2: its 1x1 convolution has not the shape of the output");
    const cuda::Layer layer = layer_of(*a.weight2, a.scale2, a.shift, a.x, second.c, 1, "weight2");
    STD_TORCH_CHECK(a.weight2->size(0) == p.k, "weight2: expected ", p.k, " output channels, got ", a.weight2->size(0));
    second.x = a.x2->const_data_ptr();
    second.weight = layer.weight;
    second.scale = layer.scale;
  }
  return p;
}

Tensor cuda_conv(const Tensor& x, const Tensor& weight, std::optional<Tensor> scale, const Tensor& shift,
                 std::optional<Tensor> residual, std::optional<Tensor> in_scale, std::optional<Tensor> in_shift,
                 std::optional<Tensor> x2, std::optional<Tensor> weight2, std::optional<Tensor> scale2, int64_t stride2,
                 Ints stride, Ints padding, Ints dilation, bool relu, std::string algorithm) {
  STD_TORCH_CHECK(x.is_cuda(), "x: expected a CUDA tensor");
  const stable::accelerator::DeviceGuard guard(x.get_device_index());
  auto p = conv_params({x, weight, scale, shift, residual, in_scale, in_shift, x2, weight2, scale2, stride2, stride,
                        padding, dilation, relu});
  return compute(x, p, algorithm);
}

void cuda_conv_out(const Tensor& x, const Tensor& weight, std::optional<Tensor> scale, const Tensor& shift,
                   std::optional<Tensor> residual, std::optional<Tensor> in_scale, std::optional<Tensor> in_shift,
                   Ints stride, Ints padding, Ints dilation, bool relu, std::string algorithm, Tensor out) {
  STD_TORCH_CHECK(x.is_cuda(), "x: expected a CUDA tensor");
  const stable::accelerator::DeviceGuard guard(x.get_device_index());
  const std::optional<Tensor> none;
  auto p = conv_params(
      {x, weight, scale, shift, residual, in_scale, in_shift, none, none, none, 1, stride, padding, dilation, relu});
  p.out_pitch = aligned_pitch_of(out, x, "out");
  STD_TORCH_CHECK(out.size(0) == p.n && out.size(1) == p.k && out.size(2) == p.p && out.size(3) == p.q,
                  "out: expected [", p.n, ", ", p.k, ", ", p.p, ", ", p.q, "]");
  p.out = out.mutable_data_ptr();
  if (out.numel()) run(x, p, algorithm);
}

Tensor cuda_bottleneck(const Tensor& x, const Tensor& w1, std::optional<Tensor> s1, const Tensor& b1, const Tensor& w2,
                       std::optional<Tensor> s2, const Tensor& b2, const Tensor& w3, std::optional<Tensor> s3,
                       const Tensor& b3, std::optional<Tensor> wd, std::optional<Tensor> sd, std::optional<Tensor> bd,
                       int64_t stride1, int64_t stride2, int64_t dilation, std::string algorithm) {
  STD_TORCH_CHECK(x.is_cuda(), "x: expected a CUDA tensor");
  const stable::accelerator::DeviceGuard guard(x.get_device_index());
  auto p = image_params<cuda::BottleneckParams>(x);
  p.conv1 = layer_of(w1, s1, b1, x, p.c, 1, "w1");
  p.mid = static_cast<int>(w1.size(0));
  p.conv2 = layer_of(w2, s2, b2, x, p.mid, 3, "w2");
  STD_TORCH_CHECK(w2.size(0) == p.mid, "w2: expected ", p.mid, " output channels, got ", w2.size(0));
  p.conv3 = layer_of(w3, s3, b3, x, p.mid, 1, "w3");
  p.k = static_cast<int>(w3.size(0));
  p.stride1 = static_cast<int>(stride1);
  p.stride2 = static_cast<int>(stride2);
  p.dilation = static_cast<int>(dilation);
  p.p = output_size(output_size(p.h, 1, stride1, 0, 1), 3, stride2, dilation, dilation);
  p.q = output_size(output_size(p.w, 1, stride1, 0, 1), 3, stride2, dilation, dilation);
  if (wd) {
    STD_TORCH_CHECK(bd.has_value(), "bd: expected a vector beside wd, got None");
    p.projection = layer_of(*wd, sd, *bd, x, p.c, 1, "wd");
  }
  STD_TORCH_CHECK(wd ? wd->size(0) == p.k : p.c == p.k && stride1 * stride2 == 1,
                  "wd: expected a projection to the output's channels unless x fits the output");
  return compute(x, p, algorithm);
}

Tensor cuda_basic_block(const Tensor& x, const Tensor& w1, std::optional<Tensor> s1, const Tensor& b1, const Tensor& w2,
                        std::optional<Tensor> s2, const Tensor& b2, std::optional<Tensor> wd, std::optional<Tensor> sd,
                        std::optional<Tensor> bd, int64_t stride, int64_t dilation, std::string algorithm) {
  STD_TORCH_CHECK(x.is_cuda(), "x: expected a CUDA tensor");
  const stable::accelerator::DeviceGuard guard(x.get_device_index());
  auto p = image_params<cuda::BasicBlockParams>(x);
  p.conv1 = layer_of(w1, s1, b1, x, p.c, 3, "w1");
  p.mid = static_cast<int>(w1.size(0));
  p.conv2 = layer_of(w2, s2, b2, x, p.mid, 3, "w2");
  p.k = static_cast<int>(w2.size(0));
  p.stride = static_cast<int>(stride);
  p.dilation = static_cast<int>(dilation);
  p.p = output_size(p.h, 3, stride, dilation, dilation);
  p.q = output_size(p.w, 3, stride, dilation, dilation);
  if (wd) {
    STD_TORCH_CHECK(bd.has_value(), "bd: expected a vector beside wd, got None");
    p.projection = layer_of(*wd, sd, *bd, x, p.c, 1, "wd");
  }
  STD_TORCH_CHECK(wd ? wd->size(0) == p.k : p.c == p.k && stride == 1,
                  "wd: expected a projection to the output's channels unless x fits the output");
  return compute(x, p, algorithm);
}

// y, and h1_next with w1.
std::vector<Tensor> cuda_rotated(const Tensor& h1, const Tensor& w2, std::optional<Tensor> s2, const Tensor& b2,
                                 const Tensor& w3, std::optional<Tensor> s3, const Tensor& b3, const Tensor& x,
                                 std::optional<Tensor> w1, std::optional<Tensor> s1, std::optional<Tensor> b1,
                                 std::string algorithm) {
  STD_TORCH_CHECK(x.is_cuda(), "x: expected a CUDA tensor");
  const stable::accelerator::DeviceGuard guard(x.get_device_index());
  cuda::RotatedParams p;
  p.dtype = dtype_of(x);
  p.h1_pitch = aligned_pitch_of(h1, x, "h1");
  p.x_pitch = aligned_pitch_of(x, x, "x");
  p.n = static_cast<int>(x.size(0));
  p.k = static_cast<int>(x.size(1));
  p.h = static_cast<int>(x.size(2));
  p.w = static_cast<int>(x.size(3));
  p.mid = static_cast<int>(h1.size(1));
  STD_TORCH_CHECK(h1.size(0) == p.n && h1.size(2) == p.h && h1.size(3) == p.w, "h1: expected images of ", p.n, ", ",
                  p.h, "x", p.w, " as x, got ", h1.size(0), ", ", h1.size(2), "x", h1.size(3));
  const auto check_outputs = [](const Tensor& weight, int channels, const char* name) {
    STD_TORCH_CHECK(weight.size(0) == channels, name, ": expected ", channels, " output channels, got ",
                    weight.size(0));
  };
  p.conv2 = layer_of(w2, s2, b2, x, p.mid, 3, "w2");
  check_outputs(w2, p.mid, "w2");
  p.conv3 = layer_of(w3, s3, b3, x, p.mid, 1, "w3");
  check_outputs(w3, p.k, "w3");
  p.h1 = h1.const_data_ptr();
  p.x = x.const_data_ptr();
  std::vector<Tensor> outputs{new_output(x, p.n, p.k, p.h, p.w)};
  p.y = outputs[0].mutable_data_ptr();
  p.y_pitch = p.k;
  if (w1) {
    STD_TORCH_CHECK(b1.has_value(), "b1: expected a vector beside w1, got None");
    p.conv1 = layer_of(*w1, s1, *b1, x, p.k, 1, "w1");
    check_outputs(*w1, p.mid, "w1");
    outputs.push_back(new_output(x, p.n, p.mid, p.h, p.w));
    p.h1_next = outputs[1].mutable_data_ptr();
    p.h1_next_pitch = p.mid;
  }
  if (outputs[0].numel()) run(x, p, algorithm);
  return outputs;
}

Tensor cuda_stem(const Tensor& x, const Tensor& weight, std::optional<Tensor> scale, const Tensor& shift,
                 int64_t stride, int64_t padding, int64_t pool_kernel, int64_t pool_stride, int64_t pool_padding,
                 std::string algorithm) {
  STD_TORCH_CHECK(x.is_cuda(), "x: expected a CUDA tensor");
  const stable::accelerator::DeviceGuard guard(x.get_device_index());
  auto p = image_params<cuda::StemParams>(x);
  p.conv = layer_of(weight, scale, shift, x, p.c, 0, "weight");
  p.k = static_cast<int>(weight.size(0));
  p.r = static_cast<int>(weight.size(2));
  p.s = static_cast<int>(weight.size(3));
  p.stride = static_cast<int>(stride);
  p.pad = static_cast<int>(padding);
  p.pool_kernel = static_cast<int>(pool_kernel);
  p.pool_stride = static_cast<int>(pool_stride);
  p.pool_padding = static_cast<int>(pool_padding);
  p.conv_p = output_size(p.h, p.r, stride, padding, 1);
  p.conv_q = output_size(p.w, p.s, stride, padding, 1);
  p.p = output_size(p.conv_p, pool_kernel, pool_stride, pool_padding, 1);
  p.q = output_size(p.conv_q, pool_kernel, pool_stride, pool_padding, 1);
  return compute(x, p, algorithm);
}

}  // namespace

#define RESNET_FUSED_OPS(m)                                  \
  m.impl("_cuda_conv", TORCH_BOX(&cuda_conv));               \
  m.impl("_cuda_conv_out", TORCH_BOX(&cuda_conv_out));       \
  m.impl("_cuda_bottleneck", TORCH_BOX(&cuda_bottleneck));   \
  m.impl("_cuda_basic_block", TORCH_BOX(&cuda_basic_block)); \
  m.impl("_cuda_rotated", TORCH_BOX(&cuda_rotated));         \
  m.impl("_cuda_stem", TORCH_BOX(&cuda_stem))

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { RESNET_FUSED_OPS(m); }
// For the sentence that a CPU tensor is met with.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { RESNET_FUSED_OPS(m); }
