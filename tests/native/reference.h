// What the kernels compute, as plain loops in float64.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/block.h"

// A dense NHWC tensor.
struct Tensor {
  int n = 0, h = 0, w = 0, c = 0;
  std::vector<double> data;

  Tensor() = default;
  Tensor(int n, int h, int w, int c) : n(n), h(h), w(w), c(c), data(static_cast<size_t>(n) * h * w * c) {}
  double& at(int i, int y, int x, int k) { return data[((static_cast<size_t>(i) * h + y) * w + x) * c + k]; }
  const double& at(int i, int y, int x, int k) const { return const_cast<Tensor*>(this)->at(i, y, x, k); }
};

struct ReferenceLayer {
  resnet_fused::cpu::ConvShape shape;
  std::vector<double> weight;  // [k][c / groups][r][s]
  std::vector<double> scale, shift;
  bool relu = true;
};

inline void relu(Tensor& t) {
  for (double& v : t.data) v = v < 0 ? 0 : v;  // NaN stays
}

// conv(x, weight) * scale + shift, without the activation.
inline Tensor convolve(const Tensor& x, const ReferenceLayer& layer) {
  const auto& s = layer.shape;
  Tensor y(x.n, s.out_h(x.h), s.out_w(x.w), s.k);
  const int c = s.c / s.groups, k = s.k / s.groups;
  for (int i = 0; i < y.n; ++i)
    for (int p = 0; p < y.h; ++p)
      for (int q = 0; q < y.w; ++q)
        for (int o = 0; o < s.k; ++o) {
          double sum = 0;
          for (int r = 0; r < s.r; ++r)
            for (int t = 0; t < s.s; ++t) {
              const int yy = p * s.stride_h - s.pad_h + r * s.dil_h, xx = q * s.stride_w - s.pad_w + t * s.dil_w;
              if (yy < 0 || yy >= x.h || xx < 0 || xx >= x.w) continue;
              const double* a = &x.at(i, yy, xx, o / k * c);
              const double* b = &layer.weight[((static_cast<size_t>(o) * c * s.r) + r) * s.s + t];
              for (int j = 0; j < c; ++j) sum += a[j] * b[static_cast<size_t>(j) * s.r * s.s];
            }
          y.at(i, p, q, o) = sum * layer.scale[o] + layer.shift[o];
        }
  return y;
}

// relu(x * scale + shift)
inline Tensor activate(const Tensor& x, const std::vector<double>& scale, const std::vector<double>& shift) {
  Tensor y = x;
  for (size_t i = 0; i < y.data.size(); ++i) {
    const size_t channel = i % static_cast<size_t>(x.c);
    y.data[i] = y.data[i] * scale[channel] + shift[channel];
  }
  relu(y);
  return y;
}

// The channels of a, then those of b.
inline Tensor concatenate(const Tensor& a, const Tensor& b) {
  Tensor y(a.n, a.h, a.w, a.c + b.c);
  for (size_t pixel = 0; pixel < static_cast<size_t>(a.n) * a.h * a.w; ++pixel) {
    const auto to = y.data.begin() + static_cast<ptrdiff_t>(pixel * y.c);
    std::copy_n(a.data.begin() + static_cast<ptrdiff_t>(pixel * a.c), a.c, to);
    std::copy_n(b.data.begin() + static_cast<ptrdiff_t>(pixel * b.c), b.c, to + a.c);
  }
  return y;
}

// Averages of 2x2 pixels.
inline Tensor average_pool(const Tensor& x) {
  Tensor y(x.n, x.h / 2, x.w / 2, x.c);
  for (int i = 0; i < y.n; ++i)
    for (int p = 0; p < y.h; ++p)
      for (int q = 0; q < y.w; ++q)
        for (int k = 0; k < y.c; ++k)
          y.at(i, p, q, k) = (x.at(i, 2 * p, 2 * q, k) + x.at(i, 2 * p, 2 * q + 1, k) + x.at(i, 2 * p + 1, 2 * q, k) +
                              x.at(i, 2 * p + 1, 2 * q + 1, k)) /
                             4;
  return y;
}

inline Tensor global_mean(const Tensor& x) {
  Tensor y(x.n, 1, 1, x.c);
  for (int i = 0; i < x.n; ++i)
    for (int p = 0; p < x.h; ++p)
      for (int q = 0; q < x.w; ++q)
        for (int k = 0; k < x.c; ++k) y.at(i, 0, 0, k) += x.at(i, p, q, k) / (x.h * x.w);
  return y;
}

inline Tensor max_pool(const Tensor& x, const resnet_fused::cpu::Pool& pool) {
  Tensor y(x.n, pool.out(x.h), pool.out(x.w), x.c);
  for (int i = 0; i < y.n; ++i)
    for (int p = 0; p < y.h; ++p)
      for (int q = 0; q < y.w; ++q)
        for (int k = 0; k < y.c; ++k) {
          double m = -INFINITY;
          for (int r = std::max(0, p * pool.stride - pool.pad);
               r < std::min(x.h, p * pool.stride - pool.pad + pool.kernel); ++r)
            for (int t = std::max(0, q * pool.stride - pool.pad);
                 t < std::min(x.w, q * pool.stride - pool.pad + pool.kernel); ++t) {
              const double v = x.at(i, r, t, k);
              if (v > m || std::isnan(v)) m = v;
            }
          y.at(i, p, q, k) = m;
        }
  return y;
}
