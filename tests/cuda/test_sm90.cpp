// The sm_90a kernels in CPU execution, against plain loops in float64.
//
//   test_sm90 [filter [integers]]   only the kernels whose name contains filter, only the cases of integers
//
// Integer cases must agree bit for bit, random ones hold the parity rule, NaN and infinity arrive where they should.
#include <cstring>

#include "cuda/api.h"
#include "test_sm80_reference.h"

namespace {

using namespace resnet_fused::cuda;
using reference::Buffer;
using reference::Convolution;
using reference::Image;
using reference::Report;
using reference::Rounding;
using reference::Values;
using reference::Vector;

template <class T>
constexpr DType kType = DType::kBf16;
template <>
constexpr DType kType<__half> = DType::kF16;

Report report;
const char* filter = "";
bool only_integers = false;

struct ConvCase {
  const char* name;
  int n, h, w;
  Convolution layer;
  bool residual = false, relu = true, scaled = true;
  int x_pad = 0, out_pad = 0;  // channels beside the slice
  int blocks = 3;              // multiprocessors of the device: few make each block go round several times
  int projected = 0, projection_stride = 1;  // channels of a second image, whose 1x1 convolution is added
};

const ConvCase kConvCases[] = {
    {"1x1", 2, 7, 9, Convolution::square(64, 64, 1, 1, 0)},
    {"1x1, channels of half a step, residual, slices", 1, 9, 8, Convolution::square(72, 136, 1, 1, 0), true, true, true,
     8, 16},
    {"1x1 stride 2, no scale, no relu", 2, 9, 7, Convolution::square(64, 72, 1, 2, 0), true, false, false},
    {"3x3", 1, 14, 14, Convolution::square(64, 64, 3, 1, 1), true},
    {"3x3 stride 2, odd sizes, slices", 2, 13, 9, Convolution::square(40, 72, 3, 2, 1), true, true, true, 24, 8},
    {"3x3 dilation 2", 2, 6, 7, Convolution::square(16, 24, 3, 1, 2, 2), false, false},
    {"3x3, deep, one image", 1, 7, 7, Convolution::square(128, 320, 3, 1, 1), true, true, true, 0, 0, 24},
    {"7x7 stride 3, padding 2, one pixel out", 1, 5, 5, Convolution::square(8, 8, 7, 3, 2)},
    {"1x1 and a projection", 2, 7, 9, Convolution::square(64, 136, 1, 1, 0), false, true, true, 8, 8, 3, 64},
    {"1x1 and a projection with stride 2", 1, 9, 5, Convolution::square(128, 72, 1, 1, 0), false, true, false, 8, 0, 3,
     200, 2},
};

template <class T>
Buffer<T> weights(const Convolution& l) {
  Image w(1, 1, 1, static_cast<int>(l.weight.size()));
  w.data = l.weight;
  return Buffer<T>(w, w.c);
}

template <class T>
ConvParams params_of(const ConvCase& c, const Buffer<T>& x, const Buffer<T>& w, const Vector& scale,
                     const Vector& shift, const Buffer<T>* residual, const Buffer<T>& out) {
  ConvParams p;
  p.dtype = kType<T>;
  p.x = x.get(), p.x_pitch = x.pitch(), p.out = out.get(), p.out_pitch = out.pitch();
  p.conv = {w.get(), c.scaled ? scale.get() : nullptr, shift.get()};
  if (residual != nullptr) p.residual = residual->get(), p.residual_pitch = residual->pitch();
  const Convolution& l = c.layer;
  p.n = c.n, p.h = c.h, p.w = c.w, p.c = l.c, p.k = l.k, p.r = l.r, p.s = l.s;
  p.stride_h = l.stride_h, p.stride_w = l.stride_w, p.pad_h = l.pad_h, p.pad_w = l.pad_w, p.dil_h = l.dil_h,
  p.dil_w = l.dil_w;
  p.p = l.out_h(c.h), p.q = l.out_w(c.w), p.relu = c.relu;
  return p;
}

Device device_of(int blocks) { return {90, blocks, 227 * 1024}; }

template <class Params>
void run(const Kernel<Params>& kernel, const Params& params, int blocks) {
  const Device device = device_of(blocks);
  const std::string why = unsupported(kernel, params, device);
  if (!why.empty()) throw std::runtime_error(why);
  std::vector<char> workspace(static_cast<size_t>(kernel.workspace_bytes(params, device)) + 256, char(0xff));
  const auto address = reinterpret_cast<uintptr_t>(workspace.data());
  kernel.launch(params, device, workspace.data() + (256 - address % 256) % 256, nullptr);
}

enum class Kind { kIntegers, kRandom, kNotFinite };
const char* name_of(Kind kind) {
  return kind == Kind::kIntegers ? "integers" : kind == Kind::kRandom ? "random" : "NaN and infinity";
}

template <class T>
void test_conv(const ConvCase& c, Kind kind) {
  Values values(kind != Kind::kRandom, 1);
  Image x = values.image<T>(c.n, c.h, c.w, c.layer.c);
  const Convolution layer = [&] {
    Convolution l = values.layer<T>(c.layer);
    if (!c.scaled) l.scale.assign(l.scale.size(), 1);
    return l;
  }();
  const int p = layer.out_h(c.h), q = layer.out_w(c.w);
  const Image residual = c.residual ? values.image<T>(c.n, p, q, layer.k) : Image();
  if (kind == Kind::kNotFinite) {
    x.at(0, c.h / 2, c.w / 2, 0) = NAN;
    x.at(c.n - 1, c.h - 1, 0, layer.c - 1) = -INFINITY;
  }
  const int stride = c.projection_stride;
  const Image side_x = values.image<T>(c.n, (p - 1) * stride + 1, (q - 1) * stride + 1, std::max(c.projected, 1));
  Convolution side_layer = values.layer<T>(Convolution::square(side_x.c, layer.k, 1, stride, 0));
  side_layer.shift.assign(side_layer.shift.size(), 0);
  const auto formula = [&](Rounding rounding) {
    const reference::Arithmetic<T> a{rounding};
    Image y = a.convolve(x, layer);
    if (c.projected > 0) y = a.add(y, a.convolve(side_x, side_layer));
    if (c.residual) y = a.add(y, residual);
    return a.finish(c.relu ? a.relu(y) : y);
  };
  const Image exact = formula(kind == Kind::kRandom ? Rounding::kNone : Rounding::kPerLayer);
  const Image unfused = kind == Kind::kRandom ? formula(Rounding::kUnfused) : Image();
  const Buffer<T> x_buffer(x, layer.c + c.x_pad), w_buffer = weights<T>(layer);
  const Buffer<T> side_buffer(side_x, side_x.c + 8), side_weights = weights<T>(side_layer);
  const Vector side_scale(side_layer.scale);
  const Vector scale(layer.scale), shift(layer.shift);
  const std::unique_ptr<Buffer<T>> side(c.residual ? new Buffer<T>(residual, layer.k + c.x_pad) : nullptr);
  for (const Kernel<ConvParams>& kernel : kernels<ConvParams>()) {
    if (kernel.arch != 90 || kernel.dtype != kType<T> || !std::strstr(kernel.name, filter)) continue;
    const std::string name = std::string(kernel.name) + ", " + c.name + ", " + name_of(kind);
    const Buffer<T> out(c.n, p, q, layer.k, layer.k + c.out_pad);
    ConvParams params = params_of(c, x_buffer, w_buffer, scale, shift, side.get(), out);
    if (c.projected > 0)
      params.projection = {side_buffer.get(),  side_buffer.pitch(),
                           side_weights.get(), side_scale.get(),
                           side_x.h,           side_x.w,
                           side_x.c,           stride};
    if ((c.projected > 0) != (std::strstr(kernel.name, "dual") != nullptr)) {
      report.check(kernel.unsupported(params) != nullptr, name, "takes what it cannot run");
      continue;
    }
    try {
      run(kernel, params, c.blocks);
    } catch (const std::exception& e) {
      report.check(false, name, e.what());
      continue;
    }
    if (kind == Kind::kRandom)
      report.parity(out.image(), exact, unfused, reference::kEpsilon<T>, name);
    else
      report.same(out.image(), exact, name);
    report.check(out.untouched_between(), name, "wrote outside of its slice");
  }
}

struct BlockCase {
  int n, h, w, blocks, mid, out;
  bool projected = false;
};
const BlockCase kBlockCases[] = {
    {1, 7, 7, 3, 64, 256},         {2, 9, 13, 3, 64, 256},
    {2, 17, 10, 1, 64, 256},       {1, 25, 8, 2, 64, 256},
    {1, 7, 7, 3, 64, 256, true},   {2, 9, 13, 3, 64, 256, true},
    {2, 17, 10, 1, 64, 256, true}, {1, 25, 8, 2, 64, 256, true},
    {3, 8, 7, 2, 128, 256},  // only small_sm90.cu has a kernel for it
    {1, 14, 10, 3, 128, 256},      {1, 16, 15, 3, 128, 512},
    {1, 8, 15, 3, 256, 1024},
};

template <class T>
void test_bottleneck(const BlockCase& c, Kind kind) {
  BottleneckParams p;
  p.dtype = kType<T>;
  p.n = c.n, p.h = p.p = c.h, p.w = p.q = c.w, p.c = c.projected ? c.mid : c.out, p.mid = c.mid, p.k = c.out;
  std::vector<const Kernel<BottleneckParams>*> fitting;
  for (const Kernel<BottleneckParams>& kernel : kernels<BottleneckParams>()) {
    p.projection.weight = c.projected ? &c : nullptr;
    if (kernel.arch == 90 && std::strstr(kernel.name, filter) && unsupported(kernel, p, device_of(c.blocks)).empty())
      fitting.push_back(&kernel);
  }
  if (fitting.empty()) return;  // before the formulas, which take long

  Values values(kind != Kind::kRandom, 2);
  Image x = values.image<T>(c.n, c.h, c.w, p.c);
  if (kind == Kind::kNotFinite) x.at(0, c.h / 2, c.w / 2, 3) = NAN, x.at(0, 0, 0, 0) = INFINITY;
  const Convolution l1 = values.layer<T>(Convolution::square(p.c, c.mid, 1, 1, 0));
  const Convolution l2 = values.layer<T>(Convolution::square(c.mid, c.mid, 3, 1, 1));
  const Convolution l3 = values.layer<T>(Convolution::square(c.mid, c.out, 1, 1, 0));
  const Convolution ld = values.layer<T>(Convolution::square(p.c, c.out, 1, 1, 0));
  const auto formula = [&](Rounding rounding) {
    const reference::Arithmetic<T> a{rounding};
    const Image h1 = a.finish(a.relu(a.convolve(x, l1))), h2 = a.finish(a.relu(a.convolve(h1, l2)));
    return a.finish(a.relu(a.add(a.convolve(h2, l3), c.projected ? a.convolve(x, ld) : x)));
  };
  const Image exact = formula(kind == Kind::kRandom ? Rounding::kNone : Rounding::kPerLayer);
  const Image unfused = kind == Kind::kRandom ? formula(Rounding::kUnfused) : Image();
  const Buffer<T> x_buffer(x, p.c + 8), w1 = weights<T>(l1), w2 = weights<T>(l2), w3 = weights<T>(l3),
                                        wd = weights<T>(ld);
  const Vector s1(l1.scale), b1(l1.shift), s2(l2.scale), b2(l2.shift), s3(l3.scale), b3(l3.shift), sd(ld.scale),
      bd(ld.shift);
  p.x = x_buffer.get(), p.x_pitch = x_buffer.pitch();
  p.conv1 = {w1.get(), s1.get(), b1.get()};
  p.conv2 = {w2.get(), s2.get(), b2.get()};
  p.conv3 = {w3.get(), s3.get(), b3.get()};
  if (c.projected) p.projection = {wd.get(), sd.get(), bd.get()};
  for (const Kernel<BottleneckParams>* kernel : fitting) {
    const Buffer<T> out(c.n, c.h, c.w, c.out, c.out + 8);
    p.out = out.get(), p.out_pitch = out.pitch();
    const std::string name = std::string(kernel->name) + ", " + std::to_string(c.n) + "x" + std::to_string(c.h) + "x" +
                             std::to_string(c.w) + ", " + name_of(kind);
    try {
      run(*kernel, p, c.blocks);
    } catch (const std::exception& e) {
      report.check(false, name, e.what());
      continue;
    }
    if (kind == Kind::kRandom)
      report.parity(out.image(), exact, unfused, reference::kEpsilon<T>, name);
    else
      report.same(out.image(), exact, name);
    report.check(out.untouched_between(), name, "wrote outside of its slice");
  }
}

struct RotatedCase {
  int n, h, w, blocks, mid, out;
  bool last = false;  // of its chain
};
const RotatedCase kRotatedCases[] = {
    {3, 11, 11, 2, 128, 128},                                    // only small_sm90.cu has a kernel for it
    {2, 9, 8, 3, 128, 128, true},  {2, 7, 7, 3, 64, 256},        // less than a tile
    {2, 17, 10, 2, 64, 256},       {5, 11, 12, 5, 64, 256},      // a last tile that one block has no part of
    {1, 1, 300, 3, 64, 256, true}, {9, 5, 9, 2, 64, 256, true},  // images of a row, images within a tile
    {2, 13, 13, 2, 128, 512},      {1, 16, 15, 4, 128, 512, true},
};

template <class T>
void test_rotated(const RotatedCase& c, Kind kind) {
  RotatedParams p;
  p.dtype = kType<T>;
  p.n = c.n, p.h = c.h, p.w = c.w, p.mid = c.mid, p.k = c.out;
  std::vector<const Kernel<RotatedParams>*> fitting;
  for (const Kernel<RotatedParams>& kernel : kernels<RotatedParams>())
    if (kernel.arch == 90 && std::strstr(kernel.name, filter) && unsupported(kernel, p, device_of(c.blocks)).empty())
      fitting.push_back(&kernel);
  if (fitting.empty()) return;  // before the formulas, which take long

  Values values(kind != Kind::kRandom, 3);
  Image h1 = values.image<T>(c.n, c.h, c.w, c.mid), x = values.image<T>(c.n, c.h, c.w, c.out);
  if (kind == Kind::kNotFinite) h1.at(0, c.h / 2, c.w / 2, 3) = NAN, x.at(c.n - 1, c.h - 1, 0, 0) = INFINITY;
  const Convolution l2 = values.layer<T>(Convolution::square(c.mid, c.mid, 3, 1, 1));
  const Convolution l3 = values.layer<T>(Convolution::square(c.mid, c.out, 1, 1, 0));
  const Convolution l1 = values.layer<T>(Convolution::square(c.out, c.mid, 1, 1, 0));
  struct Outputs {
    Image y, h1;
  };
  const auto formula = [&](Rounding rounding) {
    const reference::Arithmetic<T> a{rounding};
    const Image h2 = a.finish(a.relu(a.convolve(h1, l2)));
    const Image y = a.finish(a.relu(a.add(a.convolve(h2, l3), x)));
    return Outputs{y, c.last ? Image() : a.finish(a.relu(a.convolve(y, l1)))};
  };
  const Outputs exact = formula(kind == Kind::kRandom ? Rounding::kNone : Rounding::kPerLayer);
  const Outputs unfused = kind == Kind::kRandom ? formula(Rounding::kUnfused) : Outputs();
  const Buffer<T> h1_buffer(h1, c.mid + 8), x_buffer(x, c.out + 16);
  const Buffer<T> w2 = weights<T>(l2), w3 = weights<T>(l3), w1 = weights<T>(l1);
  const Vector s2(l2.scale), b2(l2.shift), s3(l3.scale), b3(l3.shift), s1(l1.scale), b1(l1.shift);
  p.h1 = h1_buffer.get(), p.h1_pitch = h1_buffer.pitch(), p.x = x_buffer.get(), p.x_pitch = x_buffer.pitch();
  p.conv2 = {w2.get(), s2.get(), b2.get()};
  p.conv3 = {w3.get(), s3.get(), b3.get()};
  if (!c.last) p.conv1 = {w1.get(), s1.get(), b1.get()};
  for (const Kernel<RotatedParams>* kernel : fitting) {
    const Buffer<T> y(c.n, c.h, c.w, c.out, c.out + 8), h1_next(c.n, c.h, c.w, c.mid, c.mid + 24);
    p.y = y.get(), p.y_pitch = y.pitch();
    if (!c.last) p.h1_next = h1_next.get(), p.h1_next_pitch = h1_next.pitch();
    const std::string name = std::string(kernel->name) + ", " + std::to_string(c.n) + "x" + std::to_string(c.h) + "x" +
                             std::to_string(c.w) + ", " + name_of(kind);
    try {
      run(*kernel, p, c.blocks);
    } catch (const std::exception& e) {
      report.check(false, name, e.what());
      continue;
    }
    const auto judge = [&](const Buffer<T>& given, const Image& right, const Image& rounded, const std::string& what) {
      if (kind == Kind::kRandom)
        report.parity(given.image(), right, rounded, reference::kEpsilon<T>, what);
      else
        report.same(given.image(), right, what);
      report.check(given.untouched_between(), what, "wrote outside of its slice");
    };
    judge(y, exact.y, unfused.y, name + ", y");
    if (!c.last) judge(h1_next, exact.h1, unfused.h1, name + ", h1");
  }
}

template <class T>
void test_all() {
  for (const Kind kind : {Kind::kIntegers, Kind::kRandom, Kind::kNotFinite}) {
    if (only_integers && kind != Kind::kIntegers) continue;
    for (const ConvCase& c : kConvCases) test_conv<T>(c, kind);
    for (const BlockCase& c : kBlockCases)
      if (c.mid < 256 || kind != Kind::kNotFinite) test_bottleneck<T>(c, kind);  // what 128 does not show takes long
    for (const RotatedCase& c : kRotatedCases) test_rotated<T>(c, kind);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) filter = arguments[1];
  only_integers = count > 2 && std::strcmp(arguments[2], "integers") == 0;
  test_all<__nv_bfloat16>();
  test_all<__half>();
  std::printf("%d passed, %d failed\n", report.passed, report.failed);
  return report.failed != 0;
}
