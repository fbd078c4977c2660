// Weights in the order in which the register tile reads them.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "block.h"

namespace resnet_fused::cpu {
namespace {

// G of F(m x m, 3x3); see Winograd<m> in kernels_impl.h for the points.
constexpr double kG2[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
constexpr double kG4[6][3] = {{1, 0, 0},
                              {-1. / 3, -1. / 3, -1. / 3},
                              {1. / 3, -1. / 3, 1. / 3},
                              {1. / 15, 2. / 15, 4. / 15},
                              {-16. / 15, 8. / 15, -4. / 15},
                              {0, 0, 1}};

float to_f32(const void* p, int64_t i, DType t) {
  if (t == DType::kF32) return static_cast<const float*>(p)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(p)[i]) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Rounded to nearest even.
uint16_t to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (f != f) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Panel n, counted over all groups.
void pack_panel(const ConvShape& s, const PackShape& p, DType dtype, Algorithm algorithm, const void* weight, int64_t n,
                char* out) {
  const int c = s.c / s.groups, k = s.k / s.groups, panel = p.panel, m = winograd_m(algorithm), window = s.r * s.s;
  const int first = static_cast<int>(n % p.panels) * panel, columns = std::min(panel, k - first);
  const int64_t o = n / p.panels * k + first;
  std::memset(out, 0, static_cast<size_t>(p.panel_bytes));
  auto* const f32 = reinterpret_cast<float*>(out);
  auto* const bf16 = reinterpret_cast<uint16_t*>(out);
  for (int i = 0; i < c; ++i)
    for (int column = 0; column < columns; ++column) {
      const int64_t w = ((o + column) * c + i) * window;
      if (m) {
        const int t = m + 2;
        double half[6][3];
        auto g = [m](int a, int b) { return m == 2 ? kG2[a][b] : kG4[a][b]; };
        for (int a = 0; a < t; ++a)
          for (int x = 0; x < 3; ++x)
            half[a][x] = g(a, 0) * to_f32(weight, w + x, dtype) + g(a, 1) * to_f32(weight, w + 3 + x, dtype) +
                         g(a, 2) * to_f32(weight, w + 6 + x, dtype);
        for (int a = 0; a < t; ++a)
          for (int b = 0; b < t; ++b) {
            const auto v = static_cast<float>(half[a][0] * g(b, 0) + half[a][1] * g(b, 1) + half[a][2] * g(b, 2));
            const int64_t first_word = int64_t{a * t + b} * p.words;
            if (p.bf16)
              bf16[((first_word + i / 2) * panel + column) * 2 + i % 2] = to_bf16(v);
            else
              f32[(first_word + i) * panel + column] = v;
          }
      } else if (p.bf16) {
        for (int tap = 0; tap < window; ++tap) {
          const int64_t word = p.flat ? (int64_t{tap} * c + i) / 2 : int64_t{tap} * p.words + i / 2;
          const int64_t half = p.flat ? (int64_t{tap} * c + i) % 2 : i % 2;
          bf16[(word * panel + column) * 2 + half] = static_cast<const uint16_t*>(weight)[w + tap];
        }
      } else {
        for (int tap = 0; tap < window; ++tap)
          f32[(int64_t{tap} * c + i) * panel + column] = to_f32(weight, w + tap, dtype);
      }
    }
}

}  // namespace

PackShape pack_shape(const Kernels& kernels, const ConvShape& s, DType dtype, Algorithm algorithm) {
  const int c = s.c / s.groups, k = s.k / s.groups, m = winograd_m(algorithm);
  if (m && (s.r != 3 || s.s != 3 || s.groups != 1))
    throw std::invalid_argument("algorithm: Winograd takes a 3x3 kernel with groups=1, got " + std::to_string(s.r) +
                                "x" + std::to_string(s.s) + " with groups=" + std::to_string(s.groups));
  PackShape p;
  // Slices of groups are not aligned; F(4x4, 3x3) in bfloat16 errs three times as much as unfused torch.
  p.bf16 = dtype == DType::kBf16 && kernels.bf16.tallest > 0 && s.groups == 1 &&
           (!m || (m == 2 && kernels.winograd_in_bf16));
  p.flat = p.bf16 && !m && c < 16;  // a tap of a stem's 3 channels would be mostly padding
  p.panel = k <= kernels.narrow ? kernels.narrow : kernels.panel;
  const int unit = p.panel == kernels.narrow ? kernels.bf16_narrow_multiple : kernels.bf16_word_multiple;
  p.taps = m ? (m + 2) * (m + 2) : p.flat ? 1 : s.r * s.s;
  const int depth = p.flat ? c * s.r * s.s : c;
  p.words = p.bf16 ? ((depth + 1) / 2 + unit - 1) / unit * unit : c;
  p.panels = (k + p.panel - 1) / p.panel;
  p.panel_bytes = static_cast<int64_t>(p.taps) * p.words * p.panel * 4;
  p.bytes = static_cast<int64_t>(sizeof(PackHeader)) + s.groups * p.panels * p.panel_bytes;
  return p;
}

void pack(const Kernels& kernels, const ConvShape& s, DType dtype, Algorithm algorithm, const void* weight, void* out,
          const Parallel& parallel) {
  const PackShape p = pack_shape(kernels, s, dtype, algorithm);
  *static_cast<PackHeader*>(out) = {kPackMagic,
                                    static_cast<int32_t>(kernels.isa),
                                    static_cast<int32_t>(algorithm),
                                    p.bf16,
                                    s.k,
                                    s.c,
                                    s.r,
                                    s.s,
                                    s.groups,
                                    p.words,
                                    p.panels};
  auto panels = [&, body = static_cast<char*>(out) + sizeof(PackHeader)](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) pack_panel(s, p, dtype, algorithm, weight, n, body + n * p.panel_bytes);
  };
  parallel.run(
      int64_t{s.groups} * p.panels, [](int64_t a, int64_t b, void* f) { (*static_cast<decltype(panels)*>(f))(a, b); },
      &panels);
}

}  // namespace resnet_fused::cpu
