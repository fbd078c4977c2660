// Every sm_80 kernel of the table, executed on the CPU: small integers bit for bit, random values by the parity rule,
// NaN and infinity, odd sizes, channel slices, under every order of warps and of asynchronous copies.
//
//   test_sm80 [part of a kernel's name] [--quick]
//
// Every schedule is run for bfloat16 only: the other types differ in the multiplication alone. --quick leaves that out,
// and ends at the first failure.
#include <cstring>
#include <functional>

#include "cuda/api.h"
#include "test_sm80_reference.h"

namespace {

using namespace reference;
using namespace resnet_fused::cuda;

constexpr Device kA100{80, 108, 163 * 1024};

Report report;
bool quick = false;

enum class Numbers { kIntegers, kRandom, kNotFinite };

// Runs `launch` and compares what it writes to `out`. `formula` is the reference.
template <class T, class Formula>
void compare(const std::string& name, Numbers numbers, const Buffer<T>& out, const Formula& formula,
             const std::function<void()>& launch) {
  try {
    launch();
  } catch (const std::exception& e) {
    return report.check(false, name, e.what());
  }
  const Image y = out.image();
  if (numbers == Numbers::kRandom)
    report.parity(y, formula(Arithmetic<T>{Rounding::kNone}), formula(Arithmetic<T>{Rounding::kUnfused}), kEpsilon<T>,
                  name);
  else
    report.same(y, formula(Arithmetic<T>{Rounding::kPerLayer}), name);
  report.check(out.untouched_between(), name, "wrote between the pixels' channels");
}

template <class Params>
void launch(const Kernel<Params>& kernel, const Params& params) {
  const std::string reason = unsupported(kernel, params, kA100);
  if (!reason.empty()) throw std::runtime_error(reason);
  const int64_t bytes = kernel.workspace_bytes(params, kA100);
  const Buffer<float> workspace(1, 1, 1, static_cast<int>(bytes / 4) + 1, static_cast<int>(bytes / 4) + 1);
  kernel.launch(params, kA100, workspace.get(), nullptr);
}

// A layer's tensors, alive as long as a launch needs them.
template <class T>
struct Weights {
  Buffer<T> weight;
  Vector scale, shift;

  explicit Weights(const Convolution& l) : weight(l.weight), scale(l.scale), shift(l.shift) {}
  Layer layer() const { return {weight.get(), scale.get(), shift.get()}; }
};

template <class T>
Image input(Values& values, Numbers numbers, int n, int h, int w, int c) {
  Image x = values.image<T>(n, h, w, c);
  if (numbers == Numbers::kNotFinite) {
    const double special[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; ++i) x.data[x.data.size() * (2 * i + 1) / 7] = special[i];
  }
  return x;
}

struct ConvCase {
  const char* name;
  int n, h, w;
  Convolution convolution;
  int gap;  // between the pixels' channels, in chunks
  bool residual, relu;
};

template <class T>
void test_conv(const Kernel<ConvParams>& kernel, const ConvCase& c, Numbers numbers, const std::string& name) {
  const bool activated = std::strstr(kernel.name, "activated"), dual = std::strstr(kernel.name, "dual");
  constexpr int kChunk = 16 / sizeof(T);
  const int gap = c.gap * kChunk;
  Values values(numbers != Numbers::kRandom, 7);
  const Convolution l = values.layer<T>(c.convolution);
  const Image x = input<T>(values, numbers, c.n, c.h, c.w, l.c);
  const int p = l.out_h(c.h), q = l.out_w(c.w);
  const Image residual = values.image<T>(c.n, p, q, l.k);
  const std::vector<double> in_scale = values.scales(l.c), in_shift = values.shifts(l.c);
  const Image side = values.image<T>(c.n, 2 * p - 1, 2 * q - 1, 3 * kChunk);
  Convolution side_layer = values.layer<T>(Convolution::square(side.c, l.k, 1, 2, 0));
  side_layer.shift.assign(l.k, 0);  // it is part of the first convolution's

  const Weights<T> weights(l), side_weights(side_layer);
  const Buffer<T> bx(x, l.c + gap), br(residual, l.k + gap), bs(side, side.c + gap), out(c.n, p, q, l.k, l.k + gap);
  const Buffer<float> bis(in_scale), bib(in_shift);
  ConvParams params;
  params.dtype = kernel.dtype;
  params.x = bx.get();
  params.x_pitch = bx.pitch();
  params.conv = weights.layer();
  if (c.residual) {
    params.residual = br.get();
    params.residual_pitch = br.pitch();
  }
  if (activated) {
    params.in_scale = bis.get();
    params.in_shift = bib.get();
  }
  params.out = out.get();
  params.out_pitch = out.pitch();
  params.n = c.n, params.h = c.h, params.w = c.w, params.c = l.c, params.k = l.k, params.r = l.r, params.s = l.s;
  params.stride_h = l.stride_h, params.stride_w = l.stride_w, params.pad_h = l.pad_h, params.pad_w = l.pad_w;
  params.dil_h = l.dil_h, params.dil_w = l.dil_w, params.p = p, params.q = q;
  params.relu = c.relu;
  if (dual)
    params.projection = {bs.get(), bs.pitch(), side_weights.weight.get(), side_weights.scale.get(), side.h, side.w,
                         side.c,   2};
  const auto formula = [&](const Arithmetic<T>& a) {
    Image y = a.convolve(activated ? a.activate(x, in_scale, in_shift) : x, l);
    if (dual) y = a.add(y, a.convolve(side, side_layer));
    if (c.residual) y = a.add(y, residual);
    return a.finish(c.relu ? a.relu(y) : y);
  };
  compare<T>(name + " " + c.name, numbers, out, formula, [&] { launch(kernel, params); });
}

struct BlockCase {
  const char* name;
  int n, h, w, c, k, stride1, stride2;
  bool projection;
  int gap;
};

template <class T>
void test_bottleneck(const Kernel<BottleneckParams>& kernel, const BlockCase& c, Numbers numbers,
                     const std::string& name) {
  const int mid = std::strstr(kernel.name, "mid64") ? 64 : 128, gap = c.gap * 16 / static_cast<int>(sizeof(T));
  Values values(numbers != Numbers::kRandom, 11);
  const Convolution l1 = values.layer<T>(Convolution::square(c.c, mid, 1, c.stride1, 0)),
                    l2 = values.layer<T>(Convolution::square(mid, mid, 3, c.stride2, 1)),
                    l3 = values.layer<T>(Convolution::square(mid, c.k, 1, 1, 0)),
                    ld = values.layer<T>(Convolution::square(c.c, c.k, 1, c.stride1 * c.stride2, 0));
  const Image x = input<T>(values, numbers, c.n, c.h, c.w, c.c);
  const int p = ld.out_h(c.h), q = ld.out_w(c.w);
  const Weights<T> w1(l1), w2(l2), w3(l3), wd(ld);
  const Buffer<T> bx(x, c.c + gap), out(c.n, p, q, c.k, c.k + gap);
  BottleneckParams params;
  params.dtype = kernel.dtype;
  params.x = bx.get(), params.x_pitch = bx.pitch(), params.out = out.get(), params.out_pitch = out.pitch();
  params.conv1 = w1.layer(), params.conv2 = w2.layer(), params.conv3 = w3.layer();
  if (c.projection) params.projection = wd.layer();
  params.n = c.n, params.h = c.h, params.w = c.w, params.c = c.c, params.mid = mid, params.k = c.k;
  params.stride1 = c.stride1, params.stride2 = c.stride2, params.p = p, params.q = q;
  const auto formula = [&](const Arithmetic<T>& a) {
    const Image h1 = a.finish(a.relu(a.convolve(x, l1))), h2 = a.finish(a.relu(a.convolve(h1, l2)));
    return a.finish(a.relu(a.add(a.convolve(h2, l3), c.projection ? a.convolve(x, ld) : x)));
  };
  compare<T>(name + " " + c.name, numbers, out, formula, [&] { launch(kernel, params); });
}

template <class T>
void test_basic_block(const Kernel<BasicBlockParams>& kernel, const BlockCase& c, Numbers numbers,
                      const std::string& name) {
  const int k = kernel.tile_n, in = c.projection ? c.c : k, gap = c.gap * 16 / static_cast<int>(sizeof(T));
  Values values(numbers != Numbers::kRandom, 13);
  const Convolution l1 = values.layer<T>(Convolution::square(in, k, 3, c.stride1, 1)),
                    l2 = values.layer<T>(Convolution::square(k, k, 3, 1, 1)),
                    ld = values.layer<T>(Convolution::square(in, k, 1, c.stride1, 0));
  const Image x = input<T>(values, numbers, c.n, c.h, c.w, in);
  const int p = l1.out_h(c.h), q = l1.out_w(c.w);
  const Weights<T> w1(l1), w2(l2), wd(ld);
  const Buffer<T> bx(x, in + gap), out(c.n, p, q, k, k + gap);
  BasicBlockParams params;
  params.dtype = kernel.dtype;
  params.x = bx.get(), params.x_pitch = bx.pitch(), params.out = out.get(), params.out_pitch = out.pitch();
  params.conv1 = w1.layer(), params.conv2 = w2.layer();
  if (c.projection) params.projection = wd.layer();
  params.n = c.n, params.h = c.h, params.w = c.w, params.c = in, params.mid = k, params.k = k;
  params.stride = c.stride1, params.p = p, params.q = q;
  const auto formula = [&](const Arithmetic<T>& a) {
    const Image h1 = a.finish(a.relu(a.convolve(x, l1)));
    return a.finish(a.relu(a.add(a.convolve(h1, l2), c.projection ? a.convolve(x, ld) : x)));
  };
  compare<T>(name + " " + c.name, numbers, out, formula, [&] { launch(kernel, params); });
}

struct StemCase {
  const char* name;
  int n, h, w, c, k, kernel, stride, padding, pool_kernel, pool_stride, pool_padding, gap;
};

template <class T>
void test_stem(const Kernel<StemParams>& kernel, const StemCase& c, Numbers numbers, const std::string& name) {
  constexpr int kChunk = 16 / sizeof(T);
  Values values(numbers != Numbers::kRandom, 17);
  const Convolution l = values.layer<T>(Convolution::square(c.c, c.k, c.kernel, c.stride, c.padding));
  const Image x = input<T>(values, numbers, c.n, c.h, c.w, c.c);
  const auto formula = [&](const Arithmetic<T>& a) {
    return a.max_pool(a.finish(a.relu(a.convolve(x, l))), c.pool_kernel, c.pool_stride, c.pool_padding);
  };
  const Image shape = formula(Arithmetic<T>{Rounding::kNone});
  const Weights<T> weights(l);
  const Buffer<T> bx(x, c.c + c.gap), out(c.n, shape.h, shape.w, c.k, c.k + c.gap * kChunk);
  StemParams params;
  params.dtype = kernel.dtype;
  params.x = bx.get(), params.x_pitch = bx.pitch(), params.out = out.get(), params.out_pitch = out.pitch();
  params.conv = weights.layer();
  params.n = c.n, params.h = c.h, params.w = c.w, params.c = c.c, params.k = c.k, params.r = params.s = c.kernel;
  params.stride = c.stride, params.pad = c.padding, params.pool_kernel = c.pool_kernel;
  params.pool_stride = c.pool_stride, params.pool_padding = c.pool_padding;
  params.conv_p = l.out_h(c.h), params.conv_q = l.out_w(c.w), params.p = shape.h, params.q = shape.w;
  compare<T>(name + " " + c.name, numbers, out, formula, [&] { launch(kernel, params); });
}

// test(numbers, name) under one schedule after the other; a kernel's first case under all of them, unless quick.
void run(const std::string& kernel, bool first, bool every_schedule,
         const std::function<void(Numbers, const std::string&)>& test) {
  static int turn = 0;
  const auto scheduled = [&](Numbers numbers, const char* what) {
    const emu::Order orders[] = {emu::Order::kForward, emu::Order::kReverse, emu::Order::kRandom};
    const emu::Async asyncs[] = {emu::Async::kLate, emu::Async::kEarly, emu::Async::kRandom};
    emu::options().order = orders[turn / 3 % 3];
    emu::options().async = asyncs[turn % 3];
    test(numbers, kernel + " schedule " + std::to_string(turn % 9) + " " + what);
    ++turn;
  };
  for (int i = 0; i < (first && every_schedule ? 9 : 1); ++i) scheduled(Numbers::kIntegers, "integers");
  if (quick && report.failed != 0) return;
  scheduled(Numbers::kRandom, "random");
  if (first) scheduled(Numbers::kNotFinite, "NaN and infinity");
}

template <class Params, class Case>
void test_all(const std::string& part, const std::vector<Case>& cases,
              const std::function<bool(const Kernel<Params>&, const Case&)>& fits,
              void (*bf16)(const Kernel<Params>&, const Case&, Numbers, const std::string&),
              void (*fp16)(const Kernel<Params>&, const Case&, Numbers, const std::string&),
              void (*tf32)(const Kernel<Params>&, const Case&, Numbers, const std::string&)) {
  for (const Kernel<Params>& kernel : kernels<Params>()) {
    if (kernel.arch != 80 || std::string(kernel.name).find(part) == std::string::npos) continue;
    const auto test = kernel.dtype == DType::kBf16 ? bf16 : kernel.dtype == DType::kF16 ? fp16 : tf32;
    bool first = true;
    for (const Case& c : cases) {
      if (!fits(kernel, c)) continue;
      run(kernel.name, first, kernel.dtype == DType::kBf16 && !quick,
          [&](Numbers numbers, const std::string& name) { test(kernel, c, numbers, name); });
      first = false;
      if (quick && report.failed != 0) return;
    }
    report.check(!first, kernel.name, "no case fits it");
  }
}

using Bf16 = __nv_bfloat16;

void test_convs(const std::string& part) {
  const std::vector<ConvCase> cases = {
      {"3x3", 2, 7, 6, Convolution::square(24, 72, 3, 1, 1), 2, true, true},
      {"3x2, stride 2x1, dilation 2x3", 2, 9, 10, {16, 40, 3, 2, 2, 1, 2, 1, 2, 3, {}, {}, {}}, 0, false, false},
      {"1x1, several tiles", 1, 17, 17, Convolution::square(72, 136, 1, 1, 0), 1, true, true},
      {"one pixel", 1, 1, 1, Convolution::square(8, 8, 3, 1, 1), 1, true, false},
      {"5x5, padding beyond the image, few channels", 1, 3, 4, Convolution::square(8, 16, 5, 2, 4), 0, false, true},
  };
  test_all<ConvParams, ConvCase>(
      part, cases, [](const Kernel<ConvParams>&, const ConvCase&) { return true; }, test_conv<Bf16>, test_conv<__half>,
      test_conv<float>);
}

void test_blocks(const std::string& part) {
  const std::vector<BlockCase> bottlenecks = {
      {"identity", 1, 5, 10, 72, 72, 1, 1, false, 1},        {"projection", 2, 8, 9, 24, 136, 1, 1, true, 1},
      {"stride in the 1x1", 1, 5, 7, 16, 64, 2, 1, true, 0}, {"stride in the 3x3", 1, 11, 13, 40, 72, 1, 2, true, 0},
      {"one pixel", 1, 1, 1, 8, 8, 1, 1, false, 0},          {"two pixels, stride 2", 2, 2, 1, 8, 8, 1, 2, true, 0},
  };
  test_all<BottleneckParams, BlockCase>(
      part, bottlenecks,
      [](const Kernel<BottleneckParams>& kernel, const BlockCase& c) {
        return (c.stride2 == 2) == (std::strstr(kernel.name, "stride2") != nullptr);
      },
      test_bottleneck<Bf16>, test_bottleneck<__half>, test_bottleneck<float>);
  const std::vector<BlockCase> basics = {
      {"identity", 1, 9, 18, 0, 0, 1, 1, false, 1},
      {"projection", 2, 9, 7, 24, 0, 1, 1, true, 1},
      {"stride 2", 1, 12, 11, 16, 0, 2, 1, true, 0},
      {"one pixel", 1, 1, 1, 0, 0, 1, 1, false, 0},
  };
  test_all<BasicBlockParams, BlockCase>(
      part, basics, [](const Kernel<BasicBlockParams>&, const BlockCase&) { return true; }, test_basic_block<Bf16>,
      test_basic_block<__half>, test_basic_block<float>);
}

void test_stems(const std::string& part) {
  const std::vector<StemCase> cases = {
      {"7x7 / 2, 3x3 / 2", 1, 39, 29, 3, 64, 7, 2, 3, 3, 2, 1, 1},
      {"two images, 72 channels", 2, 13, 11, 3, 72, 7, 2, 3, 3, 2, 1, 0},
      {"3x3 without pooling", 1, 9, 10, 3, 16, 3, 1, 1, 1, 1, 0, 2},
      {"5x5, one channel, 2x2 / 2", 1, 13, 14, 1, 24, 5, 1, 0, 2, 2, 0, 0},
      {"4x4, five channels, 3x3 / 1", 1, 9, 8, 5, 8, 4, 1, 1, 3, 1, 1, 0},
  };
  test_all<StemParams, StemCase>(
      part, cases, [](const Kernel<StemParams>&, const StemCase&) { return true; }, test_stem<Bf16>, test_stem<__half>,
      test_stem<float>);
}

}  // namespace

int main(int count, char** arguments) {
  std::string part;
  for (int i = 1; i < count; ++i)
    if (std::strcmp(arguments[i], "--quick") == 0)
      quick = true;
    else
      part = arguments[i];
  test_convs(part);
  test_blocks(part);
  test_stems(part);
  std::printf("%d passed, %d failed\n", report.passed, report.failed);
  return report.failed != 0;
}
