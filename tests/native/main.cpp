// Tests of the CPU kernels without torch and Python, so that sanitizers can watch them.
//
//   native_tests [--seed N] [--cases N] [--no-blocks] [ISA...]
//
// Every block runs on every instruction set of this machine with every algorithm that takes it. Inputs lie between
// guard pages or in exactly sized heap blocks; outputs and workspaces are filled with NaN before the run that counts.
// Small integers must agree bit for bit, other values with float64 within the rounding of the type.
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/program.h"
#include "guarded.h"
#include "reference.h"

using namespace resnet_fused::cpu;

namespace {

char current[512];  // the case that runs, for the report of a crash

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __sanitizer_set_death_callback(void (*)());
void report_crash() { std::fprintf(stderr, "in case: %s\n", current); }
void watch_for_crashes() { __sanitizer_set_death_callback(report_crash); }
#else
void report_crash(int signal) {
  std::fprintf(stderr, "signal %d in case: %s\n", signal, current);
  std::_Exit(1);
}
void watch_for_crashes() {
  for (int s : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) std::signal(s, report_crash);
}
#endif

// ---- values --------------------------------------------------------------------------------------------------------
float bf16_to_float(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
uint16_t float_to_bf16(float f) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (std::isnan(f)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
double rounded(double v, DType dtype) {
  return dtype == DType::kBf16 ? bf16_to_float(float_to_bf16(static_cast<float>(v))) : static_cast<float>(v);
}
double read(const void* p, size_t i, DType dtype) {
  return dtype == DType::kBf16 ? bf16_to_float(static_cast<const uint16_t*>(p)[i]) : static_cast<const float*>(p)[i];
}
void write(void* p, size_t i, DType dtype, double v) {
  if (dtype == DType::kBf16)
    static_cast<uint16_t*>(p)[i] = float_to_bf16(static_cast<float>(v));
  else
    static_cast<float*>(p)[i] = static_cast<float>(v);
}

// ---- threads -------------------------------------------------------------------------------------------------------
constexpr int kThreads = 3;
void run_serial(int64_t count, ParallelBody body, void* context) { body(0, count, context); }
void run_threads(int64_t count, ParallelBody body, void* context) {
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    const int64_t begin = count * t / kThreads, end = count * (t + 1) / kThreads;
    if (begin < end) threads.emplace_back(body, begin, end, context);
  }
  for (std::thread& t : threads) t.join();
}
const Parallel kSerial{run_serial, 1}, kThreaded{run_threads, kThreads};

// ---- a case --------------------------------------------------------------------------------------------------------
struct Case {
  std::string name;
  int n, h, w;
  std::vector<ConvShape> layers;      // the last one's activation is `relu`, the others' are on
  std::vector<ConvShape> projection;  // none or one
  bool residual = false, relu = true;
  Pool pool{};
  bool prologue = false, average = false;
  int slice = 0;  // x, residual and output are slices of images with that many more channels on one side or both
};

enum class Values { kReal, kInteger, kNaN };  // kNaN: real, and one NaN in x

const char* name_of(Values v) { return v == Values::kReal ? "real" : v == Values::kInteger ? "integer" : "NaN"; }
const char* name_of(Algorithm a) {
  return a == Algorithm::kDirect ? "direct" : a == Algorithm::kWinograd2 ? "winograd2" : "winograd4";
}

bool takes_winograd(const ConvShape& s) {
  return s.r == 3 && s.s == 3 && s.stride_h == 1 && s.stride_w == 1 && s.dil_h == 1 && s.dil_w == 1 && s.groups == 1;
}

// Inputs and expected outputs, rounded to the dtype.
struct Problem {
  DType dtype;
  Values values;
  std::mt19937 random;
  Tensor x, expected;

  Problem(DType dtype, Values values, unsigned seed) : dtype(dtype), values(values), random(seed) {}

  void round(Tensor& t) const {
    for (double& v : t.data) v = std::isnan(v) ? v : rounded(v, dtype);
  }
  double value() {
    if (values == Values::kInteger) return static_cast<int>(random() % 5) - 2;
    return rounded(std::uniform_real_distribution<double>(-1, 1)(random), dtype);
  }
  Tensor tensor(int n, int h, int w, int c) {
    Tensor t(n, h, w, c);
    for (double& v : t.data) v = value();
    return t;
  }
  ReferenceLayer layer(const ConvShape& s) {
    ReferenceLayer l;
    l.shape = s;
    const int terms = s.c / s.groups * s.r * s.s;
    l.weight.resize(static_cast<size_t>(s.k) * terms);
    for (double& v : l.weight) {
      v = value();
      // About three terms an output: what lies between the layers then has no more than bfloat16's eight bits.
      if (values == Values::kInteger && random() % terms >= 3) v = 0;
    }
    vectors(s.k, std::sqrt(terms), l.scale, l.shift);
    return l;
  }
  // of a convolution's output that is about `magnitude` large
  void vectors(int channels, double magnitude, std::vector<double>& scale, std::vector<double>& shift) {
    for (int k = 0; k < channels; ++k)
      if (values == Values::kInteger) {
        scale.push_back(random() % 2 ? 1 : 0.5);
        shift.push_back(static_cast<int>(random() % 9) - 4);
      } else {
        scale.push_back(static_cast<float>((1 + value() / 2) / magnitude));
        shift.push_back(static_cast<float>(value()));
      }
  }
};

struct BlockProblem : Problem {
  const Case& shape;
  Tensor residual;
  std::vector<double> in_scale, in_shift;
  std::vector<ReferenceLayer> layers;  // the projection last

  BlockProblem(const Case& c, DType dtype, Values values, unsigned seed) : Problem(dtype, values, seed), shape(c) {
    x = tensor(c.n, c.h, c.w, c.layers[0].c);
    for (const ConvShape& s : c.layers) layers.push_back(layer(s));
    for (const ConvShape& s : c.projection) layers.push_back(layer(s));
    if (values == Values::kNaN && !x.data.empty()) x.data[random() % x.data.size()] = NAN;

    Tensor y = x;
    if (c.prologue) {
      vectors(c.layers[0].c, 1, in_scale, in_shift);
      y = activate(y, in_scale, in_shift);
      if (c.average) y = average_pool(y);
      round(y);
    }
    const Tensor activated = y;
    for (size_t l = 0; l < c.layers.size(); ++l) {
      y = convolve(y, layers[l]);
      if (l + 1 < c.layers.size()) ::relu(y);
    }
    const Tensor shortcut = c.projection.empty() ? Tensor() : convolve(activated, layers.back());
    if (c.residual) residual = tensor(y.n, y.h, y.w, y.c);
    for (size_t i = 0; i < y.data.size(); ++i)
      y.data[i] += (c.residual ? residual.data[i] : 0) + (c.projection.empty() ? 0 : shortcut.data[i]);
    if (c.relu) ::relu(y);
    if (c.pool.kernel) y = max_pool(y, c.pool);
    expected = std::move(y);
  }
};

struct DenseCase {
  int n, h, w, c, growth, mid, count, slice;
};

struct DenseProblem : Problem {
  struct DenseLayer {
    std::vector<double> in_scale, in_shift;
    std::vector<ReferenceLayer> layers;
  };
  const DenseCase& shape;
  std::vector<DenseLayer> layers;

  DenseProblem(const DenseCase& c, DType dtype, Values values, unsigned seed) : Problem(dtype, values, seed), shape(c) {
    x = tensor(c.n, c.h, c.w, c.c);
    expected = x;
    for (int i = 0; i < c.count; ++i) {
      DenseLayer& l = layers.emplace_back();
      vectors(expected.c, 1, l.in_scale, l.in_shift);
      Tensor y = activate(expected, l.in_scale, l.in_shift);
      round(y);
      if (c.mid) {
        l.layers.push_back(layer(square_conv(expected.c, c.mid, 1, 1, 1)));
        y = convolve(y, l.layers.back());
        ::relu(y);
        round(y);
      }
      l.layers.push_back(layer(square_conv(y.c, c.growth, 3, 1, 1)));
      y = convolve(y, l.layers.back());
      round(y);
      expected = concatenate(expected, y);
    }
  }
};

struct HeadCase {
  int n, h, w, c, k, slice;
};

struct HeadProblem : Problem {
  const HeadCase& shape;
  ReferenceLayer linear;

  HeadProblem(const HeadCase& c, DType dtype, Values values, unsigned seed) : Problem(dtype, values, seed), shape(c) {
    x = tensor(c.n, c.h, c.w, c.c);
    linear = layer(square_conv(c.c, c.k, 1, 1, 1));
    for (double& scale : linear.scale) scale = 1;
    if (values == Values::kNaN && !x.data.empty()) x.data[random() % x.data.size()] = NAN;
    expected = convolve(global_mean(x), linear);
  }
};

struct PackedLayer {
  Guarded packed, scale, shift;
};

Guarded vector(const std::vector<double>& values, Placement placement) {
  Guarded g(values.size() * 4, 4, placement);
  for (size_t i = 0; i < values.size(); ++i) g.as<float>()[i] = static_cast<float>(values[i]);
  g.freeze();
  return g;
}

Guarded weight_of(const ReferenceLayer& reference, DType dtype, Placement placement) {
  const size_t element = static_cast<size_t>(element_size(dtype));
  Guarded weight(reference.weight.size() * element, element, placement);
  for (size_t i = 0; i < reference.weight.size(); ++i) write(weight.data(), i, dtype, reference.weight[i]);
  weight.freeze();
  return weight;
}

PackedLayer packed_layer(const Kernels& kernels, const ReferenceLayer& reference, DType dtype, Placement placement,
                         Layer& layer) {
  const ConvShape& s = reference.shape;
  const Guarded weight = weight_of(reference, dtype, placement);
  PackedLayer p{Guarded(static_cast<size_t>(pack_shape(kernels, s, dtype, layer.algorithm).bytes), 64, placement),
                vector(reference.scale, placement), vector(reference.shift, placement)};
  pack(kernels, s, dtype, layer.algorithm, weight.data(), p.packed.data(), kThreaded);
  p.packed.freeze();
  layer.shape = s;
  layer.packed = p.packed.as<PackHeader>();
  layer.scale = p.scale.as<float>();
  layer.shift = p.shift.as<float>();
  return p;
}

// An image between other channels, which hold NaN and are not to be touched. None of them lies between the image and a
// guard page.
struct Image {
  Guarded memory;
  size_t before, channels, pitch;
  DType dtype;

  Image(const Tensor& t, int slice, DType dtype, size_t alignment, Placement placement)
      : before(placement == Placement::kAfterGuard ? 0 : static_cast<size_t>(slice)),
        channels(static_cast<size_t>(t.c)),
        pitch(before + channels + (placement == Placement::kBeforeGuard ? 0 : static_cast<size_t>(slice))),
        dtype(dtype) {
    const size_t pixels = t.c ? t.data.size() / channels : 0;
    memory = Guarded(pixels * pitch * element(), alignment, placement);
  }
  size_t element() const { return static_cast<size_t>(element_size(dtype)); }
  char* data() const { return memory.data() + before * element(); }
  Pitch pitch_of() const { return static_cast<Pitch>(pitch); }
  size_t place(size_t i) const { return i / channels * pitch + i % channels; }  // of the image's i-th element
  void fill(const Tensor& t) const {
    for (size_t i = 0; i < t.data.size(); ++i) write(data(), place(i), dtype, t.data[i]);
  }
  bool others_untouched() const {
    for (size_t i = 0; i < memory.bytes(); ++i) {
      const size_t channel = i / element() % pitch;
      const bool own = channel >= before && channel < before + channels;
      if (!own && static_cast<unsigned char>(memory.data()[i]) != 0xff) return false;
    }
    return true;
  }
};

Image input(const Tensor& t, int slice, DType dtype, Placement placement) {
  Image image(t, slice, dtype, static_cast<size_t>(element_size(dtype)), placement);
  image.fill(t);
  image.memory.freeze();
  return image;
}

double tolerance(DType dtype, Algorithm algorithm) {
  if (dtype == DType::kBf16) return 3e-2;
  return algorithm == Algorithm::kWinograd4 ? 1e-4 : 1e-5;
}

// What is wrong with `actual`, or an empty string.
std::string compare(const Problem& problem, const Image& actual, Algorithm algorithm) {
  if (!actual.others_untouched()) return "channels beside the slice were written";
  const Tensor& expected = problem.expected;
  const bool exact = problem.values == Values::kInteger && algorithm != Algorithm::kWinograd4;
  double largest = 1e-3;
  for (double v : expected.data)
    if (!std::isnan(v)) largest = std::max(largest, std::fabs(v));
  for (size_t i = 0; i < expected.data.size(); ++i) {
    const double want = exact ? rounded(expected.data[i], problem.dtype) : expected.data[i];
    const double got = read(actual.data(), actual.place(i), problem.dtype);
    // Winograd spreads a NaN over its tile.
    if (problem.values == Values::kNaN && algorithm != Algorithm::kDirect && std::isnan(got)) continue;
    const bool ok = std::isnan(want) ? std::isnan(got)
                    : exact          ? got == want
                                     : std::fabs(got - want) <= largest * tolerance(problem.dtype, algorithm);
    if (!ok) {
      const size_t c = static_cast<size_t>(expected.c), w = static_cast<size_t>(expected.w),
                   h = static_cast<size_t>(expected.h);
      char text[160];
      std::snprintf(text, sizeof text, "out[%zu, %zu, %zu, %zu] is %.9g, expected %.9g (largest %.3g)", i / c / w / h,
                    i / c / w % h, i / c % w, i % c, got, want, largest);
      return text;
    }
  }
  return "";
}

// Runs a problem three times: to let the workspaces grow, with NaN in them, and in threads or at the same time twice.
std::string run(const Kernels& kernels, const BlockProblem& problem, Algorithm algorithm, Placement placement,
                unsigned seed) {
  const Case& c = problem.shape;
  const size_t element = static_cast<size_t>(element_size(problem.dtype));
  const Image x = input(problem.x, c.slice, problem.dtype, placement),
              residual = input(problem.residual, 2 * c.slice, problem.dtype, placement);
  const Guarded in_scale = vector(problem.in_scale, placement), in_shift = vector(problem.in_shift, placement);
  Block block;
  block.n = c.n;
  block.h = c.h;
  block.w = c.w;
  block.dtype = problem.dtype;
  block.x = x.data();
  block.x_pitch = x.pitch_of();
  block.pool = c.pool;
  block.average = c.average;
  if (c.prologue) {
    block.in_scale = in_scale.as<float>();
    block.in_shift = in_shift.as<float>();
  }
  if (c.residual) {
    block.residual = residual.data();
    block.residual_pitch = residual.pitch_of();
  }
  std::vector<PackedLayer> packed;
  block.layer_count = static_cast<int>(c.layers.size());
  for (size_t l = 0; l < c.layers.size(); ++l) {
    block.layers[l].algorithm = takes_winograd(c.layers[l]) ? algorithm : Algorithm::kDirect;
    block.layers[l].relu = l + 1 < c.layers.size() || c.relu;
    packed.push_back(packed_layer(kernels, problem.layers[l], problem.dtype, placement, block.layers[l]));
  }
  block.has_projection = !c.projection.empty();
  block.projection.relu = false;
  if (block.has_projection)
    packed.push_back(packed_layer(kernels, problem.layers.back(), problem.dtype, placement, block.projection));

  // Aligned outputs may be written past the cache, others not: both.
  const size_t alignment = seed % 2 ? 64 : element;
  auto output = [&] { return Image(problem.expected, c.slice, problem.dtype, alignment, placement); };
  release_memory();
  const Image first = output(), second = output(), third = output(), fourth = output();
  const size_t bytes = first.memory.bytes();
  auto run_into = [&](const Image& out, const Parallel& parallel) {
    Block b = block;
    b.out = out.data();
    b.out_pitch = out.pitch_of();
    b.reread = seed % 3 == 0;
    run_block(kernels, b, parallel);
  };
  run_into(first, kSerial);
  poison_workspaces();
  run_into(second, kSerial);
  std::string error = compare(problem, second, algorithm);
  if (!error.empty()) return error;
  if (std::memcmp(first.memory.data(), second.memory.data(), bytes)) return "two runs differ";
  run_into(third, kThreaded);
  error = compare(problem, third, algorithm);
  if (!error.empty()) return "in threads: " + error;
  if (seed % 4 == 0) {
    std::thread other([&] { run_into(third, kSerial); });
    run_into(fourth, kSerial);
    other.join();
    for (const Image* other_run : {&third, &fourth})
      if (std::memcmp(first.memory.data(), other_run->memory.data(), bytes)) return "two at once differ";
  }
  return "";
}

// A dense block, as `run` does a block.
std::string run_dense(const Kernels& kernels, const DenseProblem& problem, Algorithm algorithm, Placement placement) {
  const DenseCase& c = problem.shape;
  DenseShape shape;
  shape.n = c.n;
  shape.h = c.h;
  shape.w = c.w;
  shape.c = c.c;
  shape.growth = c.growth;
  shape.mid = c.mid;
  shape.count = c.count;
  shape.dtype = problem.dtype;
  shape.algorithm = algorithm;
  const Image x = input(problem.x, c.slice, problem.dtype, placement);
  std::vector<PackedLayer> packed;
  std::vector<Guarded> vectors;
  auto run_into = [&](const Image& out, const Parallel& parallel) {
    std::vector<Block> blocks;
    for (int i = 0; i < c.count; ++i) {
      const auto& layer = problem.layers[static_cast<size_t>(i)];
      Block& b = blocks.emplace_back(dense_layer(shape, i, out.data()));
      b.in_scale = vectors.emplace_back(vector(layer.in_scale, placement)).as<float>();
      b.in_shift = vectors.emplace_back(vector(layer.in_shift, placement)).as<float>();
      for (int l = 0; l < b.layer_count; ++l)
        packed.push_back(
            packed_layer(kernels, layer.layers[static_cast<size_t>(l)], problem.dtype, placement, b.layers[l]));
    }
    run_dense_block(kernels, shape, x.data(), x.pitch_of(), out.data(), blocks, parallel);
  };
  auto output = [&] { return Image(problem.expected, 0, problem.dtype, 64, placement); };
  release_memory();
  const Image first = output(), second = output(), third = output();
  run_into(first, kSerial);
  poison_workspaces();
  run_into(second, kSerial);
  std::string error = compare(problem, second, algorithm);
  if (!error.empty()) return error;
  if (std::memcmp(first.memory.data(), second.memory.data(), first.memory.bytes())) return "two runs differ";
  run_into(third, kThreaded);
  error = compare(problem, third, algorithm);
  return error.empty() ? "" : "in threads: " + error;
}

// The end of a classifier, as `run` does a block; in threads it gives the same bits.
std::string run_classifier(const Kernels& kernels, const HeadProblem& problem, Algorithm algorithm,
                           Placement placement) {
  const HeadCase& c = problem.shape;
  const Image x = input(problem.x, c.slice, problem.dtype, placement);
  const Guarded weight = weight_of(problem.linear, problem.dtype, placement),
                bias = vector(problem.linear.shift, placement);
  Head head;
  head.n = c.n;
  head.h = c.h;
  head.w = c.w;
  head.c = c.c;
  head.k = c.k;
  head.dtype = problem.dtype;
  head.x = x.data();
  head.x_pitch = x.pitch_of();
  head.weight = weight.data();
  head.bias = bias.as<float>();
  const auto element = static_cast<size_t>(element_size(problem.dtype));
  release_memory();
  const Image first(problem.expected, 0, problem.dtype, element, placement),
      second(problem.expected, 0, problem.dtype, element, placement);
  head.out = first.data();
  run_head(kernels, head, kThreaded);
  poison_workspaces();
  head.out = second.data();
  run_head(kernels, head, kSerial);
  const bool same = !std::memcmp(first.memory.data(), second.memory.data(), first.memory.bytes());
  return same ? compare(problem, second, algorithm) : "two runs differ";
}

// The pool of output tensors, from several threads: a freed block comes back, and idle ones stay under the limit.
std::string check_pool() {
  void* const block = pool_allocate(100000);
  std::memset(block, 1, 100000);
  pool_free(block);
  if (pool_allocate(100000) != block) return "a freed block is not used again";
  pool_free(block);
  const size_t limit = pool_limit();
  set_pool_limit(1 << 20);
  std::vector<std::thread> threads;
  for (int t = 1; t <= kThreads; ++t)
    threads.emplace_back([t] {
      for (size_t i = 0; i < 200; ++i) {
        const size_t bytes = i * 4099 % (300000 * static_cast<size_t>(t));
        auto* const data = static_cast<char*>(pool_allocate(bytes));
        std::memset(data, t, bytes);
        if (bytes && (data[0] != t || data[bytes - 1] != t)) std::abort();
        pool_free(data);
      }
    });
  for (std::thread& t : threads) t.join();
  set_pool_limit(limit);
  if (cached_bytes() > 1 << 20) return "idle blocks exceed the limit";
  release_memory();
  if (cached_bytes()) return "memory is kept after release_memory()";
  return "";
}

// A fresh workspace is zeros, whatever the memory held before.
std::string check_workspace() {
  constexpr size_t kBytes = 300000;
  for (int i = 0; i < 2; ++i) {
    auto* const data = static_cast<char*>(workspace(Slot::kTiles, kBytes));
    if (std::any_of(data, data + kBytes, [](char c) { return c != 0; })) return "a fresh workspace is not zero";
    std::memset(data, 1, kBytes);
    release_memory();  // the next one is likely to get this memory
  }
  return "";
}

// ---- which cases ---------------------------------------------------------------------------------------------------
ConvShape conv(int c, int k, int r, int s, int stride = 1, int pad = 0, int dilation = 1, int groups = 1) {
  return {c, k, r, s, stride, stride, pad, pad, dilation, dilation, groups};
}

Case bottleneck(int n, int h, int w, int c, int mid, int out, int stride1, int stride2, int dilation) {
  Case b{"bottleneck",
         n,
         h,
         w,
         {conv(c, mid, 1, 1, stride1), conv(mid, mid, 3, 3, stride2, dilation, dilation), conv(mid, out, 1, 1)},
         {}};
  if (c == out && stride1 * stride2 == 1)
    b.residual = true;
  else
    b.projection = {conv(c, out, 1, 1, stride1 * stride2)};
  return b;
}

Case basic_block(int n, int h, int w, int c, int out, int stride, int dilation) {
  Case b{"basic_block",
         n,
         h,
         w,
         {conv(c, out, 3, 3, stride, dilation, dilation), conv(out, out, 3, 3, 1, dilation, dilation)},
         {}};
  if (c == out && stride == 1)
    b.residual = true;
  else
    b.projection = {conv(c, out, 1, 1, stride)};
  return b;
}

Case layer(int n, int h, int w, const ConvShape& shape, bool residual = false, bool relu = true) {
  return {"conv", n, h, w, {shape}, {}, residual, relu, {}};
}

Case stem(int n, int h, int w, const ConvShape& shape, Pool pool) {
  return {"stem", n, h, w, {shape}, {}, false, true, pool};
}

// The same behind BatchNorm and ReLU; without a ReLU at the end, as in a pre-activation block.
Case preactivated(Case c) {
  c.name += ", pre-activated";
  c.prologue = true;
  c.relu = false;
  return c;
}

Case transition(int n, int h, int w, int c, int k) {
  Case t = preactivated(layer(n, h, w, conv(c, k, 1, 1)));
  t.name = "transition";
  t.average = true;
  return t;
}

Case sliced(Case c, int slice) {
  c.slice = slice;
  return c;
}

std::vector<Case> fixed_cases() {
  ConvShape uneven = conv(7, 9, 3, 5, 2, 1);
  uneven.stride_w = 3;
  uneven.pad_w = 2;
  uneven.dil_w = 2;
  return {
      layer(1, 1, 1, conv(1, 1, 1, 1)),
      layer(1, 1, 1, conv(3, 5, 3, 3, 1, 1), true, false),
      layer(0, 4, 4, conv(4, 4, 3, 3, 1, 1)),
      layer(2, 5, 3, conv(17, 33, 3, 3, 1, 1), true),
      layer(2, 9, 14, uneven, true, false),
      layer(1, 6, 6, conv(64, 64, 3, 3, 1, 1, 1, 64)),
      layer(1, 8, 7, conv(48, 96, 3, 3, 2, 1, 1, 3), true),
      layer(3, 7, 7, conv(65, 130, 1, 1, 2)),
      layer(1, 12, 12, conv(32, 64, 3, 3, 1, 3, 3), false, false),
      layer(1, 5, 5, conv(16, 16, 3, 3, 1, 2), false, false),
      layer(2, 96, 96, conv(4, 64, 1, 1), true),   // an output of 4 MiB is written past the caches
      layer(1, 6, 7, conv(1024, 48, 1, 1), true),  // pixels 4 KiB apart are gathered
      layer(1, 20, 7, conv(256, 400, 1, 1)),       // weights beyond L2
      layer(1, 3, 11, conv(16, 64, 1, 1), true),   // 1x1: the last tile begins before what is left of x
      layer(3, 5, 9, conv(300, 96, 1, 1)),         // ... sums in chains, tiles over the ends of images
      layer(1, 5, 6, conv(192, 40, 3, 3, 1, 1)),   // panels beyond L1: float32
      layer(1, 5, 6, conv(400, 33, 3, 3, 1, 1)),   // and bfloat16
      layer(4, 7, 7, conv(512, 16, 3, 3, 1, 1)),   // Winograd products of one frequency at a time
      bottleneck(2, 7, 7, 64, 16, 64, 1, 1, 1),
      bottleneck(1, 28, 28, 64, 16, 64, 1, 1, 1),
      bottleneck(6, 7, 5, 80, 16, 80, 1, 1, 1),  // 1x1 layers over several images, into and out of padded rows
      bottleneck(1, 14, 14, 48, 24, 96, 1, 2, 1),
      bottleneck(2, 9, 11, 20, 12, 40, 2, 1, 1),
      bottleneck(1, 10, 6, 32, 16, 32, 1, 1, 2),
      bottleneck(0, 8, 8, 16, 4, 16, 1, 1, 1),
      bottleneck(1, 1, 1, 8, 4, 8, 1, 1, 1),
      basic_block(2, 14, 14, 16, 16, 1, 1),
      basic_block(1, 13, 9, 16, 32, 2, 1),
      basic_block(1, 28, 28, 24, 24, 1, 1),
      basic_block(1, 7, 7, 5, 7, 1, 1),
      stem(1, 32, 32, conv(3, 64, 7, 7, 2, 3), {3, 2, 1}),
      stem(2, 17, 23, conv(3, 20, 7, 7, 2, 3), {3, 2, 1}),
      stem(1, 9, 9, conv(1, 8, 3, 3, 1, 1), {2, 2, 0}),
      layer(1, 6, 7, conv(80, 80, 3, 3, 1, 1, 1, 2)),  // groups that start in the middle of a cache line
      sliced(layer(2, 7, 5, conv(64, 32, 1, 1), true), 16),
      sliced(layer(1, 9, 8, conv(3, 64, 7, 7, 2, 3)), 1),
      sliced(layer(1, 30, 9, conv(32, 64, 3, 3, 1, 1), true), 32),
      sliced(layer(1, 6, 7, conv(992, 48, 1, 1)), 32),  // pixels 4 KiB apart
      sliced(bottleneck(1, 20, 14, 64, 16, 64, 1, 1, 1), 7),
      sliced(bottleneck(1, 14, 14, 48, 24, 96, 1, 2, 1), 16),
      sliced(stem(1, 32, 32, conv(3, 64, 7, 7, 2, 3), {3, 2, 1}), 3),
      preactivated(layer(1, 5, 4, conv(5, 7, 3, 3, 1, 1))),
      preactivated(layer(2, 14, 14, conv(64, 32, 1, 1))),
      preactivated(layer(1, 9, 14, conv(40, 24, 5, 5, 2, 2))),
      preactivated(layer(1, 7, 7, conv(12, 24, 3, 3, 1, 1, 1, 3))),
      preactivated(layer(1, 4, 16, conv(256, 16, 1, 1))),  // threads share the rows of one panel
      preactivated(sliced(layer(2, 16, 16, conv(96, 128, 1, 1)), 32)),
      preactivated(bottleneck(2, 7, 7, 64, 16, 64, 1, 1, 1)),
      preactivated(sliced(bottleneck(1, 14, 14, 48, 24, 96, 1, 2, 1), 5)),
      preactivated(basic_block(2, 14, 14, 16, 16, 1, 1)),
      preactivated(basic_block(1, 13, 9, 16, 32, 2, 1)),
      transition(2, 8, 8, 64, 32),
      transition(1, 7, 5, 20, 10),
      sliced(transition(3, 9, 14, 48, 24), 16),
      transition(1, 2, 2, 8, 4),
  };
}

std::vector<DenseCase> dense_cases() {
  return {
      {1, 8, 8, 16, 8, 32, 1, 0},      //
      {2, 7, 7, 64, 32, 128, 3, 0},    // an image, all layers, then the next
      {5, 7, 7, 24, 12, 48, 4, 8},     // two images at a time
      {1, 14, 14, 32, 32, 128, 2, 0},  // threads share rows
      {1, 30, 20, 16, 12, 0, 3, 16},   // bands; without 1x1
      {4, 3, 5, 3, 5, 7, 2, 1},        //
      {1, 1, 1, 8, 4, 16, 2, 0},       //
      {0, 4, 4, 8, 4, 16, 2, 0},       //
  };
}

std::vector<HeadCase> head_cases() {
  return {
      {1, 8, 8, 64, 10, 0},      // one thread
      {1, 7, 7, 512, 100, 0},    //
      {6, 7, 7, 300, 33, 4},     // tails of channels, images and outputs
      {3, 1, 1, 2050, 18, 1},    // several chains, one pixel
      {2, 16, 32, 17, 5, 15},    //
      {5, 3, 5, 1, 1, 0},        //
      {9, 4, 4, 129, 300, 130},  //
      {0, 4, 4, 8, 4, 0},        //
  };
}

Case random_block(std::mt19937& random) {
  auto pick = [&](int low, int high) {
    return low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1));
  };
  auto channels = [&] { return random() % 3 ? pick(1, 40) : 16 * pick(1, 6); };
  const int n = pick(1, 3), h = pick(1, 18), w = pick(1, 18), dilation = random() % 4 ? 1 : 2;
  switch (random() % 4) {
    case 0: {
      const int c = channels(), out = random() % 2 ? c : channels();
      return bottleneck(n, h, w, c, channels(), out, random() % 4 ? 1 : 2, random() % 3 ? 1 : 2, dilation);
    }
    case 1: {
      const int c = channels(), out = random() % 2 ? c : channels();
      return basic_block(n, h, w, c, out, random() % 3 ? 1 : 2, dilation);
    }
    case 2: {
      const int r = pick(1, 7), kernel = pick(1, 3);
      return stem(n, h + 2 * r, w + 2 * r, conv(pick(1, 20), channels(), r, r, pick(1, 2), r / 2),
                  {kernel, pick(1, 3), pick(0, kernel / 2)});
    }
    default: {
      const int groups = random() % 3 ? 1 : pick(1, 5), r = random() % 2 ? 3 : pick(1, 5),
                s = random() % 4 ? r : pick(1, 5);
      ConvShape shape = conv(groups * pick(1, 24), groups * pick(1, 40), r, s, pick(1, 2), r / 2, dilation, groups);
      if (random() % 2) shape.stride_h = shape.stride_w = 1;
      shape.pad_w = random() % 4 ? s / 2 : pick(0, 4);
      return layer(n, h + dilation * r, w + dilation * s, shape, random() % 2, random() % 2);
    }
  }
}

Case random_case(std::mt19937& random) {
  Case c = random_block(random);
  if (!c.pool.kernel && random() % 3 == 0) c = preactivated(c);
  if (c.prologue && c.layers.size() == 1 && random() % 3 == 0)
    c = transition(c.n, c.h + 1, c.w + 1, c.layers[0].c, c.layers[0].k);
  return random() % 3 ? c : sliced(c, 1 + static_cast<int>(random() % 32));
}

std::string describe(const DenseCase& c) {
  char text[160];
  std::snprintf(text, sizeof text, "dense block n=%d %dx%d c=%d growth=%d mid=%d layers=%d slice(%d)", c.n, c.h, c.w,
                c.c, c.growth, c.mid, c.count, c.slice);
  return text;
}

std::string describe(const HeadCase& c) {
  char text[160];
  std::snprintf(text, sizeof text, "head n=%d %dx%d c=%d k=%d slice(%d)", c.n, c.h, c.w, c.c, c.k, c.slice);
  return text;
}

std::string describe(const Case& c) {
  std::string text = c.name + " n=" + std::to_string(c.n) + " " + std::to_string(c.h) + "x" + std::to_string(c.w);
  auto add = [&](const char* what, const ConvShape& s) {
    char buffer[160];
    std::snprintf(buffer, sizeof buffer, " %s(c=%d k=%d %dx%d stride=%d,%d pad=%d,%d dil=%d,%d groups=%d)", what, s.c,
                  s.k, s.r, s.s, s.stride_h, s.stride_w, s.pad_h, s.pad_w, s.dil_h, s.dil_w, s.groups);
    text += buffer;
  };
  for (const ConvShape& s : c.layers) add("conv", s);
  for (const ConvShape& s : c.projection) add("projection", s);
  if (c.pool.kernel)
    text += " pool(" + std::to_string(c.pool.kernel) + "," + std::to_string(c.pool.stride) + "," +
            std::to_string(c.pool.pad) + ")";
  if (c.slice) text += " slice(" + std::to_string(c.slice) + ")";
  return text + (c.residual ? " residual" : "") + (c.relu ? "" : " no-relu");
}

// Four blocks as one program, the third of which adds what the first gave: prepared once, run again on other images,
// from two threads at once. The same bits as block by block.
std::string check_program() {
  const std::string selected = kernels().name;
  std::string error;
  for (int isa = 0; isa < kIsaCount && error.empty(); ++isa) {
    if (!isa_runs(static_cast<Isa>(isa))) continue;
    select_isa(static_cast<Isa>(isa));
    // Whole images through all blocks; bands of one; channels shared.
    for (const Case& c : {basic_block(4, 9, 8, 16, 16, 1, 1), basic_block(1, 24, 7, 32, 32, 1, 1),
                          bottleneck(1, 5, 5, 64, 16, 64, 1, 1, 1)}) {
      const BlockProblem problem(c, DType::kF32, Values::kReal, 7);
      Block block;
      block.n = c.n;
      block.h = c.h;
      block.w = c.w;
      std::vector<PackedLayer> packed;
      block.layer_count = static_cast<int>(c.layers.size());
      for (size_t l = 0; l < c.layers.size(); ++l)
        packed.push_back(packed_layer(kernels(), problem.layers[l], problem.dtype, Placement::kHeap, block.layers[l]));
      const auto image = [&] { return Image(problem.expected, 0, problem.dtype, 64, Placement::kHeap); };
      const int sources[][2] = {{Step::kInput, Step::kInput}, {0, 0}, {1, 0}, {2, 2}};
      std::vector<Step> steps;
      for (const auto& [x, residual] : sources) {
        Step& step = steps.emplace_back();
        step.block = block;
        step.block.x = step.block.residual = &block;  // not read: each run has its own
        step.c = problem.x.c;
        step.out = {c.n, problem.x.c, c.h, c.w};
        step.x = x;
        step.residual = residual;
      }
      const Program program(std::move(steps));
      auto run_twice = [&](unsigned seed, std::string& what) {
        for (unsigned i = 0; i < 2; ++i) {
          const BlockProblem other(c, DType::kF32, Values::kReal, seed + i);
          const Image x = input(other.x, 0, DType::kF32, Placement::kHeap);
          std::vector<Image> one_by_one;
          auto source = [&](int s) { return s == Step::kInput ? x.data() : one_by_one[static_cast<size_t>(s)].data(); };
          for (const auto& [from, residual] : sources) {
            Block b = block;
            b.x = source(from);
            b.residual = source(residual);
            b.out = one_by_one.emplace_back(image()).data();
            run_block(kernels(), b, kThreaded);
          }
          const Image out = image();
          program.run(x.data(), out.data(), kThreaded);
          if (std::memcmp(out.data(), one_by_one.back().data(), out.memory.bytes()))
            what = "differs from block by block";
        }
      };
      std::string beside;
      std::thread other([&] { run_twice(20, beside); });
      run_twice(10, error);
      other.join();
      if (error.empty()) error = beside;
      if (!error.empty()) error = std::string(kernels().name) + ", " + describe(c) + ": " + error;
    }
  }
  select_isa(isa_named(selected));
  return error;
}

}  // namespace

int main(int argc, char** argv) {
  unsigned seed = 0;
  int case_count = 60;
  bool blocks = true;
  std::vector<std::string> wanted;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--seed" && i + 1 < argc)
      seed = static_cast<unsigned>(std::stoul(argv[++i]));
    else if (arg == "--cases" && i + 1 < argc)
      case_count = std::stoi(argv[++i]);
    else if (arg == "--no-blocks")  // only what several threads share: the pool, the workspaces, a program
      blocks = false;
    else
      wanted.push_back(arg);
  }
  watch_for_crashes();

  std::mt19937 random(seed);
  std::vector<Case> cases = fixed_cases();
  for (int i = 0; i < case_count; ++i) cases.push_back(random_case(random));

  int failures = 0;
  for (auto [name, check] :
       {std::pair{"pool", check_pool}, std::pair{"workspace", check_workspace}, std::pair{"program", check_program}}) {
    std::snprintf(current, sizeof current, "%s", name);
    if (const std::string error = check(); !error.empty()) {
      std::printf("FAILED %s: %s\n", name, error.c_str());
      ++failures;
    }
  }
  if (!blocks) {
    std::printf("%d failed\n", failures);
    return failures ? 1 : 0;
  }
  std::vector<int> passed(kIsaCount);
  // One problem on every instruction set and with every algorithm. `index` decides how buffers are placed.
  auto check = [&](const auto& problem, const std::string& name, size_t index, bool winograd, auto run_problem) {
    for (int isa = 0; isa < kIsaCount; ++isa)
      for (Algorithm algorithm : {Algorithm::kDirect, Algorithm::kWinograd2, Algorithm::kWinograd4}) {
        const char* isa_text = isa_name(static_cast<Isa>(isa));
        if (!isa_runs(static_cast<Isa>(isa))) continue;
        if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), isa_text) == wanted.end()) continue;
        if (algorithm != Algorithm::kDirect && !winograd) continue;
        const auto placement = static_cast<Placement>((index + static_cast<size_t>(problem.values)) % 3);
        std::snprintf(current, sizeof current, "%s %s %s %s: %s", isa_text, name_of(algorithm),
                      problem.dtype == DType::kBf16 ? "bf16" : "f32", name_of(problem.values), name.c_str());
        std::string error;
        try {
          error = run_problem(kernels_of(static_cast<Isa>(isa)), problem, algorithm, placement);
        } catch (const std::exception& e) {
          error = e.what();
        }
        if (error.empty()) {
          ++passed[isa];
        } else {
          std::printf("FAILED %s\n       %s\n", current, error.c_str());
          ++failures;
        }
      }
  };
  const std::vector<DenseCase> dense = dense_cases();
  const std::vector<HeadCase> heads = head_cases();
  for (DType dtype : {DType::kF32, DType::kBf16})
    for (Values values : {Values::kReal, Values::kInteger, Values::kNaN}) {
      for (size_t i = 0; i < cases.size(); ++i) {
        const unsigned problem_seed = seed * 1000003 + static_cast<unsigned>(i) * 7 + static_cast<unsigned>(values);
        const auto& layers = cases[i].layers;
        check(BlockProblem(cases[i], dtype, values, problem_seed), describe(cases[i]), i,
              std::any_of(layers.begin(), layers.end(), takes_winograd),
              [&](const auto&... arguments) { return run(arguments..., problem_seed); });
      }
      for (size_t i = 0; i < dense.size(); ++i) {
        // What lies between several layers has more than the eight bits of bfloat16.
        if (values == Values::kInteger && dtype == DType::kBf16 && dense[i].count > 1) continue;
        check(DenseProblem(dense[i], dtype, values, seed), describe(dense[i]), i, true, run_dense);
      }
      for (size_t i = 0; i < heads.size(); ++i) {
        const int pixels = heads[i].h * heads[i].w;
        if (values == Values::kInteger && (pixels & (pixels - 1))) continue;  // the mean has to be rounded
        check(HeadProblem(heads[i], dtype, values, seed), describe(heads[i]), i, false, run_classifier);
      }
    }
  for (int isa = 0; isa < kIsaCount; ++isa)
    if (passed[isa]) std::printf("%s: %d passed\n", isa_name(static_cast<Isa>(isa)), passed[isa]);
  std::printf("%d failed\n", failures);
  return failures || passed == std::vector<int>(kIsaCount) ? 1 : 0;
}
