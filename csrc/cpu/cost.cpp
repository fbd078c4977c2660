#include "cost.h"

#include <algorithm>

#include "isa.h"

namespace resnet_fused::cpu {
namespace {

// Rates of one thread. Peaks were measured with the register tile alone on data in L1 (GFLOP/s, Sapphire Rapids at
// 1.7-2.1 GHz; avx512_bf16: Zen 5): what counts is their ratio.
struct Rates {
  double f32, bf16;
};
constexpr Rates kRates[kIsaCount] = {{13e9, 13e9}, {55e9, 55e9}, {110e9, 110e9}, {110e9, 220e9}, {110e9, 900e9}};
constexpr double kPrologue = 8e9;  // elements/s of a prologue
constexpr double kLaunch = 4e-6;   // of one parallel region
// Of one op of torch, dispatched from Python: 20 us when all of that is in the caches, 50 to 100 after a kernel that
// filled them. The package's own blocks are recorded, and pay it once for a stage.
constexpr double kVendorCall = 40e-6;
constexpr double kOwnEfficiency = 0.88, kVendorEfficiency = 0.85;  // share of the peak outside memory traffic
// Winograd's products are of as many rows as a unit of work has tiles of pixels, 2 of F(4x4) in a band of an 8x8 image:
// at least kWinogradRows are computed, with new weights after each few of them.
constexpr double kWinogradEfficiency = 0.8;
constexpr int64_t kWinogradRows = 8;
// A tile of products takes some more steps' time to begin and end, 2 of the 8 of 16 channels in bfloat16; one that goes
// through the taps of a window 9 of 72.
constexpr double kWinogradSteps = 2, kWindowSteps = 9;
constexpr double kTransform4 = 1.2;  // F(4x4)'s take more operations for what they move than F(2x2)'s
constexpr double kVendorAmx = 0.6;   // basic blocks of 16 to 128 channels take oneDNN 1.5 to 2.4 times as long as ours

double rate(Isa isa, bool bf16) {
  return bf16 ? kRates[static_cast<int>(isa)].bf16 : kRates[static_cast<int>(isa)].f32;
}

double conv_flops(const ConvShape& s, int64_t pixels) {
  return 2.0 * static_cast<double>(pixels) * s.k * (s.c / s.groups) * s.r * s.s;
}

double padded(int64_t v, int64_t unit) { return static_cast<double>((v + unit - 1) / unit * unit); }

struct Geometry {
  int h[4], w[4];  // of x, then of each layer's output
  int64_t out_pixels, in_pixels;
  double out_bytes, in_bytes;
};
Geometry geometry(const Block& b) {
  Geometry g{};
  g.h[0] = b.average ? b.h / 2 : b.h;
  g.w[0] = b.average ? b.w / 2 : b.w;
  for (int l = 0; l < b.layer_count; ++l) {
    g.h[l + 1] = b.layers[l].shape.out_h(g.h[l]);
    g.w[l + 1] = b.layers[l].shape.out_w(g.w[l]);
  }
  int h = g.h[b.layer_count], w = g.w[b.layer_count];
  if (b.pool.kernel) {
    h = b.pool.out(h);
    w = b.pool.out(w);
  }
  g.in_pixels = int64_t{b.n} * b.h * b.w;
  g.out_pixels = int64_t{b.n} * h * w;
  g.in_bytes = static_cast<double>(g.in_pixels * b.layers[0].shape.c * element_size(b.dtype));
  g.out_bytes = static_cast<double>(g.out_pixels * b.layers[b.layer_count - 1].shape.k * element_size(b.dtype));
  return g;
}

// Seconds of one thread for one layer's products, in so many units of work, waste of partial panels and tiles included.
double layer_seconds(const Kernels& kernels, DType dtype, const Layer& layer, int64_t n, int out_h, int out_w,
                     int64_t units) {
  const ConvShape& s = layer.shape;
  const PackShape pack = pack_shape(kernels, s, dtype, layer.algorithm);
  const double columns = static_cast<double>(s.groups) * pack.panels * pack.panel;
  const int m = winograd_m(layer.algorithm);
  if (m) {
    const double tiles = static_cast<double>(n) * padded(out_h, m) / m * (padded(out_w, m) / m);
    const int64_t of_unit = (static_cast<int64_t>(tiles) + units - 1) / units;
    const double rows = static_cast<double>(units) * padded(std::max(of_unit, kWinogradRows), 2);
    const double products = 2.0 * rows * (m + 2) * (m + 2) * columns * (s.c + kWinogradSteps * (pack.bf16 ? 2 : 1));
    const double moved =
        tiles * (m + 2) * (m + 2) * 2 * ((pack.bf16 ? 2 : 4) * s.c + 4 * columns) * (m == 4 ? kTransform4 : 1);
    return products / (rate(kernels.isa, pack.bf16) * kWinogradEfficiency) + moved / memory_rates().own_cache;
  }
  const double steps = static_cast<double>(pack.words) * pack.taps + (pack.taps > 1 ? kWindowSteps : 0);
  const double words = steps * (pack.bf16 ? 2 : 1);
  const double pixels = static_cast<double>(n) * out_h * out_w;
  return 2.0 * pixels * words * columns / (rate(kernels.isa, pack.bf16) * kOwnEfficiency);
}

}  // namespace

Cost block_cost(const Kernels& kernels, const Block& b, int threads) {
  const Geometry g = geometry(b);
  const Schedule p = schedule(kernels, b, threads);
  const int64_t groups = (b.n + p.images - 1) / p.images;
  const int64_t computed = p.split_channels ? 1 : std::max<int64_t>(1, groups * p.bands);  // in so many pieces
  Cost c{};
  double seconds = 0;
  for (int l = 0; l < b.layer_count; ++l) {
    const int64_t pixels = int64_t{b.n} * g.h[l + 1] * g.w[l + 1];
    c.flops += conv_flops(b.layers[l].shape, pixels);
    double layer = layer_seconds(kernels, b.dtype, b.layers[l], b.n, g.h[l + 1], g.w[l + 1], computed);
    // rows between two bands are computed twice
    if (l + 1 < b.layer_count && !p.split_channels) {
      const ConvShape& next = b.layers[l + 1].shape;
      layer *= 1.0 + double((next.r - 1) * next.dil_h) * (p.bands - 1) / std::max(1, g.h[l + 1]);
    }
    // without Winograd, threads share rows where there are too few channels for all
    const int panels = pack_shape(kernels, b.layers[l].shape, b.dtype, b.layers[l].algorithm).panels;
    if (p.split_channels && winograd_m(b.layers[l].algorithm) && panels < threads)
      layer *= static_cast<double>(threads) / panels;
    seconds += layer;
  }
  if (b.in_scale)
    seconds += static_cast<double>(g.in_pixels) * b.layers[0].shape.c * (b.has_projection ? 2 : 1) / kPrologue;
  if (b.has_projection) {
    const int l = b.layer_count;
    c.flops += conv_flops(b.projection.shape, int64_t{b.n} * g.h[l] * g.w[l]);
    seconds += layer_seconds(kernels, b.dtype, b.projection, b.n, g.h[l], g.w[l], computed);
  }
  c.bytes = g.in_bytes + g.out_bytes + (b.residual && b.residual != b.x ? g.out_bytes : 0);
  seconds += c.bytes / (b.reread ? memory_rates().own_cache : memory_rates().memory);
  const int64_t units = p.split_channels ? threads : computed;
  int64_t weights =
      b.has_projection ? pack_shape(kernels, b.projection.shape, b.dtype, b.projection.algorithm).bytes : 0;
  for (int l = 0; l < b.layer_count; ++l)
    weights += pack_shape(kernels, b.layers[l].shape, b.dtype, b.layers[l].algorithm).bytes;
  // Each thread reads all of them, once or, where they do not stay in L2, for each unit, from L3 after the first time;
  // threads that share channels read a part each.
  const int64_t passes = p.split_channels ? 1 : weights > kKeptWeights ? units : threads;
  // Few of them are found in L3 the first time, too: blocks that small are most of a small model. Not so
  // layers, whose neighbours have as many, alone or in a dense block (reread).
  const bool kept = weights <= kKeptWeights && b.layer_count > 1 && !b.reread;
  const double first = kept ? memory_rates().shared_cache : memory_rates().memory;
  seconds += static_cast<double>(weights) * (1 / first + static_cast<double>(passes - 1) / memory_rates().shared_cache);
  const double share = padded(units, threads) / std::max<int64_t>(1, units);  // the slowest thread's
  c.seconds = seconds * share / threads + kLaunch * (p.split_channels ? b.layer_count : 1);
  c.workspace_bytes = p.workspace_bytes;
  c.note = p.split_channels
               ? "threads share channels"
               : std::to_string(p.images) + (p.images == 1 ? " image, " : " images, ") + std::to_string(p.rows) +
                     " rows a step" + (p.bands > 1 ? ", " + std::to_string(p.bands) + " bands" : "");
  return c;
}

Cost vendor_cost(const Block& b, int threads) {
  // oneDNN takes the best instruction set of the machine, whatever this library was told to take.
  Isa best = Isa::kPortable;
  for (int i = 0; i < kIsaCount; ++i)
    if (isa_runs(static_cast<Isa>(i))) best = static_cast<Isa>(i);
  const Geometry g = geometry(b);
  const double element = static_cast<double>(element_size(b.dtype));
  Cost c{};
  double seconds = 0, bytes = 0;
  const bool bf16 = b.dtype == DType::kBf16;
  const double efficiency = bf16 && best == Isa::kAmx ? kVendorAmx : kVendorEfficiency;
  auto add = [&](const ConvShape& s, int64_t in_pixels, int64_t out_pixels) {
    const double flops = conv_flops(s, out_pixels);
    c.flops += flops;
    // oneDNN's AMX kernels, too, multiply 32 channels at a time.
    const int64_t depth = s.c / s.groups;
    const double waste = bf16 && depth >= 16 ? padded(depth, 32) / static_cast<double>(depth) : 1;
    seconds += waste * flops / (rate(best, bf16) * efficiency);
    bytes += (static_cast<double>(in_pixels) * s.c + static_cast<double>(out_pixels) * s.k) * element;
    bytes += static_cast<double>(s.k) * static_cast<double>(depth) * s.r * s.s * element;  // the weights
    c.seconds += kVendorCall;
  };
  for (int l = 0; l < b.layer_count; ++l)
    add(b.layers[l].shape, int64_t{b.n} * g.h[l] * g.w[l], int64_t{b.n} * g.h[l + 1] * g.w[l + 1]);
  if (b.in_scale) {  // scale and shift, ReLU and average one by one
    bytes += 4 * g.in_bytes + (b.average ? 1.25 * g.in_bytes : 0);
    c.seconds += (b.average ? 3 : 2) * kVendorCall;
  }
  const int64_t last = int64_t{b.n} * g.h[b.layer_count] * g.w[b.layer_count];
  if (b.has_projection) add(b.projection.shape, g.in_pixels, last);
  if (b.has_projection || b.residual)
    bytes += static_cast<double>(last) * b.layers[b.layer_count - 1].shape.k * element;
  if (b.pool.kernel) {  // a kernel of its own
    bytes += static_cast<double>(last) * b.layers[0].shape.k * element + g.out_bytes;
    c.seconds += kVendorCall;
  }
  c.bytes = bytes;
  c.seconds += (seconds + bytes / memory_rates().memory) / threads;
  c.note = "one kernel a layer";
  return c;
}

namespace {

// The layers' costs, one after the other.
template <class F>
Cost dense_sum(const DenseShape& s, F cost_of_layer) {
  Cost sum{};
  const double pixels = static_cast<double>(s.n) * s.h * s.w, element = static_cast<double>(element_size(s.dtype));
  for (int i = 0; i < s.count; ++i) {
    const Cost c = cost_of_layer(dense_layer(s, i, nullptr));
    sum.seconds += c.seconds;
    sum.flops += c.flops;
    sum.workspace_bytes = std::max(sum.workspace_bytes, c.workspace_bytes);
    sum.note = c.note;
  }
  sum.bytes = pixels * element * (s.c + s.channels(s.count));  // x and the buffer
  return sum;
}

}  // namespace

Cost dense_cost(const Kernels& kernels, const DenseShape& s, int threads) {
  Cost c = dense_sum(s, [&](const Block& b) { return block_cost(kernels, b, threads); });
  c.seconds += c.bytes / memory_rates().memory / threads;
  return c;
}

Cost vendor_dense_cost(const DenseShape& s, int threads) {
  Cost c = dense_sum(s, [&](const Block& b) { return vendor_cost(b, threads); });
  const double written = static_cast<double>(s.n) * s.h * s.w * s.growth * s.count * element_size(s.dtype);
  c.seconds += (c.bytes + 2 * written) / memory_rates().memory / threads;  // each output is copied into the buffer
  return c;
}

Cost head_cost(const Kernels& kernels, const Head& head, int threads) {
  const double n = head.n, c = head.c, k = head.k, pixels = static_cast<double>(head.h) * head.w;
  Cost cost{};
  cost.flops = 2 * n * c * k;
  cost.bytes = (n * c * pixels + k * c + n * k) * static_cast<double>(element_size(head.dtype));
  const double seconds = (n * c * pixels + cost.flops) / (rate(kernels.isa, false) * kOwnEfficiency);
  cost.seconds = (seconds + cost.bytes / memory_rates().memory) / threads + 2 * kLaunch;
  cost.workspace_bytes = int64_t{head.n} * head.c * 4;
  cost.note = "threads share channels, then outputs";
  return cost;
}

Cost vendor_head_cost(const Head& head, int threads) {
  Block layer;  // the linear layer
  layer.n = head.n;
  layer.h = layer.w = layer.layer_count = 1;
  layer.dtype = head.dtype;
  layer.layers[0].shape = square_conv(head.c, head.k, 1, 1, 1);
  Cost cost = vendor_cost(layer, threads);
  const double x =
      static_cast<double>(head.n) * head.c * head.h * head.w * static_cast<double>(element_size(head.dtype));
  cost.bytes += x;
  // The mean in float32, and that as x's dtype; torch's mean over channels_last pixels takes four times its traffic.
  cost.seconds += 2 * kVendorCall + 4 * x / memory_rates().memory / threads;
  cost.note = "one kernel a layer";
  return cost;
}

}  // namespace resnet_fused::cpu
