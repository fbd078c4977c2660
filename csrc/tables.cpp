#include "tables.h"

#include <stdexcept>

#include "cpu/cost.h"
#include "cpu/isa.h"

namespace resnet_fused::tables {
namespace {

using namespace cpu;

int get(const Dims& d, const char* name) {
  const auto it = d.find(name);
  if (it == d.end()) throw std::invalid_argument(std::string("dims: missing ") + name);
  return static_cast<int>(it->second);
}

// Shapes only. `shortcut` stands for a residual that is not null.
Block block_of(const std::string& op, const Dims& d, DType dtype, Algorithm algorithm) {
  static const float shortcut = 0;
  Block b;
  b.n = get(d, "n");
  b.h = get(d, "h");
  b.w = get(d, "w");
  b.dtype = dtype;
  auto set = [&](int l, const ConvShape& s) {
    b.layers[l].shape = s;
    b.layer_count = l + 1;
    const bool fits =
        s.r == 3 && s.s == 3 && s.stride_h == 1 && s.stride_w == 1 && s.dil_h == 1 && s.dil_w == 1 && s.groups == 1;
    b.layers[l].algorithm = fits ? algorithm : Algorithm::kDirect;
  };
  auto project = [&](int stride, int out) {
    if (get(d, "projection")) {
      b.has_projection = true;
      b.projection.shape = square_conv(get(d, "c"), out, 1, stride, 1);
    } else {
      b.x = b.residual = &shortcut;
    }
  };
  if (op == "conv") {
    ConvShape s;
    s.c = get(d, "c");
    s.k = get(d, "k");
    s.r = get(d, "r");
    s.s = get(d, "s");
    s.stride_h = get(d, "stride_h");
    s.stride_w = get(d, "stride_w");
    s.pad_h = get(d, "pad_h");
    s.pad_w = get(d, "pad_w");
    s.dil_h = get(d, "dil_h");
    s.dil_w = get(d, "dil_w");
    s.groups = get(d, "groups");
    set(0, s);
    if (get(d, "residual")) b.residual = &shortcut;
    if (get(d, "prologue")) b.in_scale = b.in_shift = &shortcut;
  } else if (op == "bottleneck") {
    const int mid = get(d, "mid"), out = get(d, "out"), stride1 = get(d, "stride1"), stride2 = get(d, "stride2");
    set(0, square_conv(get(d, "c"), mid, 1, stride1, 1));
    set(1, square_conv(mid, mid, 3, stride2, get(d, "dilation")));
    set(2, square_conv(mid, out, 1, 1, 1));
    project(stride1 * stride2, out);
  } else if (op == "basic_block") {
    const int mid = get(d, "mid"), out = get(d, "out"), stride = get(d, "stride"), dilation = get(d, "dilation");
    set(0, square_conv(get(d, "c"), mid, 3, stride, dilation));
    set(1, square_conv(mid, out, 3, 1, dilation));
    project(stride, out);
  } else if (op == "preact_block") {
    const int mid = get(d, "mid"), out = get(d, "out"), stride1 = get(d, "stride1"), stride2 = get(d, "stride2"),
              dilation = get(d, "dilation");
    if (get(d, "bottleneck")) {
      set(0, square_conv(get(d, "c"), mid, 1, stride1, 1));
      set(1, square_conv(mid, mid, 3, stride2, dilation));
      set(2, square_conv(mid, out, 1, 1, 1));
    } else {
      set(0, square_conv(get(d, "c"), mid, 3, stride1, dilation));
      set(1, square_conv(mid, out, 3, stride2, dilation));
    }
    project(stride1 * stride2, out);
    b.in_scale = b.in_shift = &shortcut;
  } else if (op == "transition") {
    set(0, square_conv(get(d, "c"), get(d, "k"), 1, 1, 1));
    b.in_scale = b.in_shift = &shortcut;
    b.average = true;
  } else if (op == "stem") {
    ConvShape s;
    s.c = get(d, "c");
    s.k = get(d, "k");
    s.r = get(d, "r");
    s.s = get(d, "s");
    s.stride_h = s.stride_w = get(d, "stride");
    s.pad_h = s.pad_w = get(d, "pad");
    set(0, s);
    b.layers[0].algorithm = Algorithm::kDirect;
    b.pool = {get(d, "pool_kernel"), get(d, "pool_stride"), get(d, "pool_padding")};
  } else {
    throw std::invalid_argument(
        "op: expected conv, bottleneck, basic_block, preact_block, dense_block, transition, stem or head, got " + op);
  }
  return b;
}

DenseShape dense_shape_of(const Dims& d, DType dtype, Algorithm algorithm) {
  DenseShape s;
  s.n = get(d, "n");
  s.h = get(d, "h");
  s.w = get(d, "w");
  s.c = get(d, "c");
  s.growth = get(d, "growth");
  s.mid = get(d, "mid");
  s.count = get(d, "depth");
  s.dtype = dtype;
  s.algorithm = algorithm;
  return s;
}

Head head_of(const Dims& d, DType dtype) {
  Head head;
  head.n = get(d, "n");
  head.h = get(d, "h");
  head.w = get(d, "w");
  head.c = get(d, "c");
  head.k = get(d, "k");
  head.dtype = dtype;
  return head;
}

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsaCount; ++i)
    if (isa_runs(static_cast<Isa>(i))) names.push_back(isa_name(static_cast<Isa>(i)));
  return names;
}

std::vector<Row> kernel_table() {
  std::vector<Row> rows;
  const auto add = [&](const Kernels& k, const char* kernel, const char* dtype, const cpu::Tiles& tiles,
                       int64_t columns, int64_t depth) {
    if (!tiles.tallest) return;
    rows.push_back({{"isa", std::string(k.name)},
                    {"kernel", std::string(kernel)},
                    {"dtype", std::string(dtype)},
                    {"tile_rows", int64_t{2} * tiles.tallest},
                    {"tile_columns", columns},
                    {"tile_depth", depth},
                    {"selected", &k == &kernels()}});
  };
  for (int i = 0; i < kIsaCount; ++i) {
    if (!isa_runs(static_cast<Isa>(i))) continue;
    const Kernels& k = kernels_of(static_cast<Isa>(i));
    for (const char* kernel : {"direct", "winograd2", "winograd4"}) {
      add(k, kernel, "float32", k.f32, k.panel, 1);
      add(k, kernel, "float32", k.f32_narrow, k.narrow, 1);
    }
    add(k, "direct", "float32", k.f32_row, k.panel, kRowTaps);
    add(k, "direct", "float32", k.f32_narrow_row, k.narrow, kRowTaps);
    const auto add_bf16 = [&](const char* kernel) {
      add(k, kernel, "bfloat16", k.bf16, k.panel, 2 * k.bf16_word_multiple);
      add(k, kernel, "bfloat16", k.bf16_narrow, k.narrow, 2 * k.bf16_narrow_multiple);
    };
    add_bf16("direct");
    if (k.winograd_in_bf16) add_bf16("winograd2");
  }
  return rows;
}

Row cost(const std::string& op, const Dims& dims, const std::string& dtype, const std::string& algorithm, int threads) {
  if (dtype != "float32" && dtype != "bfloat16")
    throw std::invalid_argument("dtype: expected float32 or bfloat16, got " + dtype);
  Algorithm a = Algorithm::kDirect;
  if (algorithm == "winograd2")
    a = Algorithm::kWinograd2;
  else if (algorithm == "winograd4")
    a = Algorithm::kWinograd4;
  else if (algorithm != "direct" && algorithm != "vendor")
    throw std::invalid_argument("algorithm: expected direct, winograd2, winograd4 or vendor, got " + algorithm);
  const DType type = dtype == "bfloat16" ? DType::kBf16 : DType::kF32;
  const bool vendor = algorithm == "vendor";
  Cost c;
  if (op == "dense_block") {
    const DenseShape s = dense_shape_of(dims, type, a);
    c = vendor ? vendor_dense_cost(s, threads) : dense_cost(cpu::kernels(), s, threads);
  } else if (op == "head") {
    const Head head = head_of(dims, type);
    c = vendor ? vendor_head_cost(head, threads) : head_cost(cpu::kernels(), head, threads);
  } else {
    const Block b = block_of(op, dims, type, a);
    c = vendor ? vendor_cost(b, threads) : block_cost(cpu::kernels(), b, threads);
  }
  return {{"seconds", c.seconds},
          {"flops", c.flops},
          {"bytes", c.bytes},
          {"workspace_bytes", static_cast<int64_t>(c.workspace_bytes)},
          {"note", c.note}};
}

}  // namespace resnet_fused::tables
