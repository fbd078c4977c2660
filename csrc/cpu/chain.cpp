// A chain of convolutions, computed band by band.
//
// Level l is the input of layer l. Level 0 is x itself where its pixels can be read in place (1x1 convolutions), else a
// copy of the rows in use; a prologue is computed while pixels are copied, or gathered for the register tile; the other
// levels live only in the workspace, a few rows at a time, zero-padded on all sides, so that the window of a
// convolution is a list of byte offsets ("taps") from a pixel. A step computes `rows` output rows: it moves the rows of
// each level that the last step left and the windows still overlap, and computes the new ones. What is recomputed is
// therefore only the overlap between bands.
#include <algorithm>
#include <atomic>
#include <climits>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "block.h"
#include "isa.h"
#include "memory.h"

namespace resnet_fused::cpu {
namespace {

constexpr int64_t kLine = 64;                // bytes of a cache line
constexpr int64_t kPanelLimit = 200 * 1024;  // larger panels are taken one tap row at a time, partial sums in L2
// One chain over the 4608 products of a late 3x3 convolution would err 2 to 4 times as much as torch's. Chains of 256
// err less for 1% of the time, but a 1x1 over 256 channels alone still 2.8 times; of 128, 1.8 times. F(2x2, 3x3) at
// accuracy="strict" needs 64 (4%) to stay within 1.9 times on every block of ResNet-18, 34 and 50, images of 33 to 224
// pixels; 128 gave 2.9. So does a transition (3.5 times with 256, 3.0 with 128): unfused, its errors are averaged too.
// bfloat16 rounds its outputs 10^4 times as coarsely as float32 adds up: one chain.
constexpr int kSegment = 128, kFineSegment = 64;
constexpr int64_t kAheadBytes = 512 * 1024;    // of x, prefetched into L2 at most
constexpr int64_t kAheadWeights = 128 * 1024;  // of the next layer's
constexpr int64_t kGroupBytes = 512 * 1024;    // of A, gathered at once
constexpr int64_t kKeptPixels = 512 * 1024;    // bytes between two blocks that stay in L2 beside weights

template <class T>
T round_up(T v, T unit) {
  return (v + unit - 1) / unit * unit;
}
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Half of a register tile: rows at one distance from each other, and where each row's results go.
struct SubTile {
  ptrdiff_t a;
  int y;  // input row of the window's first row; INT_MIN: taps are not to be skipped
  int32_t dst[kMaxSubTile];
  int32_t src[kMaxSubTile];  // pixel of x that the row reads, where rows are gathered

  SubTile() {}  // leaves all as it is
};

struct Range {
  const char* begin = nullptr;
  int64_t bytes = 0;
};

// What is needed soon comes into L2 during the products, a few lines in every step: weights first, then x.
class Ahead {
 public:
  // `steps` of products in which to ask for x.
  Ahead(Range* x, int64_t steps) : x_(x), x_lines_(x ? lines(x->bytes, steps) : 0) {}

  // Weights in one or two places, and the steps in which to ask for them.
  void weights(Range first, Range second, int64_t steps) {
    weights_[0] = first;
    weights_[1] = second;
    lines_ = lines(first.bytes + second.bytes, steps);
  }

  template <class Args>
  void multiply(void (*leaf)(Args&), Args& args) {
    Range* const r = weights_[0].bytes > 0 ? &weights_[0] : weights_[1].bytes > 0 ? &weights_[1] : x_;
    if (!r || r->bytes <= 0) {  // threads that share a layer's channels have one x
      args.prefetch = args.prefetch_end = nullptr;
      leaf(args);
      return;
    }
    args.prefetch = r->begin;
    args.prefetch_end = r->begin + r->bytes;
    args.prefetch_lines = r == x_ ? x_lines_ : lines_;
    leaf(args);
    r->bytes = args.prefetch_end - args.prefetch;
    r->begin = args.prefetch;
  }

 private:
  static int lines(int64_t bytes, int64_t steps) {
    return static_cast<int>(std::clamp<int64_t>(ceil_div(bytes, kLine * std::max<int64_t>(1, steps)), 1, 8));
  }
  Range* x_;
  Range weights_[2];
  int x_lines_, lines_ = 0;
};

// What a stage of the chain knows of its input and its kernel choice.
struct Stage {
  const Layer* layer;
  PackShape pack;
  int m;  // Winograd tile, 0: direct
  int in_h, in_w, out_h, out_w;
  bool last;
  // storage of the input level
  bool in_place;  // 1x1 straight from x, or gathered from it, there through the prologue
  bool gather;    // rows of A are copied together first: from x, or from the taps of a level
  int64_t gather_pitch;
  bool merged;    // one tap per kernel row: a row of the window is contiguous, pixels have no gaps
  bool by_row;    // one tap per kernel row: the kernel reads each pixel once for the taps that meet it
  int64_t pitch;  // bytes between pixels
  int columns;    // pixels of a row, padding included
  bool cleared;   // behind the channels that are written, words of A are to be zero
  int capacity;   // rows
  int64_t level_bytes;
};

struct Chain {
  const Kernels& kernels;
  const Block& block;
  Schedule plan;
  Stage stages[3];
  Stage projection;
  int count;
  int final_h, final_w;  // of the last layer
  int out_h, out_w;      // of the block: behind the pooling, if any
  // bytes between pixels
  int64_t x_pixel, out_pixel, residual_pixel;
  int64_t pool_pitch = 0;
  int pool_capacity = 0;
  int ahead_layer = 0;          // the one whose products hide the prefetch of x: the longest
  const Chain* next = nullptr;  // run after this one
  bool kept = false;            // the same thread reads the output next, from L2

  Chain(const Kernels& k, const Block& b) : kernels(k), block(b), plan{}, count(b.layer_count) {
    const int64_t element = element_size(b.dtype), k_out = b.layers[count - 1].shape.k;
    auto pixel = [&](Pitch pitch, int64_t channels) { return (pitch ? pitch : channels) * element; };
    x_pixel = pixel(b.x_pitch, b.layers[0].shape.c);
    out_pixel = pixel(b.out_pitch, k_out);
    residual_pixel = pixel(b.residual_pitch, k_out);
    const int first_h = b.h / input_step(), first_w = b.w / input_step();
    int h = first_h, w = first_w;
    for (int l = 0; l < count; ++l) {
      stages[l] = make_stage(b.layers[l], h, w, l == count - 1, l == 0 ? nullptr : &stages[l - 1]);
      h = stages[l].out_h;
      w = stages[l].out_w;
    }
    final_h = h;
    final_w = w;
    out_h = b.pool.kernel ? b.pool.out(h) : h;
    out_w = b.pool.kernel ? b.pool.out(w) : w;
    if (b.has_projection) projection = make_stage(b.projection, first_h, first_w, true, nullptr);
    if (b.average && !stages[0].in_place)
      throw std::invalid_argument("average: the first convolution must be a 1x1 without padding and groups");
  }

  // Rows and columns of x that are one row or column of the first stage's input.
  int input_step() const { return block.average ? 2 : 1; }

  // `before`: what writes the stage's input; null: x.
  Stage make_stage(const Layer& layer, int h, int w, bool last, const Stage* before) const {
    const ConvShape& s = layer.shape;
    Stage st{};
    st.layer = &layer;
    st.pack = pack_shape(kernels, s, block.dtype, layer.algorithm);
    st.m = winograd_m(layer.algorithm);
    st.in_h = h;
    st.in_w = w;
    st.out_h = s.out_h(h);
    st.out_w = s.out_w(w);
    st.last = last;
    if (st.m && (s.stride_h != 1 || s.stride_w != 1 || s.dil_h != 1 || s.dil_w != 1))
      throw std::invalid_argument("algorithm: Winograd takes stride=1 and dilation=1");
    const int64_t element = st.pack.bf16 ? 2 : 4;
    st.gather_pitch = round_up(int64_t{st.pack.words} * 4, kLine) + kLine;
    st.in_place = !before && s.r == 1 && s.s == 1 && s.pad_h == 0 && s.pad_w == 0 && s.groups == 1;
    if (st.in_place) {
      const int64_t channels = int64_t{s.c} * element_size(block.dtype);
      // In place needs x's own values and type, whole words, a full sub-tile in x, and rows that do not all fall into
      // the same sets of L1 (4 KiB apart), but for the six of the wide tile: 2-4% of stages 3 and 4.
      const int sub = tiles_of(st.pack).tallest;
      const bool six_rows = !st.pack.bf16 && kernels.wide_sub && wide_tile_cost() < 1 && s.stride_w == 1;
      st.gather = block.in_scale || st.pack.bf16 != (block.dtype == DType::kBf16) ||
                  int64_t{st.pack.words} * 4 != channels || (int64_t{block.n} * h * w - 1) / s.stride_w + 1 < sub ||
                  (x_pixel * s.stride_w % 4096 == 0 && !six_rows);
      st.pitch = x_pixel * s.stride_w;
      return st;
    }
    st.columns = w + 2 * s.pad_w;
    if (st.m) st.columns = static_cast<int>(ceil_div(st.out_w, st.m)) * st.m + 2;
    st.gather = st.pack.flat;
    // A level has as many channels as whole panels of the layer before it, or as the copy of x.
    const int channels = before ? round_up(s.c, before->pack.panel) : s.c;
    st.merged = !st.m && s.groups == 1 && s.dil_w == 1 && s.c == channels && s.c <= kernels.narrow &&
                (!st.pack.bf16 || st.pack.flat || st.pack.words * 2 == s.c);
    st.pitch =
        st.merged
            ? s.c * element
            : round_up(std::max<int64_t>(int64_t{st.pack.flat ? 0 : st.pack.words} * 4, channels * element), kLine) +
                  kLine;
    st.by_row =
        !st.m && !st.pack.bf16 && s.s == kRowTaps && s.stride_w == 1 && s.dil_w == 1 && row_tiles_of(st.pack).tallest;
    st.cleared = before && !st.pack.flat && channels * element < int64_t{st.pack.words} * 4;
    return st;
  }

  // One tap at a time.
  const Tiles& tiles_of(const PackShape& pack) const {
    const bool narrow = pack.panel == kernels.narrow;
    if (pack.bf16) return narrow ? kernels.bf16_narrow : kernels.bf16;
    return narrow ? kernels.f32_narrow : kernels.f32;
  }
  // A kernel row at a time, in float32.
  const Tiles& row_tiles_of(const PackShape& pack) const {
    return pack.panel == kernels.narrow ? kernels.f32_narrow_row : kernels.f32_row;
  }

  // Words of a tap that are added up in one chain.
  int segment(const Stage& st) const {
    if (st.pack.bf16) return INT_MAX;
    return block.average || st.m == 2 ? kFineSegment : kSegment;
  }
  // Words of a tap that are one step of products.
  int step(const Stage& st) const { return st.pack.bf16 ? kernels.bf16_step : kernels.f32_step; }

  // Rows of a stage's input that `rows` rows of its output read.
  static int input_rows(const Stage& st, int rows) {
    const ConvShape& s = st.layer->shape;
    if (st.m) return static_cast<int>(round_up(rows, st.m)) + 2;
    return (rows - 1) * s.stride_h + s.dil_h * (s.r - 1) + 1;
  }

  // Where the rows of a stage's input end that the first `rows` rows of its output read.
  static int last_row(const Stage& st, int rows) {
    const ConvShape& s = st.layer->shape;
    return std::min(st.in_h, (rows - 1) * s.stride_h - s.pad_h + s.dil_h * (s.r - 1) + 1);
  }

  // Takes the schedule, and sizes the levels for it.
  void fit(const Schedule& wanted) {
    plan = wanted;
    int rows = plan.rows;
    plan.workspace_bytes = 0;
    if (block.pool.kernel) {
      rows = pool_capacity = std::min(final_h, (rows - 1) * block.pool.stride + block.pool.kernel);
      const Stage& last = stages[count - 1];
      pool_pitch = round_up(last.layer->shape.k, last.pack.panel) * int64_t{4};
      plan.workspace_bytes += pool_bytes();
    }
    for (int l = count - 1; l >= 0; --l) {
      Stage& st = stages[l];
      plan.workspace_bytes += winograd_bytes(st, rows) + gather_bytes(st);
      const int needed = input_rows(st, rows), m = l > 0 && stages[l - 1].m ? stages[l - 1].m : 1;
      st.capacity = needed + m - 1;  // whole tiles of the layer before
      // slack: tiles at the end of a level read, and drop, a few pixels more
      if (!st.in_place)
        st.level_bytes = (int64_t{plan.images} * st.capacity * st.columns +
                          2 * tiles_of(st.pack).tallest * st.layer->shape.stride_w) *
                             st.pitch +
                         4096;
      plan.workspace_bytes += st.level_bytes;
      rows = std::min(round_up(needed, m), st.in_h);
    }
    if (block.has_projection) plan.workspace_bytes += gather_bytes(projection) + projected_bytes();
    ahead_layer = count == 1 ? 0 : 1;
  }
  int64_t projected_bytes() const {
    return int64_t{plan.images} * plan.rows * final_w * projection.layer->shape.k * element_size(block.dtype);
  }
  int64_t pool_bytes() const { return int64_t{plan.images} * pool_capacity * final_w * pool_pitch; }

  // Bytes of x that a unit of whole images reads.
  int64_t group_bytes() const { return int64_t{plan.images} * block.h * block.w * x_pixel; }

  // Bytes of all weights.
  int64_t weights() const {
    int64_t sum = block.has_projection ? projection.pack.bytes : 0;
    for (int l = 0; l < count; ++l) sum += stages[l].pack.bytes;
    return sum;
  }

  int64_t winograd_tiles(const Stage& st, int rows) const {
    return int64_t{plan.images} * ceil_div(rows, st.m) * ceil_div(st.out_w, st.m);
  }
  int64_t winograd_pitch(const Stage& st) const {  // bytes between transformed tiles
    return round_up(st.layer->shape.c, kernels.narrow) * int64_t{st.pack.bf16 ? 2 : 4} + kLine;
  }
  // Small: all frequencies of one panel (or of a wide tile's two) at a time. Large: all panels of one frequency at a
  // time, whose transformed tiles stay in L2.
  bool winograd_by_panel(const Stage& st, int64_t padded_tiles) const {
    return st.pack.taps * padded_tiles * winograd_pitch(st) <= (int64_t{1} << 20);
  }
  int64_t winograd_bytes(const Stage& st, int rows) const {
    if (!st.m) return 0;
    const int64_t tiles = winograd_tiles(st, rows) + 2 * tiles_of(st.pack).tallest;
    const int kept = winograd_by_panel(st, tiles) ? 2 : st.pack.panels;
    return st.pack.taps * tiles * (winograd_pitch(st) + kept * st.pack.panel * 4);
  }
  // Tiles gathered at once: the weights pass by once for each such group.
  static int64_t group_tiles(const Stage& st, int sub) {
    return std::max<int64_t>(1, kGroupBytes / (st.gather_pitch * 2 * sub));
  }
  int64_t gather_bytes(const Stage& st) const {
    return st.gather ? kGroupBytes + kMaxTileRows * st.gather_pitch + 4096 : 0;
  }
};

// One unit of work: `images` images from `image`, output rows [begin, end).
class Unit {
  static constexpr int kProjection = 3;  // its place among the vectors, behind the layers

 public:
  Unit(const Chain& chain, int image, int images, int begin, int end)
      : chain_(chain),
        block_(chain.block),
        kernels_(chain.kernels),
        image_(image),
        images_(images),
        begin_(begin),
        end_(end) {
    const Block& b = block_;
    x_ = static_cast<const char*>(b.x) + int64_t{image} * b.h * b.w * chain.x_pixel;
    const int64_t out_pixels = int64_t{image} * chain.out_h * chain.out_w;
    out_ = static_cast<char*>(b.out) + out_pixels * chain.out_pixel;
    residual_ = b.residual ? static_cast<const char*>(b.residual) + out_pixels * chain.residual_pixel : nullptr;
    for (int l = 0; l < chain.count; ++l)
      if (!chain.stages[l].in_place)
        level_[l] =
            static_cast<char*>(workspace(static_cast<Slot>(l), static_cast<size_t>(chain.stages[l].level_bytes)));
    if (b.pool.kernel) pool_ = static_cast<float*>(workspace(Slot::kLevel2, static_cast<size_t>(chain.pool_bytes())));
    if (b.has_projection)
      projected_ = static_cast<char*>(workspace(Slot::kProjection, static_cast<size_t>(chain.projected_bytes())));
    pad_vectors();
    const int n = chain.count;
    last_[n] = b.pool.kernel ? std::min(chain.final_h, pooled_rows_end(end)) : end;
    for (int l = n - 1; l >= 0; --l) last_[l] = Chain::last_row(chain.stages[l], last_[l + 1]);
  }

  // Everything, in the calling thread.
  void run() {
    clear_columns();
    for (int y = begin_; y < end_; y += chain_.plan.rows) {
      first_step_ = y == begin_;
      begin_step(y, std::min(end_, y + chain_.plan.rows), first_step_);
      set_ahead();
      if (!chain_.stages[0].in_place) fill_input(0, images_);
      for (int l = 0; l < chain_.count; ++l) {
        if (chain_.stages[l].m) {
          allocate_transformed(l);
          winograd_transform(l, 0, channel_blocks(l));
        }
        layer(l, 0, panels(chain_.stages[l]), have_[l + 1], hi_[l + 1]);
      }
      if (block_.pool.kernel) pool_rows(y, std::min(end_, y + chain_.plan.rows));
      end_step();
    }
  }

  // Everything in one step, the threads sharing out the channels of each layer, or its rows where that is less work.
  void run_split(const Parallel& parallel) {
    clear_columns();
    begin_step(begin_, end_, true);
    if (!chain_.stages[0].in_place) fork(parallel, images_, [this](int a, int b) { fill_input(a, b); });
    for (int l = 0; l < chain_.count; ++l) {
      if (chain_.stages[l].m) {
        allocate_transformed(l);
        fork(parallel, channel_blocks(l), [this, l](int a, int b) { winograd_transform(l, a, b); });
      }
      const int from = have_[l + 1], to = hi_[l + 1], all = panels(chain_.stages[l]);
      const bool by_rows = splits_rows(chain_.stages[l], to - from, parallel.threads);
      fork(parallel, by_rows ? to - from : all,
           [=](int a, int b) { by_rows ? layer(l, 0, all, from + a, from + b) : layer(l, a, b, from, to); });
    }
    if (block_.pool.kernel) pool_rows(begin_, end_);
  }

 private:
  const Chain& chain_;
  const Block& block_;
  const Kernels& kernels_;
  const int image_, images_, begin_, end_;
  const char* x_;
  char* out_;
  const char* residual_;
  char* level_[3] = {};
  float* pool_ = nullptr;
  char* transformed_ = nullptr;
  char* projected_ = nullptr;    // the projected rows of a step
  Range ahead_;                  // what the next step reads of x and is not yet prefetched
  bool first_step_ = true;       // of the unit: the weights come from far away
  int lo_[4] = {}, hi_[4] = {};  // rows of each level in use, before clipping; [count]: of the last layer's output
  int have_[4] = {};             // rows of the level below this were computed by earlier steps
  int last_[4] = {};             // rows of the level that the unit reads end here
  struct Vectors {
    const float* scale = nullptr;
    const float* shift = nullptr;
  } vectors_[4], input_;  // input_: of the prologue

  template <class F>
  static void fork(const Parallel& parallel, int count, F f) {
    parallel.run(
        count, [](int64_t a, int64_t b, void* c) { (*static_cast<F*>(c))(static_cast<int>(a), static_cast<int>(b)); },
        &f);
  }

  int panels(const Stage& st) const { return st.pack.panels * st.layer->shape.groups; }
  int channel_blocks(int l) const {
    return static_cast<int>(ceil_div(chain_.stages[l].layer->shape.c, kernels_.narrow));
  }

  // Threads share a layer's rows where it has fewer panels than threads, or where each would otherwise gather all of A
  // and that is more than all of the weights.
  bool splits_rows(const Stage& st, int rows, int threads) const {
    if (st.m || rows < threads) return false;
    const int64_t gathered = int64_t{images_} * rows * st.out_w * st.gather_pitch;
    return panels(st) < threads || (st.gather && st.in_place && gathered > panels(st) * st.pack.panel_bytes);
  }

  // scale and shift, padded with zeros to whole panels of each group
  void pad_vectors() {
    const int in_channels = block_.layers[0].shape.c, in_padded = round_up(in_channels, kernels_.panel);
    int64_t total = block_.in_scale ? 2 * in_padded : 0;
    auto size = [&](const Stage& st) { return int64_t{panels(st)} * st.pack.panel; };
    for (int l = 0; l < chain_.count; ++l) total += 2 * size(chain_.stages[l]);
    if (block_.has_projection) total += 2 * size(chain_.projection);
    auto* p = static_cast<float*>(workspace(Slot::kVectors, static_cast<size_t>(total) * 4));
    auto pad = [&](const float* v, float otherwise, int groups, int k, int padded) {
      float* const first = p;
      for (int g = 0; g < groups; ++g, p += padded) {
        v ? std::copy_n(v + g * k, k, p) : std::fill_n(p, k, otherwise);
        std::fill_n(p + k, padded - k, 0.0f);
      }
      return first;
    };
    auto add = [&](int l, const Stage& st) {
      const ConvShape& s = st.layer->shape;
      const int k = s.k / s.groups, padded = st.pack.panels * st.pack.panel;
      vectors_[l].scale = pad(st.layer->scale, 1, s.groups, k, padded);
      vectors_[l].shift = pad(st.layer->shift, 0, s.groups, k, padded);
    };
    for (int l = 0; l < chain_.count; ++l) add(l, chain_.stages[l]);
    if (block_.has_projection) add(kProjection, chain_.projection);
    if (block_.in_scale) {
      input_.scale = pad(block_.in_scale, 1, 1, in_channels, in_padded);
      input_.shift = pad(block_.in_shift, 0, 1, in_channels, in_padded);
    }
  }

  // The padding columns of every row of every level; the layers write only what lies between.
  void clear_columns() {
    for (int l = 0; l < chain_.count; ++l) {
      const Stage& st = chain_.stages[l];
      if (st.in_place) continue;
      if (st.cleared) std::memset(level_[l], 0, static_cast<size_t>(st.level_bytes));
      const int left = st.layer->shape.pad_w, right = st.columns - left - st.in_w;
      for (int64_t row = 0; row < int64_t{images_} * st.capacity; ++row) {
        char* p = level_[l] + row * st.columns * st.pitch;
        std::memset(p, 0, static_cast<size_t>(left * st.pitch));
        std::memset(p + (left + st.in_w) * st.pitch, 0, static_cast<size_t>(right * st.pitch));
      }
    }
  }

  char* level_row(int l, int image, int row) const {
    const Stage& st = chain_.stages[l];
    return level_[l] + (int64_t{image} * st.capacity + row - lo_[l]) * st.columns * st.pitch;
  }

  // Where the rows end that the first `rows` rows of the pooling read.
  int pooled_rows_end(int rows) const { return (rows - 1) * block_.pool.stride - block_.pool.pad + block_.pool.kernel; }

  // Which rows of each level this step reads; moves the kept ones to the front and zeroes those outside the image.
  void begin_step(int y0, int y1, bool first) {
    int old_lo[4];
    std::copy(lo_, lo_ + 4, old_lo);
    const int n = chain_.count;
    lo_[n] = y0;
    hi_[n] = y1;
    if (block_.pool.kernel) {
      lo_[n] = std::max(0, y0 * block_.pool.stride - block_.pool.pad);
      hi_[n] = std::min(chain_.final_h, pooled_rows_end(y1));
      if (first) {
        have_[n] = lo_[n];
      } else if (const int kept = have_[n] - lo_[n]; kept > 0) {
        const int64_t row = chain_.final_w * chain_.pool_pitch / 4;
        for (int i = 0; i < images_; ++i) {
          float* p = pool_ + int64_t{i} * chain_.pool_capacity * row;
          std::memmove(p, p + (lo_[n] - old_lo[n]) * row, static_cast<size_t>(kept * row) * 4);
        }
      }
      have_[n] = std::max(have_[n], lo_[n]);
    } else {
      have_[n] = y0;
    }
    for (int l = n - 1; l >= 0; --l) {
      const Stage& st = chain_.stages[l];
      const ConvShape& s = st.layer->shape;
      const int from = have_[l + 1];
      int to = hi_[l + 1];  // rows of the next level that this step computes
      if (from >= to) {
        hi_[l] = have_[l];
        continue;
      }
      // Winograd computes whole tiles: what is too much for this step, fewer rows than a step has, is the next one's.
      if (st.m && l + 1 < n) to = std::min(last_[l + 1], from + round_up(to - from, st.m));
      hi_[l + 1] = to;
      lo_[l] = from * s.stride_h - s.pad_h;
      hi_[l] = lo_[l] + Chain::input_rows(st, to - from);
      const int real = Chain::last_row(st, to);
      if (first) have_[l] = std::max(0, lo_[l]);
      if (!st.in_place) {
        const int64_t row = st.columns * st.pitch;
        const int kept = first ? 0 : have_[l] - lo_[l];
        for (int i = 0; i < images_; ++i) {
          char* p = level_[l] + int64_t{i} * st.capacity * row;
          if (kept > 0) std::memmove(p, p + (lo_[l] - old_lo[l]) * row, static_cast<size_t>(kept * row));
          for (int r = lo_[l]; r < hi_[l]; ++r)
            if (r < 0 || r >= real) std::memset(p + (r - lo_[l]) * row, 0, static_cast<size_t>(row));
        }
      }
      have_[l] = std::max(have_[l], std::max(0, lo_[l]));
      hi_[l] = real;
    }
  }
  // What comes behind the rows in use: the next step's, or the next unit's.
  void set_ahead() {
    const int h = chain_.stages[0].in_h;
    const int64_t row = int64_t{block_.w} * chain_.input_step() * chain_.x_pixel;
    const int64_t used = images_ > 1 ? int64_t{images_} * h : hi_[0];
    const int64_t all = (int64_t{block_.n} - image_) * h;  // rows of x from this unit on
    const int64_t next =
        std::clamp<int64_t>(images_ > 1 ? used : hi_[0] - std::max(0, lo_[0]), 0, std::max<int64_t>(0, all - used));
    ahead_ = {x_ + used * row, std::min<int64_t>(next * row, kAheadBytes)};
  }
  void end_step() {
    for (int l = 0; l <= chain_.count; ++l) have_[l] = std::max(have_[l], hi_[l]);
  }

  // New rows of level 0, copied from x: padded, and in the type that the kernel takes.
  void fill_input(int image_begin, int image_end) {
    const Stage& st = chain_.stages[0];
    const ConvShape& s = st.layer->shape;
    const bool dense = chain_.x_pixel == int64_t{s.c} * element_size(block_.dtype);
    for (int i = image_begin; i < image_end; ++i)
      for (int r = have_[0]; r < hi_[0]; ++r) {
        char* d = level_row(0, i, r) + s.pad_w * st.pitch;
        const char* src = x_ + (int64_t{i} * st.in_h + r) * st.in_w * chain_.x_pixel;
        if (st.merged && dense && !block_.in_scale)  // one long pixel
          kernels_.prologue({src, 0, nullptr, 1, 0, s.c * st.in_w, nullptr, nullptr, d, 0, 0,
                             block_.dtype == DType::kBf16, st.pack.bf16});
        else
          copy_pixels(src, nullptr, st.in_w, d, st.pitch, st.pack.bf16,
                      st.merged ? 0 : std::max<int64_t>(0, st.pitch - kLine));
      }
  }

  // Pixels of x as the convolutions read them: through the prologue, in the type that the products take, zeros behind
  // the channels up to `bytes`. `pixels`: indices from `src`; null: 0, 1, 2, ...
  void copy_pixels(const char* src, const int32_t* pixels, int count, char* d, int64_t pitch, bool to_bf16,
                   int64_t bytes) const {
    kernels_.prologue({src, chain_.x_pixel, pixels, count, block_.average ? block_.w * chain_.x_pixel : 0,
                       block_.layers[0].shape.c, input_.scale, input_.shift, d, pitch, bytes,
                       block_.dtype == DType::kBf16, to_bf16});
  }

  // ---- one layer -------------------------------------------------------------------------------------------------
  struct Output {
    char* base;
    int64_t pitch;
    bool bf16, stream;
    int columns;     // pixels of a row
    int64_t image;   // pixels between images
    int origin_row;  // image row at base
    int64_t origin;  // pixels from base to the first one
    bool scratch;
  };

  Output output_of(int l) const {
    const Stage& st = chain_.stages[l];
    if (l + 1 < chain_.count) {
      const Stage& next = chain_.stages[l + 1];
      return {level_[l + 1],
              next.pitch,
              next.pack.bf16,
              false,
              next.columns,
              int64_t{next.capacity} * next.columns,
              lo_[l + 1],
              next.layer->shape.pad_w,
              true};
    }
    if (block_.pool.kernel)
      return {reinterpret_cast<char*>(pool_),           chain_.pool_pitch, false, false, st.out_w,
              int64_t{chain_.pool_capacity} * st.out_w, lo_[l + 1],        0,     true};
    const int64_t element = element_size(block_.dtype), pitch = chain_.out_pixel;
    // Past the caches: a plain store would first read the line, and push out what the next step needs. 2-17% faster on
    // every block of ResNet-50, at batch 1 and 16.
    const int64_t group = st.layer->shape.k / st.layer->shape.groups * element;  // where the next one starts
    const bool stream = !block_.reread && !chain_.kept && pitch % kLine == 0 && group % kLine == 0 &&
                        st.pack.panel * element % kLine == 0 && reinterpret_cast<uintptr_t>(block_.out) % kLine == 0;
    return {out_, pitch, block_.dtype == DType::kBf16, stream, st.out_w, int64_t{st.out_h} * st.out_w, 0, 0, false};
  }

  // Cuts the rows [from, to) of a layer's output into sub-tiles of `sub` pixels; returns the bytes between their rows.
  int64_t cut(int l, const Stage& st, const Output& out, int from, int to, int sub, std::vector<SubTile>& tiles) const {
    const ConvShape& s = st.layer->shape;
    const int w = st.out_w, rows = to - from;
    tiles.clear();
    // Pixels x + i, i in [first, sub), of output row y, running over into the next rows every `wrap` pixels.
    const int step_x = s.stride_w * chain_.input_step(), step_y = s.stride_h * chain_.input_step();
    auto emit = [&](ptrdiff_t a, int y_in, int image, int y, int x, int first, int wrap) {
      SubTile& t = tiles.emplace_back();
      t.a = a;
      t.y = y_in;
      std::fill_n(t.dst, first, -1);
      std::fill_n(t.src, first, 0);
      int yy = y + (x + first) / wrap, xx = (x + first) % wrap;
      for (int i = first; i < sub; ++yy, xx = 0) {  // the part of the sub-tile that is in one row
        const int end = std::min<int64_t>(sub, int64_t{i} + wrap - xx);
        const int used = yy < to ? std::clamp(i + w - xx, i, end) : i;
        const auto dst =
            static_cast<int32_t>(out.image * image + int64_t{yy - out.origin_row} * out.columns + out.origin + xx - i);
        const auto src = static_cast<int32_t>((int64_t{image} * block_.h + int64_t{yy} * step_y) * block_.w +
                                              int64_t{xx - i} * step_x);
        for (int j = i; j < used; ++j) t.dst[j] = dst + j;
        for (int j = i; j < used && st.gather; ++j) t.src[j] = src + j * step_x;
        for (int j = used; j < end; ++j) t.dst[j] = -1;
        for (int j = used; j < end; ++j) t.src[j] = 0;
        i = end;
      }
    };
    if (st.in_place) {
      // Rows follow each other without a gap, or are gathered pixel by pixel.
      const bool runs = st.gather || (s.stride_h == 1 && s.stride_w == 1);
      const int length = runs ? rows * w : w, wrap = runs ? w : INT_MAX;
      const int64_t pixels = int64_t{block_.n} * st.in_h * st.in_w;
      for (int image = 0; image < images_; ++image)
        for (int y = from; y < to; y += runs ? rows : 1)
          for (int p = 0; p < length; p += sub) {
            const int64_t start =
                (int64_t{image} * st.in_h + int64_t{y} * s.stride_h) * st.in_w + int64_t{p} * s.stride_w;
            // No tile may read past x: the last one starts a few pixels early, and drops them.
            int back = 0;
            if (const int64_t over =
                    image_ * int64_t{st.in_h} * st.in_w + start + int64_t{sub - 1} * s.stride_w + 1 - pixels;
                !st.gather && over > 0)
              back = static_cast<int>(ceil_div(over, s.stride_w));
            emit((start - int64_t{back} * s.stride_w) * (st.pitch / s.stride_w), INT_MIN, image, y, p - back, back,
                 wrap);
          }
      return st.pitch;
    }
    // Row by row, or as one run over the padding between rows: whichever wastes less.
    const int64_t by_row = ceil_div(w, sub) * sub * rows, run = int64_t{rows - 1} * st.columns + w;
    if (s.stride_h == 1 && s.stride_w == 1 && round_up<int64_t>(run, sub) < by_row) {
      const int y_in = from - s.pad_h;
      for (int image = 0; image < images_; ++image)
        for (int p = 0; p < run; p += sub)
          emit(level_row(l, image, y_in) - level_[l] + p * st.pitch, rows == 1 ? y_in : INT_MIN, image, from, p, 0,
               st.columns);
    } else {
      for (int y = from; y < to; ++y)
        for (int image = 0; image < images_; ++image)
          for (int p = 0; p < w; p += sub) {
            const int x = std::max(0, std::min(p, w - sub)), y_in = y * s.stride_h - s.pad_h;
            emit(level_row(l, image, y_in) - level_[l] + int64_t{x} * s.stride_w * st.pitch, y_in, image, y, x, p - x,
                 INT_MAX);
          }
    }
    return st.pitch * s.stride_w;
  }

  // The register tile of a run of products: two sub-tiles of `sub` rows by `panels` panels.
  struct Tile {
    int sub, panels;
    GemmFn gemm;
    ProductFn product;
    PointwiseFn pointwise;
    bool to_memory;  // no epilogue of its own
  };
  // The one with the least time for what it computes, waste at the edges included; the tallest where equal.
  // `rows_computed`: rows that sub-tiles of a given height compute, in pairs.
  template <class F>
  Tile choose_tile(const Stage& st, int panel_count, F rows_computed) const {
    const bool narrow = st.pack.panel == kernels_.narrow;
    const Tiles& tiles = st.by_row ? chain_.row_tiles_of(st.pack) : chain_.tiles_of(st.pack);
    Tile best{};
    double least = 0;
    for (int sub = tiles.tallest; sub > 0; --sub) {
      if (!tiles.of_height[sub]) continue;
      const auto rows = static_cast<double>(rows_computed(sub));
      if (best.sub && rows >= least) continue;
      least = rows;
      best = {
          sub, 1, tiles.of_height[sub], tiles.product_of_height[sub], tiles.pointwise_of_height[sub], tiles.to_memory};
    }
    if (kernels_.wide_sub && !st.pack.bf16 && !narrow && !st.by_row && panel_count % 2 == 0 &&
        st.layer->shape.groups == 1 && static_cast<double>(rows_computed(kernels_.wide_sub)) * wide_tile_cost() < least)
      best = {kernels_.wide_sub,           2,    kernels_.gemm_f32_wide, kernels_.product_f32_wide,
              kernels_.pointwise_f32_wide, false};
    return best;
  }

  // A tile's call and its ends take as long as kTileEnds steps of one row: of 16 words, a quarter of a small tile.
  static constexpr double kTileEnds = 30;
  Tile choose_direct_tile(const Stage& st, int rows, int panel_count) const {
    const double steps = static_cast<double>(st.pack.words) * st.pack.taps;
    return choose_tile(st, panel_count, [&](int sub) {
      const bool flat = st.layer->shape.stride_w == 1 && st.layer->shape.stride_h == 1;
      int64_t count = ceil_div(st.out_w, sub) * rows;
      if (st.in_place && (flat || st.gather)) count = ceil_div(int64_t{rows} * st.out_w, sub);
      if (flat && !st.in_place) count = std::min(count, ceil_div(int64_t{rows - 1} * st.columns + st.out_w, sub));
      const auto tiles = static_cast<double>(ceil_div(count * images_, 2));
      return tiles * (2 * sub + kTileEnds / steps);
    });
  }

  // Of a 1x1 layer's runs of `pixels`, of which `together` follow each other in the output. The end of a tile overlaps
  // with the products of the next one, but for one whose pixels do not follow each other.
  static constexpr double kRunTileEnds = 8, kApartEnds = 60;
  Tile choose_pointwise_tile(const Stage& st, int64_t pixels, int64_t together, int panel_count) const {
    const double words = st.pack.words;
    return choose_tile(st, panel_count, [&](int sub) {
      const int64_t high = int64_t{2} * sub, tiles = ceil_div(pixels, high);
      const int64_t breaks = (pixels - 1) / together;  // within the run; those at the end of a tile do not count
      const int64_t apart = (pixels % high != 0) + breaks - breaks / (high / std::gcd(high, together));
      return static_cast<double>(tiles) * (static_cast<double>(high) + kRunTileEnds / words) +
             static_cast<double>(apart) * kApartEnds / words;
    });
  }

  // The rows of A of a sub-tile, one after the other, zeros behind the channels.
  void gather(int l, const Stage& st, const SubTile& tile, int64_t lda, int sub, char* d) const {
    const ConvShape& s = st.layer->shape;
    const int64_t bytes = int64_t{st.pack.words} * 4;
    if (st.in_place) {
      copy_pixels(x_, tile.src, sub, d, st.gather_pitch, st.pack.bf16, bytes);
      return;
    }
    const int runs = st.merged ? 1 : s.s;  // contiguous parts of a kernel row
    const int64_t run = (st.merged ? s.s : 1) * s.c * int64_t{2};
    for (int i = 0; i < sub; ++i, d += st.gather_pitch) {
      const char* const pixel = level_[l] + tile.a + i * lda;
      char* p = d;
      for (int r = 0; r < s.r; ++r)
        for (int x = 0; x < runs; ++x, p += run) {
          const char* const src = pixel + (int64_t{r} * s.dil_h * st.columns + int64_t{x} * s.dil_w) * st.pitch;
          // in whole pieces: the next run, or the zeros, overwrite what is too much
          for (int64_t b = 0; b < run; b += 32) std::memcpy(p + b, src + b, 32);
        }
      std::memset(p, 0, static_cast<size_t>(d + bytes - p));
    }
  }

  static const char* weights(const Stage& st) { return reinterpret_cast<const char*>(st.layer->packed + 1); }

  // What is added to a layer's output, pixel for pixel; null: nothing.
  struct Shortcut {
    const char* base = nullptr;
    int64_t pitch = 0;
  };

  // Panels [panel_begin, panel_end) of the rows [from, to) of a layer's output.
  void layer(int l, int panel_begin, int panel_end, int from, int to) {
    const Stage& st = chain_.stages[l];
    if (from >= to) return;
    const Output out = output_of(l);
    Shortcut shortcut;
    if (st.last && residual_) {
      shortcut = {residual_, chain_.residual_pixel};
    } else if (st.last && block_.has_projection) {
      // Addressed as the output is, but dense and in L2: only the rows of this step.
      Output rows = out;
      rows.pitch = int64_t{st.layer->shape.k} * element_size(block_.dtype);
      rows.base = projected_ - int64_t{have_[l + 1]} * out.columns * rows.pitch;
      rows.stream = false;
      convolve(kProjection, chain_.projection, rows, {}, from, to, panel_begin, panel_end);
      shortcut = {rows.base, rows.pitch};
    }
    if (st.m)
      winograd_multiply(l, out, shortcut, from, to, panel_begin, panel_end);
    else
      convolve(l, st, out, shortcut, from, to, panel_begin, panel_end);
  }
  void convolve(int l, const Stage& st, const Output& out, const Shortcut& shortcut, int from, int to, int panel_begin,
                int panel_end) {
    if (is_run(st))
      pointwise(l, st, out, shortcut, from, to, panel_begin, panel_end);
    else
      direct(l, st, out, shortcut, from, to, panel_begin, panel_end);
  }

  Epilogue epilogue(int l, const Stage& st, const Output& out, const Shortcut& shortcut, int panel) const {
    const ConvShape& s = st.layer->shape;
    const int k = s.k / s.groups, group = panel / st.pack.panels, column = panel % st.pack.panels * st.pack.panel;
    const int64_t offset = (int64_t{group} * k + column) * (out.bf16 ? 2 : 4);
    Epilogue e{};
    e.columns = out.scratch ? st.pack.panel : std::min(st.pack.panel, k - column);
    e.scale = vectors_[l].scale + panel * st.pack.panel;
    e.shift = vectors_[l].shift + panel * st.pack.panel;
    e.relu = st.layer->relu;
    e.out = out.base + offset;
    e.out_pitch = out.pitch;
    e.bf16 = out.bf16;
    e.stream = out.stream && e.columns == st.pack.panel;
    e.residual = shortcut.base ? shortcut.base + offset : nullptr;
    e.residual_pitch = shortcut.pitch;
    return e;
  }

  // A layer as an implicit GEMM: tiles of pixels by panels of output channels. `l`: its level and vectors.
  void direct(int l, const Stage& st, const Output& out, const Shortcut& shortcut, int from, int to, int panel_begin,
              int panel_end) {
    static thread_local std::vector<SubTile> tiles;
    static thread_local std::vector<Tap> taps, some;
    const ConvShape& s = st.layer->shape;
    const Tile tile = choose_direct_tile(st, to - from, panel_end - panel_begin);
    const int sub = tile.sub, panel = st.pack.panel;
    if (st.pack.bf16) kernels_.begin(panel == kernels_.narrow);
    const int64_t lda = cut(l, st, out, from, to, sub, tiles);
    if (tiles.size() % 2) {
      tiles.push_back(tiles.back());
      std::fill_n(tiles.back().dst, sub, -1);
    }
    const int count = static_cast<int>(tiles.size() / 2);
    // Taps: pixels of the window; where those of a kernel row are contiguous, rows; where they are gathered, one.
    const int rows = st.pack.flat ? 1 : s.r, per_row = st.merged || st.by_row || st.pack.flat ? 1 : s.s;
    const int tap_words = st.pack.words * (st.pack.flat ? 1 : s.s / per_row);
    const int words = st.by_row ? st.pack.words : tap_words;  // that the kernel is told
    const int segment = chain_.segment(st), per_chain = static_cast<int>(ceil_div(segment, tap_words));
    taps.clear();
    for (int r = 0; r < rows; ++r)
      for (int x = 0; x < per_row; ++x) {
        const int i = r * per_row + x;
        taps.push_back({(int64_t{r} * s.dil_h * st.columns + int64_t{x} * s.dil_w) * st.pitch,
                        int64_t{i} * tap_words * panel * 4, i / per_chain});
      }
    const int splits = st.pack.panel_bytes > kPanelLimit ? rows : 1;  // of the taps, by kernel row
    const int split_taps = static_cast<int>(taps.size()) / splits;

    // A panel goes through all tiles: its weights stay in L1, or L2, and the tiles' rows follow each other.
    int group = count;
    char* gathered = nullptr;
    if (st.gather) {
      group = static_cast<int>(std::min<int64_t>(group, Chain::group_tiles(st, sub)));
      gathered = static_cast<char*>(workspace(Slot::kPacked, static_cast<size_t>(chain_.gather_bytes(st))));
    }
    const char* base = gathered ? gathered : st.in_place ? x_ : level_[l];
    const int panel_floats = 2 * sub * panel, tile_floats = tile.panels * panel_floats;
    auto* c =
        static_cast<float*>(workspace(Slot::kTiles, static_cast<size_t>(splits > 1 ? group : 2) * tile_floats * 4));

    const int64_t tap_steps = words / (st.by_row ? 1 : chain_.step(st));
    Ahead ahead(l == chain_.ahead_layer ? &ahead_ : nullptr, (panel_end - panel_begin) / tile.panels * int64_t{count} *
                                                                 static_cast<int64_t>(taps.size()) * tap_steps);
    const int64_t split_bytes = int64_t{split_taps} * tap_words * panel * 4;

    // Sums go to their pixels from the registers, but for those of AMX and of a panel that is not full. Their epilogue
    // follows the products of the next tile, whose latency it hides (AMX).
    struct {
      EpilogueArgs args[2];  // of each panel
      int32_t dst[kMaxTileRows];
    } epilogues[2];
    int pending = 0;
    bool waiting = false;
    auto finish = [&] {
      if (!waiting) return;
      for (int p = 0; p < tile.panels; ++p) kernels_.epilogue(epilogues[pending].args[p]);
      waiting = false;
    };
    for (int g = 0; g < count; g += group) {
      const int group_end = std::min(count, g + group);
      if (gathered)
        for (int i = 2 * g; i < 2 * group_end; ++i) {
          const int64_t row = int64_t{i - 2 * g} * sub * st.gather_pitch;
          gather(l, st, tiles[i], lda, sub, gathered + row);
          tiles[i].a = row;
          tiles[i].y = INT_MIN;
        }
      for (int n = panel_begin; n < panel_end; n += tile.panels) {
        Epilogue e[2];
        bool from_memory = tile.to_memory;
        for (int p = 0; p < tile.panels; ++p) {
          e[p] = epilogue(l, st, out, shortcut, n + p);
          from_memory = from_memory || e[p].columns < panel;
        }
        const int64_t group_offset = int64_t{n / st.pack.panels} * (s.c / s.groups) * 4;  // groups are float32
        GemmArgs args{};
        args.lda = st.gather ? st.gather_pitch : lda;
        args.segment = st.by_row ? segment / s.s : segment;
        args.words = words;
        args.b = weights(st) + n * st.pack.panel_bytes;
        args.b2 = args.b + st.pack.panel_bytes;
        for (int split = 0; split < splits; ++split) {
          if (first_step_ && g == 0) {
            const bool same = split + 1 < splits;  // panels
            const int next = same ? n : n + tile.panels;
            const char* const first = weights(st) + next * st.pack.panel_bytes + (same ? split + 1 : 0) * split_bytes;
            const int64_t steps = int64_t{group_end} * split_taps * tap_steps;
            if (next >= panel_end)
              ahead.weights(after(l, panel_begin, panels(st)), {}, steps);
            else
              ahead.weights({first, split_bytes}, {first + st.pack.panel_bytes, tile.panels > 1 ? split_bytes : 0},
                            steps);
          }
          for (int t = g; t < group_end; ++t) {
            const SubTile &t0 = tiles[2 * t], &t1 = tiles[2 * t + 1];
            args.a[0] = base + t0.a + group_offset;
            args.a[1] = base + t1.a + group_offset;
            args.taps = taps.data() + split * split_taps;
            args.tap_count = split_taps;
            args.c = c + (splits > 1 ? t - g : pending ^ 1) * tile_floats;
            args.c2 = args.c + panel_floats;
            args.accumulate = split > 0;
            const bool sums = split == splits - 1;  // whole ones
            args.epilogue = sums && !from_memory ? e : nullptr;
            args.dst[0] = t0.dst;
            args.dst[1] = t1.dst;
            if (!(inside(st, t0) && inside(st, t1))) {  // rows of taps that are all padding are skipped
              some.clear();
              for (int i = 0; i < split_taps; ++i) {
                const int r = (split * split_taps + i) / per_row;
                if (row_inside(st, t0, r) || row_inside(st, t1, r)) some.push_back(args.taps[i]);
              }
              args.taps = some.data();
              args.tap_count = static_cast<int>(some.size());
            }
            ahead.multiply(tile.gemm, args);
            if (!sums || !from_memory) continue;
            finish();
            waiting = true;
            pending ^= 1;
            auto& next = epilogues[pending];
            std::copy_n(t0.dst, sub, next.dst);
            std::copy_n(t1.dst, sub, next.dst + sub);
            for (int p = 0; p < tile.panels; ++p)
              next.args[p] = {e[p], args.c + p * panel_floats, panel, 2 * sub, next.dst};
          }
        }
        if (splits > 1) finish();  // the next panel's partial sums take its place
      }
    }
    finish();
    if (st.pack.bf16) kernels_.end();
  }

  // Whether a layer is a 1x1 whose pixels lie one after the other where the register tile reads them.
  bool is_run(const Stage& st) const {
    const ConvShape& s = st.layer->shape;
    const Tiles& tiles = chain_.tiles_of(st.pack);
    if (s.r != 1 || s.s != 1 || s.groups != 1 || !tiles.pointwise_of_height[tiles.tallest]) return false;
    if (st.in_place && st.gather) return true;
    return !st.gather && s.stride_h == 1 && s.stride_w == 1 && (st.in_place || st.columns == st.in_w);
  }

  // A 1x1 layer. `l`: its level and vectors.
  void pointwise(int l, const Stage& st, const Output& out, const Shortcut& shortcut, int from, int to, int panel_begin,
                 int panel_end) {
    const int w = st.out_w, rows = to - from;
    // Pixels of the step, image after image. A run of them is what lies without a gap: all, or an image's.
    const int64_t of_image = int64_t{rows} * w, count = images_ * of_image;
    const bool one_run = images_ == 1 || st.gather || rows == (st.in_place ? st.in_h : st.capacity);
    // Pixels that follow each other in the output: all, an image's, or a row's.
    const bool whole_rows = out.columns == w, whole_images = whole_rows && (images_ == 1 || out.image == of_image);
    const int64_t together = whole_images ? count : whole_rows ? of_image : w;
    const Tile tile = choose_pointwise_tile(st, one_run ? count : of_image, together, panel_end - panel_begin);
    const int sub = tile.sub, panel = st.pack.panel;
    int64_t group = count;
    char* gathered = nullptr;
    if (st.gather) {
      group = std::min(group, Chain::group_tiles(st, sub) * 2 * sub);
      gathered = static_cast<char*>(workspace(Slot::kPacked, static_cast<size_t>(chain_.gather_bytes(st))));
    }
    const int panel_floats = 2 * sub * panel;
    const int64_t steps = st.pack.words / chain_.step(st);  // of a tile
    Ahead ahead(l == chain_.ahead_layer ? &ahead_ : nullptr,
                (panel_end - panel_begin) / tile.panels * ceil_div(count, 2 * sub) * steps);
    PointwiseArgs args{};
    args.c = static_cast<float*>(workspace(Slot::kTiles, static_cast<size_t>(tile.panels) * panel_floats * 4));
    args.c2 = args.c + panel_floats;
    args.words = st.pack.words;
    args.segment = chain_.segment(st);
    args.lda = st.gather ? st.gather_pitch : st.pitch;
    args.first = static_cast<int32_t>(int64_t{from - out.origin_row} * out.columns + out.origin);
    args.width = static_cast<int>(together);
    args.row = out.columns;
    args.of_image = static_cast<int>(whole_images ? count : of_image);
    args.image = static_cast<int32_t>(out.image);
    for (int64_t g = 0; g < count; g += group) {
      const int64_t group_end = std::min(count, g + group);
      if (gathered) gather_run(st, from, of_image, g, group_end, gathered);
      for (int n = panel_begin; n < panel_end; n += tile.panels) {
        Epilogue e[2];
        for (int p = 0; p < tile.panels; ++p) e[p] = epilogue(l, st, out, shortcut, n + p);
        args.epilogue = e;
        args.b = weights(st) + n * st.pack.panel_bytes;
        args.b2 = args.b + st.pack.panel_bytes;
        if (first_step_ && g == 0) {
          const int next = n + tile.panels;
          const char* const first = weights(st) + next * st.pack.panel_bytes;
          const int64_t all = ceil_div(group_end, 2 * sub) * steps;
          if (next >= panel_end)
            ahead.weights(after(l, panel_begin, panels(st)), {}, all);
          else
            ahead.weights({first, st.pack.panel_bytes},
                          {first + st.pack.panel_bytes, tile.panels > 1 ? st.pack.panel_bytes : 0}, all);
        }
        for (int64_t i = g, end; i < group_end; i = end) {
          end = one_run ? group_end : std::min(group_end, (i / of_image + 1) * of_image);
          args.pixels = static_cast<int>(end - i);
          args.place = static_cast<int>(i);
          args.readable = INT_MAX;
          if (gathered) {
            args.a = gathered + (i - g) * args.lda;
          } else if (st.in_place) {  // no tile may read past x
            const int64_t start = (i / of_image * st.in_h + from) * st.in_w + i % of_image;
            args.a = x_ + start * args.lda;
            args.readable = (int64_t{block_.n} - image_) * st.in_h * st.in_w - start;
          } else {
            args.a = level_row(l, static_cast<int>(i / of_image), from) + i % of_image * args.lda;
          }
          ahead.multiply(tile.pointwise, args);
        }
      }
    }
  }

  // Pixels [begin, end) of those that a 1x1 layer reads for the output rows from `from` on, `of_image` of each image.
  void gather_run(const Stage& st, int from, int64_t of_image, int64_t begin, int64_t end, char* d) const {
    static thread_local std::vector<int32_t> pixels;
    const ConvShape& s = st.layer->shape;
    const int64_t step_x = int64_t{s.stride_w} * chain_.input_step(),
                  step_y = int64_t{s.stride_h} * chain_.input_step();
    const int64_t bytes = int64_t{st.pack.words} * 4;
    const bool dense = step_x == 1 && step_y == 1;
    pixels.clear();
    for (int64_t i = begin; i < end;) {  // row by row, or the part of an image in one piece
      const int64_t image = i / of_image, place = i % of_image, y = from + place / st.out_w, x = place % st.out_w;
      const int64_t first = (image * block_.h + y * step_y) * block_.w + x * step_x;
      if (dense) {
        const int64_t piece = std::min(end, (image + 1) * of_image) - i;
        copy_pixels(x_ + first * chain_.x_pixel, nullptr, static_cast<int>(piece), d, st.gather_pitch, st.pack.bf16,
                    bytes);
        d += piece * st.gather_pitch;
        i += piece;
        continue;
      }
      const int64_t piece = std::min<int64_t>(end - i, st.out_w - x);
      for (int64_t j = 0; j < piece; ++j) pixels.push_back(static_cast<int32_t>(first + j * step_x));
      i += piece;
    }
    if (!dense) copy_pixels(x_, pixels.data(), static_cast<int>(end - begin), d, st.gather_pitch, st.pack.bf16, bytes);
  }

  // The first weights of what is computed after a layer, by the thread that has the layer's panels from `panel` on, of
  // `all`.
  Range after(int l, int panel, int all) const {
    const int last = chain_.count - 1;
    const Stage* next = nullptr;
    if (l == kProjection)
      next = &chain_.stages[last];
    else if (l < last)
      next = l + 1 == last && block_.has_projection ? &chain_.projection : &chain_.stages[l + 1];
    else if (chain_.next)
      next = chain_.next->count == 1 && chain_.next->block.has_projection ? &chain_.next->projection
                                                                          : &chain_.next->stages[0];
    if (!next) return {};
    const int64_t first = int64_t{panels(*next)} * panel / all;
    return {weights(*next) + first * next->pack.panel_bytes,
            std::min<int64_t>((panels(*next) - first) * next->pack.panel_bytes, kAheadWeights)};
  }

  static bool row_inside(const Stage& st, const SubTile& t, int r) {
    if (t.y == INT_MIN) return true;
    const int y = t.y + r * st.layer->shape.dil_h;
    return y >= 0 && y < st.in_h;
  }
  static bool inside(const Stage& st, const SubTile& t) {
    return row_inside(st, t, 0) && row_inside(st, t, st.layer->shape.r - 1);
  }

  // ---- Winograd --------------------------------------------------------------------------------------------------
  struct Grid {
    int high, wide;
    int64_t tiles, padded;  // padded: register tiles at the end read, and write, a few more
    int64_t pitch;          // bytes between tiles
    int64_t frequency;      // bytes between frequencies
  };
  Grid grid(const Stage& st, int rows) const {
    Grid g;
    g.high = static_cast<int>(ceil_div(rows, st.m));
    g.wide = static_cast<int>(ceil_div(st.out_w, st.m));
    g.tiles = int64_t{images_} * g.high * g.wide;
    g.padded = g.tiles + 2 * chain_.tiles_of(st.pack).tallest;
    g.pitch = chain_.winograd_pitch(st);
    g.frequency = g.padded * g.pitch;
    return g;
  }

  void allocate_transformed(int l) {
    const Stage& st = chain_.stages[l];
    const int64_t bytes = st.pack.taps * grid(st, std::max(0, hi_[l + 1] - have_[l + 1])).frequency;
    transformed_ = static_cast<char*>(workspace(Slot::kTransformed, static_cast<size_t>(bytes)));
  }

  void winograd_transform(int l, int block_begin, int block_end) {
    const Stage& st = chain_.stages[l];
    const int from = have_[l + 1], to = hi_[l + 1];
    if (from >= to) return;
    const Grid g = grid(st, to - from);
    const int64_t channel = int64_t{block_begin} * kernels_.narrow * (st.pack.bf16 ? 2 : 4);  // in bytes
    const auto transform = st.pack.bf16 ? kernels_.winograd_in_bf16 : kernels_.winograd_in[st.m == 4];
    WinogradIn w{};
    w.row = st.columns * st.pitch;
    w.pixel = st.pitch;
    w.frequency = g.frequency;
    w.channels = (block_end - block_begin) * kernels_.narrow;
    w.tile = g.pitch;
    w.tiles = g.wide;
    w.dst = transformed_ + channel;
    for (int image = 0; image < images_; ++image)
      for (int y = 0; y < g.high; ++y, w.dst += g.wide * g.pitch) {
        w.src = level_row(l, image, from - st.layer->shape.pad_h + y * st.m) + channel;
        transform(w);
      }
  }

  void winograd_multiply(int l, const Output& out, const Shortcut& shortcut, int from, int to, int panel_begin,
                         int panel_end) {
    const Stage& st = chain_.stages[l];
    const Grid g = grid(st, to - from);
    const int panel = st.pack.panel, frequencies = st.pack.taps;
    const Tile tile =
        choose_tile(st, panel_end - panel_begin, [&](int sub) { return round_up<int64_t>(g.tiles, 2 * sub); });
    const bool by_panel = chain_.winograd_by_panel(st, g.padded);
    const int kept = by_panel ? tile.panels : panel_end - panel_begin;  // panels of products
    const int64_t product = g.padded * panel;                           // floats of one frequency of one panel
    const int64_t panel_products = frequencies * product;
    auto* products = static_cast<float*>(workspace(Slot::kProducts, static_cast<size_t>(kept * panel_products) * 4));
    const int64_t steps = ceil_div(g.tiles, 2 * tile.sub) * (st.pack.words / chain_.step(st));  // of one frequency
    Ahead ahead(l == chain_.ahead_layer ? &ahead_ : nullptr,
                frequencies * ((panel_end - panel_begin) / tile.panels) * steps);
    const int64_t frequency_bytes = int64_t{st.pack.words} * panel * 4;
    // While the products of `run` frequencies of a panel are computed, their weights of the next one.
    auto prefetch = [&](int f, int n, int run) {
      if (!first_step_) return;
      int next_f = f, next_n = n + tile.panels;
      if (next_n >= panel_end) {
        next_f = f + run;
        next_n = panel_begin;
      }
      if (next_f >= frequencies) {
        ahead.weights(after(l, panel_begin, panels(st)), {}, steps * run);
        return;
      }
      const char* const first = weights(st) + next_n * st.pack.panel_bytes + next_f * frequency_bytes;
      ahead.weights({first, run * frequency_bytes},
                    {first + st.pack.panel_bytes, tile.panels > 1 ? run * frequency_bytes : 0}, steps * run);
    };
    auto multiply = [&](int f, int run, int n, float* first_product) {
      ProductArgs args{};
      args.frequencies = run;
      args.a_frequency = g.frequency;
      args.c_frequency = product;
      args.lda = g.pitch;
      args.segment = chain_.segment(st);
      args.words = st.pack.words;
      args.b = weights(st) + n * st.pack.panel_bytes + int64_t{f} * st.pack.words * panel * 4;
      args.b2 = args.b + st.pack.panel_bytes;
      args.a = transformed_ + f * g.frequency;
      args.c = first_product + f * product;
      args.c2 = args.c + panel_products;
      args.tiles = ceil_div(g.tiles, 2 * tile.sub);
      ahead.multiply(tile.product, args);
    };
    if (!by_panel)
      for (int f = 0; f < frequencies; ++f)
        for (int n = panel_begin; n < panel_end; n += tile.panels) {
          prefetch(f, n, 1);
          multiply(f, 1, n, products + (n - panel_begin) * panel_products);
        }
    for (int n = panel_begin; n < panel_end; ++n) {
      const int slot = (n - panel_begin) % kept;
      if (by_panel && slot == 0) {
        prefetch(0, n, frequencies);
        multiply(0, frequencies, n, products);
      }
      const Epilogue e = epilogue(l, st, out, shortcut, n);
      WinogradOut w{};
      w.src = products + slot * panel_products;
      w.frequency = product;
      w.tiles = g.wide;
      w.panel = panel;
      w.columns = st.out_w;
      w.row = out.columns;
      for (int image = 0; image < images_; ++image)
        for (int y = from; y < to; y += st.m, w.src += g.wide * panel) {
          w.rows = std::min(st.m, to - y);
          w.pixel = static_cast<int32_t>(out.image * image + int64_t{y - out.origin_row} * out.columns + out.origin);
          kernels_.winograd_out[st.m == 4](w, e);
        }
    }
  }

  // ---- pooling ---------------------------------------------------------------------------------------------------
  void pool_rows(int y0, int y1) {
    const Pool& pool = block_.pool;
    const int h = chain_.final_h, first = lo_[chain_.count];
    MaxPoolArgs p{};
    p.pixel = chain_.pool_pitch / 4;
    p.row = chain_.final_w * p.pixel;
    p.width = chain_.final_w;
    p.kernel = pool.kernel;
    p.stride = pool.stride;
    p.pad = pool.pad;
    p.windows = chain_.out_w;
    p.channels = chain_.stages[chain_.count - 1].layer->shape.k;
    p.out_pitch = chain_.out_pixel;
    p.bf16 = block_.dtype == DType::kBf16;
    for (int image = 0; image < images_; ++image)
      for (int y = y0; y < y1; ++y) {
        const int top = std::max(0, y * pool.stride - pool.pad);
        p.rows = std::min(h, pooled_rows_end(y + 1)) - top;
        p.x = pool_ + (int64_t{image} * chain_.pool_capacity + top - first) * p.row;
        p.out = out_ + (int64_t{image} * chain_.out_h + y) * chain_.out_w * chain_.out_pixel;
        kernels_.max_pool(p);
      }
  }
};

// ---- schedule ----------------------------------------------------------------------------------------------------
// Sizes in bytes of one channel of what a unit and a step compute: weights are streamed once a unit, and the levels of
// a step stay in L2. Measured on ResNet-50's blocks, half and double cost up to 5%.
constexpr int64_t kUnitBytes = 800;
constexpr int64_t kStepBytes = 896;
// Threads share channels where there are fewer output pixels per thread than this and more weights than stay in L2, or
// too few rows for all.
constexpr int kSplitPixels = 128;
constexpr int kBandRows = 4;  // at least

Schedule choose_schedule(const Chain& chain, int threads) {
  const Block& b = chain.block;
  const int out_h = chain.out_h, out_w = chain.out_w;
  const int64_t pixels = int64_t{out_h} * out_w;
  Schedule p{};
  bool winograd = false;
  int m = 1;
  for (int l = 0; l < chain.count; ++l)
    if (chain.stages[l].m) {
      winograd = true;
      m = chain.stages[l].m;
    }
  const int64_t element = winograd ? 4 : element_size(b.dtype);
  // Units of equal size, a whole number of them for each thread.
  const int64_t share = std::max(1, b.n / threads);
  const int64_t wanted = std::clamp<int64_t>(ceil_div(kUnitBytes / element, pixels), 1, share);
  p.images = static_cast<int>(ceil_div(share, ceil_div(share, wanted)));
  const bool few = b.n * pixels < int64_t{kSplitPixels} * threads,
             shares_rows = b.n >= threads || out_h >= kBandRows * threads;
  p.split_channels = threads > 1 && few && (chain.weights() > kKeptWeights || !shares_rows);
  if (p.split_channels) {
    p.images = b.n;
    p.bands = 1;
    p.rows = out_h;
    return p;
  }
  // Bands until the units share out evenly.
  const int64_t groups = ceil_div(b.n, p.images);
  p.bands = 1;
  while (p.bands < threads && out_h >= kBandRows * (p.bands + 1) &&
         ceil_div(groups * p.bands, threads) * threads * 10 > groups * p.bands * 11)
    ++p.bands;
  const int band = static_cast<int>(ceil_div(out_h, p.bands));
  if (p.images > 1) {  // whole images: rows of different images then lie one after the other
    p.bands = 1;
    p.rows = out_h;
    return p;
  }
  int64_t rows = std::clamp<int64_t>(ceil_div(kStepBytes / element, out_w), 1, band);
  rows = ceil_div(band, ceil_div(band, rows));  // steps of equal height
  p.rows = static_cast<int>(std::min<int64_t>(band, round_up<int64_t>(rows, m)));
  return p;
}

void check_pack(const Kernels& kernels, const Block& b, const Layer& layer, const char* name) {
  const PackHeader& h = *layer.packed;
  const ConvShape& s = layer.shape;
  const PackShape p = pack_shape(kernels, s, b.dtype, layer.algorithm);
  if (h.magic != kPackMagic)
    throw std::invalid_argument(std::string(name) + ": expected packed weights, got other data");
  if (h.isa != static_cast<int>(kernels.isa))
    throw std::invalid_argument(std::string(name) + ": packed for another instruction set than " + kernels.name +
                                "; pack again");
  if (h.algorithm != static_cast<int>(layer.algorithm) || h.bf16 != p.bf16)
    throw std::invalid_argument(std::string(name) + ": packed for another algorithm or dtype; pack again");
  if (h.k != s.k || h.c != s.c || h.r != s.r || h.s != s.s || h.groups != s.groups)
    throw std::invalid_argument(std::string(name) + ": packed weight has shape [" + std::to_string(h.k) + ", " +
                                std::to_string(h.c / h.groups) + ", " + std::to_string(h.r) + ", " +
                                std::to_string(h.s) + "], expected [" + std::to_string(s.k) + ", " +
                                std::to_string(s.c / s.groups) + ", " + std::to_string(s.r) + ", " +
                                std::to_string(s.s) + "]");
}

// Chains in one parallel region. A unit is a band of a group of images, or the group through all of a few chains whose
// weights stay in L2 together. Each thread takes the units of its own share of the pixels first, which it computed and
// has in its caches, then those that others have not begun: one that the system holds up delays nobody by more. A unit
// waits until what it reads is written; a thread goes on to the next chains when all units of those before are taken,
// so those that it waits for are being computed by threads that run, however few there are.
class Region {
 public:
  Region(Chain* first, Chain* last, int threads) {
    int64_t weights = 0;
    for (Chain* c = first; c < last; weights += c->weights(), ++c) {
      const bool kept = c > first && c->plan.bands == 1 && parts_.back().bands == 1 && same_groups(c[-1], *c) &&
                        weights + c->weights() <= kKeptWeights;
      if (kept) {
        parts_.back().end = c + 1;
        c[-1].kept = c->group_bytes() <= kKeptPixels;
        continue;
      }
      if (c > first && same_groups(c[-1], *c) && c[-1].plan.bands == c->plan.bands)
        c[-1].kept = ceil_div(c->block.n, c->plan.images) * c->group_bytes() <= kKeptPixels;
      weights = 0;
      parts_.push_back({c, c + 1, units_, groups_, ceil_div(c->block.n, c->plan.images), c->plan.bands});
      units_ += parts_.back().groups * c->plan.bands;
      groups_ += parts_.back().groups;
    }
    done_ = std::make_unique<std::atomic<int>[]>(static_cast<size_t>(groups_));
    taken_ = std::make_unique<std::atomic<bool>[]>(static_cast<size_t>(units_));
    int64_t widest = 0;
    for (const Part& p : parts_) widest = std::max(widest, p.groups * p.bands);
    threads_ = std::min<int64_t>(widest, threads);
  }

  void run(const Parallel& parallel) {
    for (int64_t g = 0; g < groups_; ++g) done_[g].store(0, std::memory_order_relaxed);
    for (int64_t u = 0; u < units_; ++u) taken_[u].store(false, std::memory_order_relaxed);
    parallel.run(
        threads_, [](int64_t thread, int64_t, void* region) { static_cast<Region*>(region)->work(thread); }, this);
  }

 private:
  struct Part {
    const Chain *begin, *end;         // that a unit goes through
    int64_t first_unit, first_group;  // of all parts
    int64_t groups;                   // of images
    int bands;
  };
  std::vector<Part> parts_;
  int64_t units_ = 0, groups_ = 0, threads_ = 1;
  std::unique_ptr<std::atomic<int>[]> done_;    // units of each group
  std::unique_ptr<std::atomic<bool>[]> taken_;  // of each unit

  static bool same_groups(const Chain& a, const Chain& b) {
    return a.block.n == b.block.n && a.plan.images == b.plan.images;
  }

  void work(int64_t thread) {
    for (const Part& part : parts_) {
      const int64_t units = part.groups * part.bands, first = units * thread / threads_;
      for (int64_t i = 0; i < units; ++i) {
        const int64_t unit = (first + i) % units, group = unit / part.bands;
        auto& taken = taken_[part.first_unit + unit];
        if (taken.load(std::memory_order_relaxed) || taken.exchange(true, std::memory_order_relaxed)) continue;
        const Part* const before = &part - 1;
        if (&part > parts_.data()) wait_for(*before, same_groups(*before->begin, *part.begin) ? group : -1);
        const Done done{done_[part.first_group + group]};
        for (const Chain* chain = part.begin; chain < part.end; ++chain)
          run_unit(*chain, group, static_cast<int>(unit % part.bands));
      }
    }
  }
  // Counts a unit, also one that throws: nobody waits for it forever, and the region throws when all have ended.
  struct Done {
    std::atomic<int>& count;
    // A locked instruction on x86: it also orders the non-temporal stores of the output.
    ~Done() { count.fetch_add(1, std::memory_order_acq_rel); }
  };

  // Until a group of images (-1: all) has been through a part, and so through those before it.
  void wait_for(const Part& part, int64_t group) const {
    const int64_t begin = part.first_group + std::max<int64_t>(0, group);
    const int64_t end = group < 0 ? part.first_group + part.groups : begin + 1;
    for (int64_t g = begin; g < end; ++g)
      for (int spins = 0; done_[g].load(std::memory_order_acquire) < part.bands;)
        spins < kSpins ? (++spins, pause()) : std::this_thread::yield();
  }
  static constexpr int kSpins = 4096;  // about 100 us
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  static void run_unit(const Chain& chain, int64_t group, int band) {
    const Schedule& p = chain.plan;
    const int rows = static_cast<int>(ceil_div(chain.out_h, p.bands)), y = band * rows;
    const int image = static_cast<int>(group) * p.images, images = std::min(p.images, chain.block.n - image);
    if (y < chain.out_h) Unit(chain, image, images, y, std::min(chain.out_h, y + rows)).run();
  }
};

}  // namespace

Schedule schedule(const Kernels& kernels, const Block& block, int threads) {
  Chain chain(kernels, block);
  chain.fit(choose_schedule(chain, threads));
  return chain.plan;
}

struct Sequence::Prepared {
  // Blocks whose threads share channels, one after the other, or neighbours in one parallel region.
  struct Part {
    Chain* split;                    // the only one, or null
    std::unique_ptr<Region> region;  // of all others
  };
  std::vector<Block> blocks;
  std::vector<Chain> chains;  // empty: no output has a pixel
  std::vector<Part> parts;
};

Sequence::Sequence(const Kernels& kernels, std::vector<Block> blocks, int threads)
    : prepared_(std::make_unique<Prepared>()) {
  Prepared& p = *prepared_;
  p.blocks = std::move(blocks);
  p.chains.reserve(p.blocks.size());
  for (const Block& b : p.blocks) {
    for (int l = 0; l < b.layer_count; ++l) check_pack(kernels, b, b.layers[l], "weight");
    if (b.has_projection) check_pack(kernels, b, b.projection, "projection");
    Chain& chain = p.chains.emplace_back(kernels, b);
    if (b.n == 0 || chain.final_h <= 0 || chain.final_w <= 0) return;
    chain.fit(choose_schedule(chain, threads));
  }
  Chain* const begin = p.chains.data();
  Chain* const end = begin + p.chains.size();
  for (Chain* c = begin; c + 1 < end; ++c) c->next = c + 1;
  for (Chain *c = begin, *after; c < end; c = after) {
    after = c + 1;
    if (c->plan.split_channels) {
      p.parts.push_back({c, nullptr});
      continue;
    }
    while (after < end && !after->plan.split_channels) ++after;
    p.parts.push_back({nullptr, std::make_unique<Region>(c, after, threads)});
  }
}

Sequence::~Sequence() = default;

void Sequence::bind(size_t i, const void* x, const void* residual, void* out) {
  Block& b = prepared_->blocks[i];
  b.x = x;
  b.residual = residual;
  b.out = out;
}

void Sequence::run(const Parallel& parallel) {
  for (Prepared::Part& part : prepared_->parts) {
    if (part.split)
      Unit(*part.split, 0, part.split->block.n, 0, part.split->out_h).run_split(parallel);
    else
      part.region->run(parallel);
  }
}

void run_block(const Kernels& kernels, const Block& block, const Parallel& parallel) {
  Sequence(kernels, {block}, parallel.threads).run(parallel);
}

}  // namespace resnet_fused::cpu
