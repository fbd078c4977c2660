// Tests of the CPU kernels without torch and Python, so that sanitizers can watch them.
//
//   native_tests [--seed N] [--cases N] [ISA...]
//
// Every block runs on every instruction set of this machine with every algorithm that takes it. Inputs lie between
// guard pages or in exactly sized heap blocks; outputs and workspaces are filled with NaN before the run that counts.
// Small integers must agree bit for bit, other values with float64 within the rounding of the type.
#include <csignal>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

#include "cpu/isa.h"
#include "cpu/memory.h"
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
};

enum class Values { kReal, kInteger, kNaN };  // kNaN: real, and one NaN in x

const char* name_of(Values v) { return v == Values::kReal ? "real" : v == Values::kInteger ? "integer" : "NaN"; }
const char* name_of(Algorithm a) {
  return a == Algorithm::kDirect ? "direct" : a == Algorithm::kWinograd2 ? "winograd2" : "winograd4";
}

bool takes_winograd(const ConvShape& s) {
  return s.r == 3 && s.s == 3 && s.stride_h == 1 && s.stride_w == 1 && s.dil_h == 1 && s.dil_w == 1 && s.groups == 1;
}

// Inputs and expected outputs of a case, rounded to the dtype.
struct Problem {
  const Case& shape;
  DType dtype;
  Values values;
  std::mt19937 random;
  Tensor x, residual, expected;
  std::vector<ReferenceLayer> layers;  // the projection last

  Problem(const Case& c, DType dtype, Values values, unsigned seed)
      : shape(c), dtype(dtype), values(values), random(seed) {
    x = tensor(c.n, c.h, c.w, c.layers[0].c);
    for (const ConvShape& s : c.layers) layers.push_back(layer(s));
    for (const ConvShape& s : c.projection) layers.push_back(layer(s));
    if (values == Values::kNaN && !x.data.empty()) x.data[random() % x.data.size()] = NAN;

    Tensor y = x;
    for (size_t l = 0; l < c.layers.size(); ++l) {
      y = convolve(y, layers[l]);
      if (l + 1 < c.layers.size()) ::relu(y);
    }
    const Tensor shortcut = c.projection.empty() ? Tensor() : convolve(x, layers.back());
    if (c.residual) residual = tensor(y.n, y.h, y.w, y.c);
    for (size_t i = 0; i < y.data.size(); ++i)
      y.data[i] += (c.residual ? residual.data[i] : 0) + (c.projection.empty() ? 0 : shortcut.data[i]);
    if (c.relu) ::relu(y);
    if (c.pool.kernel) y = max_pool(y, c.pool);
    expected = std::move(y);
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
    l.scale.resize(s.k);
    l.shift.resize(s.k);
    for (double& v : l.weight) {
      v = value();
      // About three terms an output: what lies between the layers then has no more than bfloat16's eight bits.
      if (values == Values::kInteger && random() % terms >= 3) v = 0;
    }
    for (int k = 0; k < s.k; ++k) {
      if (values == Values::kInteger) {
        l.scale[k] = random() % 2 ? 1 : 0.5;
        l.shift[k] = static_cast<int>(random() % 9) - 4;
      } else {
        l.scale[k] = static_cast<float>((1 + value() / 2) / std::sqrt(terms));
        l.shift[k] = static_cast<float>(value());
      }
    }
    return l;
  }
};

struct PackedLayer {
  Guarded packed, scale, shift;
};

PackedLayer packed_layer(const Kernels& kernels, const ReferenceLayer& reference, DType dtype, Placement placement,
                         Layer& layer) {
  const ConvShape& s = reference.shape;
  const size_t element = static_cast<size_t>(element_size(dtype));
  Guarded weight(reference.weight.size() * element, element, placement);
  for (size_t i = 0; i < reference.weight.size(); ++i) write(weight.data(), i, dtype, reference.weight[i]);
  weight.freeze();
  PackedLayer p{Guarded(static_cast<size_t>(pack_shape(kernels, s, dtype, layer.algorithm).bytes), 64, placement),
                Guarded(static_cast<size_t>(s.k) * 4, 4, placement),
                Guarded(static_cast<size_t>(s.k) * 4, 4, placement)};
  pack(kernels, s, dtype, layer.algorithm, weight.data(), p.packed.data(), kThreaded);
  for (int k = 0; k < s.k; ++k) {
    p.scale.as<float>()[k] = static_cast<float>(reference.scale[k]);
    p.shift.as<float>()[k] = static_cast<float>(reference.shift[k]);
  }
  for (const Guarded* g : {&p.packed, &p.scale, &p.shift}) g->freeze();
  layer.shape = s;
  layer.packed = p.packed.as<PackHeader>();
  layer.scale = p.scale.as<float>();
  layer.shift = p.shift.as<float>();
  return p;
}

Guarded input(const Tensor& t, DType dtype, Placement placement) {
  const size_t element = static_cast<size_t>(element_size(dtype));
  Guarded g(t.data.size() * element, element, placement);
  for (size_t i = 0; i < t.data.size(); ++i) write(g.data(), i, dtype, t.data[i]);
  g.freeze();
  return g;
}

double tolerance(DType dtype, Algorithm algorithm) {
  if (dtype == DType::kBf16) return 3e-2;
  return algorithm == Algorithm::kWinograd4 ? 1e-4 : 1e-5;
}

// What is wrong with `actual`, or an empty string.
std::string compare(const Problem& problem, const void* actual, Algorithm algorithm) {
  const Tensor& expected = problem.expected;
  const bool exact = problem.values == Values::kInteger && algorithm != Algorithm::kWinograd4;
  double largest = 1e-3;
  for (double v : expected.data)
    if (!std::isnan(v)) largest = std::max(largest, std::fabs(v));
  for (size_t i = 0; i < expected.data.size(); ++i) {
    const double want = exact ? rounded(expected.data[i], problem.dtype) : expected.data[i];
    const double got = read(actual, i, problem.dtype);
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
std::string run(const Kernels& kernels, const Problem& problem, Algorithm algorithm, Placement placement,
                unsigned seed) {
  const Case& c = problem.shape;
  const size_t element = static_cast<size_t>(element_size(problem.dtype));
  const Guarded x = input(problem.x, problem.dtype, placement),
                residual = input(problem.residual, problem.dtype, placement);
  Block block;
  block.n = c.n;
  block.h = c.h;
  block.w = c.w;
  block.dtype = problem.dtype;
  block.x = x.data();
  block.pool = c.pool;
  if (c.residual) block.residual = residual.data();
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
  const size_t alignment = seed % 2 ? 64 : element, bytes = problem.expected.data.size() * element;
  auto output = [&] { return Guarded(bytes, alignment, placement); };
  release_memory();
  Guarded first = output(), second = output(), third = output(), fourth = output();
  auto run_into = [&](const Guarded& out, const Parallel& parallel) {
    Block b = block;
    b.out = out.data();
    run_block(kernels, b, parallel);
  };
  run_into(first, kSerial);
  poison_workspaces();
  run_into(second, kSerial);
  std::string error = compare(problem, second.data(), algorithm);
  if (!error.empty()) return error;
  if (std::memcmp(first.data(), second.data(), bytes)) return "two runs differ";
  run_into(third, kThreaded);
  error = compare(problem, third.data(), algorithm);
  if (!error.empty()) return "in threads: " + error;
  if (seed % 4 == 0) {
    std::thread other([&] { run_into(third, kSerial); });
    run_into(fourth, kSerial);
    other.join();
    if (std::memcmp(first.data(), third.data(), bytes) || std::memcmp(first.data(), fourth.data(), bytes))
      return "two at once differ";
  }
  return "";
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
      layer(1, 5, 6, conv(192, 40, 3, 3, 1, 1)),   // panels beyond L1: float32
      layer(1, 5, 6, conv(400, 33, 3, 3, 1, 1)),   // and bfloat16
      layer(4, 7, 7, conv(512, 16, 3, 3, 1, 1)),   // Winograd products of one frequency at a time
      bottleneck(2, 7, 7, 64, 16, 64, 1, 1, 1),
      bottleneck(1, 28, 28, 64, 16, 64, 1, 1, 1),
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
  };
}

Case random_case(std::mt19937& random) {
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
  return text + (c.residual ? " residual" : "") + (c.relu ? "" : " no-relu");
}

}  // namespace

int main(int argc, char** argv) {
  unsigned seed = 0;
  int case_count = 60;
  std::vector<std::string> wanted;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--seed" && i + 1 < argc)
      seed = static_cast<unsigned>(std::stoul(argv[++i]));
    else if (arg == "--cases" && i + 1 < argc)
      case_count = std::stoi(argv[++i]);
    else
      wanted.push_back(arg);
  }
  watch_for_crashes();

  std::mt19937 random(seed);
  std::vector<Case> cases = fixed_cases();
  for (int i = 0; i < case_count; ++i) cases.push_back(random_case(random));

  int failures = 0;
  std::snprintf(current, sizeof current, "pool");
  if (const std::string error = check_pool(); !error.empty()) {
    std::printf("FAILED pool: %s\n", error.c_str());
    ++failures;
  }
  std::vector<int> passed(kIsaCount);
  for (size_t i = 0; i < cases.size(); ++i)
    for (DType dtype : {DType::kF32, DType::kBf16})
      for (Values values : {Values::kReal, Values::kInteger, Values::kNaN}) {
        const unsigned problem_seed = seed * 1000003 + static_cast<unsigned>(i) * 7 + static_cast<unsigned>(values);
        const Problem problem(cases[i], dtype, values, problem_seed);
        for (int isa = 0; isa < kIsaCount; ++isa)
          for (Algorithm algorithm : {Algorithm::kDirect, Algorithm::kWinograd2, Algorithm::kWinograd4}) {
            const char* isa_text = isa_name(static_cast<Isa>(isa));
            if (!isa_runs(static_cast<Isa>(isa))) continue;
            if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), isa_text) == wanted.end()) continue;
            const auto& layers = cases[i].layers;
            if (algorithm != Algorithm::kDirect && std::none_of(layers.begin(), layers.end(), takes_winograd)) continue;
            const auto placement = static_cast<Placement>((i + static_cast<size_t>(values)) % 3);
            std::snprintf(current, sizeof current, "%s %s %s %s: %s", isa_text, name_of(algorithm),
                          dtype == DType::kBf16 ? "bf16" : "f32", name_of(values), describe(cases[i]).c_str());
            std::string error;
            try {
              error = run(kernels_of(static_cast<Isa>(isa)), problem, algorithm, placement, problem_seed);
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
      }
  for (int isa = 0; isa < kIsaCount; ++isa)
    if (passed[isa]) std::printf("%s: %d passed\n", isa_name(static_cast<Isa>(isa)), passed[isa]);
  std::printf("%d failed\n", failures);
  return failures || passed == std::vector<int>(kIsaCount) ? 1 : 0;
}
