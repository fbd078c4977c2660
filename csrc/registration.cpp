// The tensor ops of the native library, on the LibTorch stable ABI: one shared object for every Python and torch
// >= 2.11. Their schemas are defined in Python (resnet_fused/kernels/cpu.py); here are the checks, the output and the
// launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/block.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/program.h"

namespace {

namespace stable = torch::stable;
namespace cpu = resnet_fused::cpu;
using stable::Tensor;
using torch::headeronly::ScalarType;
using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

cpu::Parallel torch_threads() {
  return {[](int64_t count, cpu::ParallelBody body, void* context) {
            stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
          },
          static_cast<int>(stable::get_num_threads())};
}

cpu::DType dtype_of(const Tensor& t, const char* name) {
  if (t.scalar_type() == ScalarType::Float) return cpu::DType::kF32;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16, name, ": expected float32 or bfloat16, got another dtype");
  return cpu::DType::kBf16;
}

cpu::Algorithm algorithm_of(const std::string& name) {
  if (name == "direct") return cpu::Algorithm::kDirect;
  if (name == "winograd2") return cpu::Algorithm::kWinograd2;
  STD_TORCH_CHECK(name == "winograd4", "algorithm: expected direct, winograd2 or winograd4, got ", name);
  return cpu::Algorithm::kWinograd4;
}

// Blocks that are to run again and again, and the tensors that they point into. `recording` is the one that this thread
// is making: blocks are then written there and not computed.
struct Recording {
  static constexpr int kUnknown = -2;
  static constexpr uint64_t kMagic = 0x7266726563303031;

  uint64_t magic = kMagic;
  const void* x;
  std::vector<cpu::Step> steps;
  bool plain = true;  // nothing else was run
  std::vector<Tensor> kept;

  explicit Recording(const void* input) : x(input) {}

  // The latest: memory of an output that is gone may have been taken again.
  int source(const void* data) const {
    for (int i = static_cast<int>(steps.size()); i-- > 0;)
      if (steps[i].block.out == data) return i;
    return data == x ? cpu::Step::kInput : kUnknown;
  }
  cpu::Step& add(const cpu::Block& block, int64_t c, const std::array<int64_t, 4>& out) {
    const cpu::Step step{block, c, out, source(block.x), block.residual ? source(block.residual) : cpu::Step::kInput};
    plain = plain && step.x != kUnknown && step.residual != kUnknown;
    return steps.emplace_back(step);
  }
};
thread_local std::unique_ptr<Recording> recording;

void keep(const Tensor& t) {
  if (recording) recording->kept.push_back(t);
}

// NCHW sizes in NHWC order, dense or a slice of the channels; strides of dimensions of size 1 do not matter. Returns
// the elements from pixel to pixel.
cpu::Pitch check_image(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, ": expected 4 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  const int64_t n = t.size(0), c = t.size(1), h = t.size(2), w = t.size(3);
  const cpu::Pitch pitch = w > 1 ? t.stride(3) : h > 1 ? t.stride(2) : n > 1 ? t.stride(0) : c;
  STD_TORCH_CHECK(t.numel() == 0 || (pitch >= c && (c == 1 || t.stride(1) == 1) &&
                                     (h == 1 || t.stride(2) == w * pitch) && (n == 1 || t.stride(0) == h * w * pitch)),
                  name, ": expected channels_last memory format, or a slice of its channels");
  return pitch;
}

const float* vector_of(const Tensor& t, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.dim() == 1, name,
                  ": expected a contiguous float32 CPU vector");
  STD_TORCH_CHECK(t.size(0) == size, name, ": expected ", size, " channels, got ", t.size(0));
  keep(t);
  return static_cast<const float*>(t.const_data_ptr());
}

const cpu::PackHeader& header_of(const Tensor& packed, const char* name = "packed") {
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
                      packed.numel() >= static_cast<int64_t>(sizeof(cpu::PackHeader)),
                  name, ": expected a tensor made by _cpu_pack");
  const void* header = packed.const_data_ptr();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(header) % 64 == 0, name, ": expected packed weights aligned to 64 bytes");
  keep(packed);
  return *static_cast<const cpu::PackHeader*>(header);
}

// Without scale and shift: the plain convolution.
cpu::Layer layer_of(const Tensor& packed, cpu::ConvShape shape, cpu::Algorithm algorithm, bool relu, const char* name) {
  cpu::Layer l;
  l.shape = shape;
  l.algorithm = algorithm;
  l.packed = &header_of(packed, name);
  l.relu = relu;
  return l;
}
cpu::Layer layer_of(const Tensor& packed, const Tensor& scale, const Tensor& shift, cpu::ConvShape shape,
                    cpu::Algorithm algorithm, bool relu, const char* name) {
  cpu::Layer l = layer_of(packed, shape, algorithm, relu, name);
  l.scale = vector_of(scale, shape.k, "scale");
  l.shift = vector_of(shift, shape.k, "shift");
  return l;
}

void set_prologue(cpu::Block& b, const Tensor& in_scale, const Tensor& in_shift, int64_t channels) {
  b.in_scale = vector_of(in_scale, channels, "in_scale");
  b.in_shift = vector_of(in_shift, channels, "in_shift");
}

Tensor new_output(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t bytes = n * c * h * w * cpu::element_size(dtype_of(like, "x"));
  void* data = cpu::pool_allocate(static_cast<size_t>(bytes));
  const int64_t sizes[] = {n, c, h, w}, strides[] = {h * w * c, 1, w * c, c};
  return stable::from_blob(data, {sizes, 4}, {strides, 4}, like.device(), like.scalar_type(), &cpu::pool_free);
}

cpu::Block block_of(const Tensor& x) {
  cpu::Block b;
  b.x_pitch = check_image(x, "x");
  b.n = static_cast<int>(x.size(0));
  b.h = static_cast<int>(x.size(2));
  b.w = static_cast<int>(x.size(3));
  b.dtype = dtype_of(x, "x");
  b.x = x.const_data_ptr();
  return b;
}

// Sizes of the output, NCHW.
std::array<int64_t, 4> output_size(const Tensor& x, const cpu::Block& b) {
  int h = b.average ? b.h / 2 : b.h, w = b.average ? b.w / 2 : b.w;
  STD_TORCH_CHECK(x.size(1) == b.layers[0].shape.c, "x: expected ", b.layers[0].shape.c, " channels, got ", x.size(1));
  for (int l = 0; l < b.layer_count; ++l) {
    w = b.layers[l].shape.out_w(w);
    h = b.layers[l].shape.out_h(h);
  }
  if (b.pool.kernel) {
    h = b.pool.out(h);
    w = b.pool.out(w);
  }
  STD_TORCH_CHECK(h > 0 && w > 0, "x: the image is smaller than the kernel, ", b.h, "x", b.w);
  return {b.n, b.layers[b.layer_count - 1].shape.k, h, w};
}

Tensor run(const Tensor& x, cpu::Block& b) {
  const auto [n, k, h, w] = output_size(x, b);
  Tensor out = new_output(x, n, k, h, w);
  b.out = out.mutable_data_ptr();
  if (recording) {
    recording->add(b, x.size(1), {n, k, h, w});
    return out;
  }
  cpu::run_block(cpu::kernels(), b, torch_threads());
  return out;
}

int pick(const Ints& v, size_t i) { return static_cast<int>(v.size() == 1 ? v[0] : v.at(i)); }

// Winograd where asked for and possible: a 3x3 of a block with stride or dilation runs direct.
cpu::Algorithm three_by_three(const cpu::ConvShape& s, cpu::Algorithm wanted) {
  return s.stride_h == 1 && s.dil_h == 1 ? wanted : cpu::Algorithm::kDirect;
}

Tensor cpu_pack(const Tensor& weight, int64_t groups, std::string layout) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.is_cpu() && weight.is_contiguous(),
                  "weight: expected a contiguous 4-D CPU tensor");
  cpu::ConvShape s;
  s.k = static_cast<int>(weight.size(0));
  s.c = static_cast<int>(weight.size(1) * groups);
  s.r = static_cast<int>(weight.size(2));
  s.s = static_cast<int>(weight.size(3));
  s.groups = static_cast<int>(groups);
  const cpu::DType dtype = dtype_of(weight, "weight");
  const cpu::Algorithm algorithm = algorithm_of(layout);
  const cpu::Kernels& kernels = cpu::kernels();
  const int64_t bytes = cpu::pack_shape(kernels, s, dtype, algorithm).bytes;
  Tensor out = stable::empty({&bytes, 1}, ScalarType::Byte, std::nullopt, weight.device());
  cpu::pack(kernels, s, dtype, algorithm, weight.const_data_ptr(), out.mutable_data_ptr(), torch_threads());
  return out;
}

cpu::ConvShape conv_shape(const Tensor& packed, const Ints& kernel, const Ints& stride, const Ints& padding,
                          const Ints& dilation, int64_t groups) {
  cpu::ConvShape s;
  s.c = header_of(packed).c;
  s.k = header_of(packed).k;
  s.r = pick(kernel, 0);
  s.s = pick(kernel, 1);
  s.stride_h = pick(stride, 0);
  s.stride_w = pick(stride, 1);
  s.pad_h = pick(padding, 0);
  s.pad_w = pick(padding, 1);
  s.dil_h = pick(dilation, 0);
  s.dil_w = pick(dilation, 1);
  s.groups = static_cast<int>(groups);
  return s;
}

cpu::Block conv_block(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& shift,
                      const std::optional<Tensor>& residual, const std::optional<Tensor>& in_scale,
                      const std::optional<Tensor>& in_shift, const cpu::ConvShape& s, bool relu,
                      const std::string& algorithm) {
  cpu::Block b = block_of(x);
  b.layer_count = 1;
  b.layers[0] = layer_of(packed, scale, shift, s, algorithm_of(algorithm), relu, "packed");
  if (in_scale) set_prologue(b, *in_scale, in_shift.value(), s.c);
  if (residual) {
    b.residual_pitch = check_image(*residual, "residual");
    STD_TORCH_CHECK(residual->size(0) == b.n && residual->size(1) == s.k && residual->size(2) == s.out_h(b.h) &&
                        residual->size(3) == s.out_w(b.w) && residual->scalar_type() == x.scalar_type(),
                    "residual: expected the shape and dtype of the output");
    b.residual = residual->const_data_ptr();
  }
  return b;
}

Tensor cpu_conv(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& shift,
                std::optional<Tensor> residual, std::optional<Tensor> in_scale, std::optional<Tensor> in_shift,
                Ints kernel, Ints stride, Ints padding, Ints dilation, int64_t groups, bool relu,
                std::string algorithm) {
  const cpu::ConvShape s = conv_shape(packed, kernel, stride, padding, dilation, groups);
  cpu::Block b = conv_block(x, packed, scale, shift, residual, in_scale, in_shift, s, relu, algorithm);
  return run(x, b);
}

void cpu_conv_out(const Tensor& out, const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& shift,
                  std::optional<Tensor> residual, std::optional<Tensor> in_scale, std::optional<Tensor> in_shift,
                  Ints kernel, Ints stride, Ints padding, Ints dilation, int64_t groups, bool relu,
                  std::string algorithm) {
  const cpu::ConvShape s = conv_shape(packed, kernel, stride, padding, dilation, groups);
  cpu::Block b = conv_block(x, packed, scale, shift, residual, in_scale, in_shift, s, relu, algorithm);
  const auto [n, k, h, w] = output_size(x, b);
  b.out_pitch = check_image(out, "out");
  STD_TORCH_CHECK(out.size(0) == n && out.size(1) == k && out.size(2) == h && out.size(3) == w &&
                      out.scalar_type() == x.scalar_type(),
                  "out: expected [", n, ", ", k, ", ", h, ", ", w, "] of x's dtype, got [", out.size(0), ", ",
                  out.size(1), ", ", out.size(2), ", ", out.size(3), "]");
  b.out = out.mutable_data_ptr();
  b.reread = true;
  if (recording) recording->plain = false;
  cpu::run_block(cpu::kernels(), b, torch_threads());
}

// Shortcut of a block: its projection, or x itself.
void add_shortcut(cpu::Block& b, const Tensor& x, const std::optional<Tensor>& w, const std::optional<Tensor>& scale,
                  const std::optional<Tensor>& shift, int stride, int out_channels) {
  if (w) {
    const cpu::ConvShape s = cpu::square_conv(static_cast<int>(x.size(1)), out_channels, 1, stride, 1);
    b.has_projection = true;
    b.projection = layer_of(*w, s, cpu::Algorithm::kDirect, false, "wd");
    if (scale) b.projection.scale = vector_of(*scale, out_channels, "sd");
    if (shift) b.projection.shift = vector_of(*shift, out_channels, "bd");
  } else {
    STD_TORCH_CHECK(stride == 1 && x.size(1) == out_channels, "wd: a projection is needed where stride is not 1 (",
                    stride, ") or channels change (", x.size(1), " to ", out_channels, ")");
    b.residual = x.const_data_ptr();
    b.residual_pitch = b.x_pitch;
  }
}

Tensor cpu_bottleneck(const Tensor& x, const Tensor& w1, const Tensor& s1, const Tensor& b1, const Tensor& w2,
                      const Tensor& s2, const Tensor& b2, const Tensor& w3, const Tensor& s3, const Tensor& b3,
                      std::optional<Tensor> wd, std::optional<Tensor> sd, std::optional<Tensor> bd, int64_t stride1,
                      int64_t stride2, int64_t dilation, std::string algorithm) {
  cpu::Block b = block_of(x);
  const int c = static_cast<int>(x.size(1)), mid1 = header_of(w1).k, mid2 = header_of(w2).k, out = header_of(w3).k;
  const cpu::ConvShape middle = cpu::square_conv(mid1, mid2, 3, static_cast<int>(stride2), static_cast<int>(dilation));
  b.layer_count = 3;
  b.layers[0] = layer_of(w1, s1, b1, cpu::square_conv(c, mid1, 1, static_cast<int>(stride1), 1),
                         cpu::Algorithm::kDirect, true, "w1");
  b.layers[1] = layer_of(w2, s2, b2, middle, three_by_three(middle, algorithm_of(algorithm)), true, "w2");
  b.layers[2] = layer_of(w3, s3, b3, cpu::square_conv(mid2, out, 1, 1, 1), cpu::Algorithm::kDirect, true, "w3");
  add_shortcut(b, x, wd, sd, bd, static_cast<int>(stride1 * stride2), out);
  return run(x, b);
}

Tensor cpu_basic_block(const Tensor& x, const Tensor& w1, const Tensor& s1, const Tensor& b1, const Tensor& w2,
                       const Tensor& s2, const Tensor& b2, std::optional<Tensor> wd, std::optional<Tensor> sd,
                       std::optional<Tensor> bd, int64_t stride, int64_t dilation, std::string algorithm) {
  cpu::Block b = block_of(x);
  const int c = static_cast<int>(x.size(1)), mid = header_of(w1).k, out = header_of(w2).k;
  const cpu::ConvShape first = cpu::square_conv(c, mid, 3, static_cast<int>(stride), static_cast<int>(dilation));
  const cpu::ConvShape second = cpu::square_conv(mid, out, 3, 1, static_cast<int>(dilation));
  b.layer_count = 2;
  b.layers[0] = layer_of(w1, s1, b1, first, three_by_three(first, algorithm_of(algorithm)), true, "w1");
  b.layers[1] = layer_of(w2, s2, b2, second, three_by_three(second, algorithm_of(algorithm)), true, "w2");
  add_shortcut(b, x, wd, sd, bd, static_cast<int>(stride), out);
  return run(x, b);
}

Tensor cpu_stem(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& shift, Ints kernel,
                Ints stride, Ints padding, int64_t pool_kernel, int64_t pool_stride, int64_t pool_padding) {
  cpu::Block b = block_of(x);
  b.layer_count = 1;
  b.layers[0] = layer_of(packed, scale, shift, conv_shape(packed, kernel, stride, padding, {1}, 1),
                         cpu::Algorithm::kDirect, true, "packed");
  b.pool = {static_cast<int>(pool_kernel), static_cast<int>(pool_stride), static_cast<int>(pool_padding)};
  return run(x, b);
}

// Full pre-activation: two 3x3, or 1x1, 3x3, 1x1; nothing follows the addition.
Tensor cpu_preact(const Tensor& x, std::optional<Tensor> in_scale, std::optional<Tensor> in_shift, Tensors w, Tensors s,
                  Tensors shifts, std::optional<Tensor> wd, int64_t stride1, int64_t stride2, int64_t dilation,
                  std::string algorithm) {
  const size_t count = w.size();
  STD_TORCH_CHECK((count == 2 || count == 3) && s.size() == count && shifts.size() == count,
                  "w, s, b: expected 2 or 3 tensors each, got ", count, ", ", s.size(), " and ", shifts.size());
  cpu::Block b = block_of(x);
  if (in_scale) set_prologue(b, *in_scale, in_shift.value(), x.size(1));
  int c = static_cast<int>(x.size(1));
  for (size_t i = 0; i < count; ++i) {
    const int k = header_of(w[i]).k, kernel = count == 2 || i == 1 ? 3 : 1;
    const int64_t stride = i == 0 ? stride1 : i == 1 ? stride2 : 1;
    const cpu::ConvShape shape =
        cpu::square_conv(c, k, kernel, static_cast<int>(stride), kernel == 3 ? static_cast<int>(dilation) : 1);
    const cpu::Algorithm wanted =
        kernel == 3 ? three_by_three(shape, algorithm_of(algorithm)) : cpu::Algorithm::kDirect;
    b.layers[b.layer_count++] = layer_of(w[i], s[i], shifts[i], shape, wanted, i + 1 < count, "w");
    c = k;
  }
  add_shortcut(b, x, wd, std::nullopt, std::nullopt, static_cast<int>(stride1 * stride2), c);
  return run(x, b);
}

// Lists of one tensor a layer; w1 (and s1, b1) are empty tensors where there is no 1x1.
Tensor cpu_dense_block(const Tensor& x, Tensors in_scale, Tensors in_shift, Tensors w1, Tensors s1, Tensors b1,
                       Tensors w2, int64_t growth, std::string algorithm) {
  const size_t count = w2.size();
  for (const Tensors* list : {&in_scale, &in_shift, &w1, &s1, &b1})
    STD_TORCH_CHECK(list->size() == count, "expected a tensor for each of ", count, " layers, got ", list->size());
  STD_TORCH_CHECK(count > 0, "w2: expected at least one layer");
  cpu::Block image = block_of(x);
  cpu::DenseShape shape;
  shape.n = image.n;
  shape.h = image.h;
  shape.w = image.w;
  shape.c = static_cast<int>(x.size(1));
  shape.dtype = image.dtype;
  shape.count = static_cast<int>(count);
  shape.growth = static_cast<int>(growth);
  shape.algorithm = algorithm_of(algorithm);
  Tensor out = new_output(x, shape.n, shape.channels(shape.count), shape.h, shape.w);
  std::vector<cpu::Block> layers;
  for (size_t i = 0; i < count; ++i) {
    shape.mid = w1[i].numel() ? header_of(w1[i], "w1").k : 0;
    cpu::Block b = cpu::dense_layer(shape, static_cast<int>(i), out.mutable_data_ptr());
    set_prologue(b, in_scale[i], in_shift[i], shape.channels(static_cast<int>(i)));
    if (shape.mid) b.layers[0] = layer_of(w1[i], s1[i], b1[i], b.layers[0].shape, cpu::Algorithm::kDirect, true, "w1");
    cpu::Layer& last = b.layers[b.layer_count - 1];
    last = layer_of(w2[i], last.shape, last.algorithm, last.relu, "w2");
    layers.push_back(b);
  }
  if (recording) {
    image.out = out.mutable_data_ptr();
    cpu::Step& step = recording->add(image, shape.c, {shape.n, shape.channels(shape.count), shape.h, shape.w});
    step.dense = shape;
    step.layers = std::move(layers);
    return out;
  }
  cpu::run_dense_block(cpu::kernels(), shape, image.x, image.x_pitch, out.mutable_data_ptr(), layers, torch_threads());
  return out;
}

Tensor cpu_transition(const Tensor& x, const Tensor& in_scale, const Tensor& in_shift, const Tensor& packed) {
  cpu::Block b = block_of(x);
  b.average = true;
  set_prologue(b, in_scale, in_shift, x.size(1));
  b.layer_count = 1;
  b.layers[0] = layer_of(packed, cpu::square_conv(header_of(packed).c, header_of(packed).k, 1, 1, 1),
                         cpu::Algorithm::kDirect, false, "packed");
  return run(x, b);
}

// [N, K, 1, 1]; the weight is read as it is.
Tensor cpu_head(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  cpu::Block image = block_of(x);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_cpu() && weight.is_contiguous() &&
                      weight.scalar_type() == x.scalar_type() && weight.size(1) == x.size(1),
                  "weight: expected a contiguous CPU tensor of x's dtype and ", x.size(1), " columns");
  STD_TORCH_CHECK(image.h > 0 && image.w > 0, "x: expected at least one pixel, got ", image.h, "x", image.w);
  cpu::Head head;
  head.n = image.n;
  head.h = image.h;
  head.w = image.w;
  head.c = static_cast<int>(x.size(1));
  head.k = static_cast<int>(weight.size(0));
  head.dtype = image.dtype;
  head.x = image.x;
  head.x_pitch = image.x_pitch;
  head.weight = weight.const_data_ptr();
  keep(weight);
  if (bias) head.bias = vector_of(*bias, head.k, "bias");
  Tensor out = new_output(x, head.n, head.k, 1, 1);
  head.out = image.out = out.mutable_data_ptr();
  if (recording) {
    recording->add(image, head.c, {head.n, head.k, 1, 1}).head = head;
    return out;
  }
  cpu::run_head(cpu::kernels(), head, torch_threads());
  return out;
}

// Until `_cpu_recorded`, blocks that this thread runs are recorded: their outputs are not computed.
void cpu_record(const Tensor& x) { recording = std::make_unique<Recording>(x.const_data_ptr()); }

// A tensor that owns an object, and is known by its first word.
template <class T>
Tensor owner_of(std::unique_ptr<T> object, const Tensor& like) {
  const int64_t one = 1, bytes = sizeof(T);
  return stable::from_blob(object.release(), {&bytes, 1}, {&one, 1}, like.device(), ScalarType::Byte,
                           [](void* p) { delete static_cast<T*>(p); });
}
template <class T>
const T& owned_by(const Tensor& t, const char* name, const char* op) {
  const auto* const object = static_cast<const T*>(t.const_data_ptr());
  STD_TORCH_CHECK(t.is_cpu() && t.numel() == sizeof(T) && object->magic == T::kMagic, name, ": expected what ", op,
                  " made");
  return *object;
}

// What was recorded, for `_cpu_link`; empty if it was not blocks that lead from x to y.
Tensor cpu_recorded(const Tensor& y) {
  std::unique_ptr<Recording> r = std::move(recording);
  STD_TORCH_CHECK(r, "_cpu_recorded: expected a call of _cpu_record before it, in this thread");
  const int64_t none = 0;
  if (r->steps.empty() || !r->plain || r->steps.back().block.out != y.const_data_ptr())
    return stable::empty({&none, 1}, ScalarType::Byte, std::nullopt, y.device());
  return owner_of(std::move(r), y);
}

// Recordings that run as one.
struct Linked {
  static constexpr uint64_t kMagic = 0x7266726563303032;

  uint64_t magic = kMagic;
  Tensors kept;  // the recordings
  cpu::Program program;
};

// Recordings, each on the output of the one before, for `_cpu_replay`.
Tensor cpu_link(Tensors recordings) {
  STD_TORCH_CHECK(!recordings.empty(), "recordings: expected at least one");
  std::vector<cpu::Step> steps;
  for (const Tensor& t : recordings) {
    const Recording& r = owned_by<Recording>(t, "recordings", "_cpu_recorded");
    const int before = static_cast<int>(steps.size());  // the recording's x is the last output
    if (before) {
      const auto& out = steps.back().out;
      const cpu::Step& next = r.steps[0];
      STD_TORCH_CHECK(next.block.n == out[0] && next.c == out[1] && next.block.h == out[2] && next.block.w == out[3] &&
                          next.block.dtype == steps[0].block.dtype && next.block.x_pitch == out[1],
                      "recordings: expected each to take the output of the one before");
    }
    auto place = [&](int source) { return source == cpu::Step::kInput ? before - 1 : before + source; };
    for (const cpu::Step& step : r.steps) {
      cpu::Step& s = steps.emplace_back(step);
      s.x = place(step.x);
      s.residual = place(step.residual);
    }
  }
  const Tensor first = recordings[0];
  return owner_of(
      std::unique_ptr<Linked>(new Linked{Linked::kMagic, std::move(recordings), cpu::Program(std::move(steps))}),
      first);
}

Tensor cpu_replay(const Tensor& x, const Tensor& linked) {
  const cpu::Program& program = owned_by<Linked>(linked, "linked", "_cpu_link").program;
  const cpu::Step& first = program.first();
  const cpu::Block image = block_of(x);
  STD_TORCH_CHECK(image.n == first.block.n && x.size(1) == first.c && image.h == first.block.h &&
                      image.w == first.block.w && image.dtype == first.block.dtype &&
                      image.x_pitch == first.block.x_pitch,
                  "x: expected the shape, dtype and strides that were recorded");
  const auto [n, c, h, w] = program.last().out;
  Tensor out = new_output(x, n, c, h, w);
  program.run(image.x, out.mutable_data_ptr(), torch_threads());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("_cpu_pack", TORCH_BOX(&cpu_pack));
  m.impl("_cpu_conv", TORCH_BOX(&cpu_conv));
  m.impl("_cpu_bottleneck", TORCH_BOX(&cpu_bottleneck));
  m.impl("_cpu_basic_block", TORCH_BOX(&cpu_basic_block));
  m.impl("_cpu_stem", TORCH_BOX(&cpu_stem));
  m.impl("_cpu_conv_out", TORCH_BOX(&cpu_conv_out));
  m.impl("_cpu_preact", TORCH_BOX(&cpu_preact));
  m.impl("_cpu_dense_block", TORCH_BOX(&cpu_dense_block));
  m.impl("_cpu_transition", TORCH_BOX(&cpu_transition));
  m.impl("_cpu_head", TORCH_BOX(&cpu_head));
  m.impl("_cpu_record", TORCH_BOX(&cpu_record));
  m.impl("_cpu_recorded", TORCH_BOX(&cpu_recorded));
  m.impl("_cpu_link", TORCH_BOX(&cpu_link));
  m.impl("_cpu_replay", TORCH_BOX(&cpu_replay));
}
