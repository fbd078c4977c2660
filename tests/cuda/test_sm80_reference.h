// What the kernels compute, as plain loops in float64; the same layer by layer with an unfused model's roundings; and
// the rules by which a result passes.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/ptx.h"

namespace reference {

inline double rounded(double v, __nv_bfloat16) { return __bfloat162float(__double2bfloat16(v)); }
inline double rounded(double v, __half) { return __half2float(__double2half(v)); }
inline double rounded(double v, float) { return static_cast<float>(v); }
inline double to_double(__nv_bfloat16 v) { return __bfloat162float(v); }
inline double to_double(__half v) { return __half2float(v); }
inline double to_double(float v) { return v; }
inline void from_double(double v, __nv_bfloat16& to) { to = __double2bfloat16(v); }
inline void from_double(double v, __half& to) { to = __double2half(v); }
inline void from_double(double v, float& to) { to = static_cast<float>(v); }

// What the matrix unit multiplies: TF32 for float32.
template <class T>
double operand(double v) {
  if (!std::is_same_v<T, float> || !std::isfinite(v)) return v;
  const float f = static_cast<float>(v);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  bits = (bits + 0x1000) & 0xffffe000u;
  float cut;
  std::memcpy(&cut, &bits, 4);
  return cut;
}

// An NHWC image in float64.
struct Image {
  int n = 0, h = 0, w = 0, c = 0;
  std::vector<double> data;

  Image() = default;
  Image(int n, int h, int w, int c) : n(n), h(h), w(w), c(c), data(static_cast<size_t>(n) * h * w * c) {}
  double& at(int i, int y, int x, int k) { return data[((static_cast<size_t>(i) * h + y) * w + x) * c + k]; }
  double at(int i, int y, int x, int k) const { return const_cast<Image*>(this)->at(i, y, x, k); }
};

struct Convolution {
  int c, k, r, s, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dil_h = 1, dil_w = 1;
  std::vector<double> weight;        // [k][r][s][c]
  std::vector<double> scale, shift;  // float32 values

  int out_h(int h) const { return (h + 2 * pad_h - dil_h * (r - 1) - 1) / stride_h + 1; }
  int out_w(int w) const { return (w + 2 * pad_w - dil_w * (s - 1) - 1) / stride_w + 1; }

  static Convolution square(int c, int k, int kernel, int stride, int padding, int dilation = 1) {
    return {c, k, kernel, kernel, stride, stride, padding, padding, dilation, dilation, {}, {}, {}};
  }
};

enum class Rounding {
  kNone,      // exact
  kUnfused,   // every operation's result is rounded to T, as in an unfused model
  kPerLayer,  // once a layer, at its end: what a fused kernel must give bit for bit where its sums are exact
};

template <class T>
struct Arithmetic {
  Rounding rounding;

  double store(double v) const { return rounding == Rounding::kUnfused ? rounded(v, T{}) : v; }
  std::vector<double> multiplicands(std::vector<double> values) const {
    if (rounding != Rounding::kNone)
      for (double& v : values) v = operand<T>(v);
    return values;
  }
  // The end of a layer.
  Image finish(Image x) const {
    if (rounding == Rounding::kPerLayer)
      for (double& v : x.data) v = rounded(v, T{});
    return x;
  }

  // conv(x) * scale + shift.
  Image convolve(const Image& x, const Convolution& l) const {
    const std::vector<double> pixels = multiplicands(x.data), weights = multiplicands(l.weight);
    Image y(x.n, l.out_h(x.h), l.out_w(x.w), l.k);
    for (int i = 0; i < y.n; ++i)
      for (int p = 0; p < y.h; ++p)
        for (int q = 0; q < y.w; ++q)
          for (int k = 0; k < l.k; ++k) {
            double sum = 0;
            for (int r = 0; r < l.r; ++r)
              for (int s = 0; s < l.s; ++s) {
                const int yy = p * l.stride_h - l.pad_h + r * l.dil_h, xx = q * l.stride_w - l.pad_w + s * l.dil_w;
                if (yy < 0 || yy >= x.h || xx < 0 || xx >= x.w) continue;
                const double* a = &pixels[((static_cast<size_t>(i) * x.h + yy) * x.w + xx) * x.c];
                const double* b = &weights[((static_cast<size_t>(k) * l.r + r) * l.s + s) * l.c];
                for (int c = 0; c < l.c; ++c) sum += a[c] * b[c];
              }
            y.at(i, p, q, k) = store(store(sum) * l.scale[k] + l.shift[k]);
          }
    return y;
  }
  Image relu(Image x) const {
    for (double& v : x.data) v = v < 0 ? 0 : v;  // NaN stays
    return x;
  }
  Image add(Image x, const Image& y) const {
    for (size_t i = 0; i < x.data.size(); ++i) x.data[i] = store(x.data[i] + y.data[i]);
    return x;
  }
  // A pre-activation: relu(x * scale + shift).
  Image activate(Image x, const std::vector<double>& scale, const std::vector<double>& shift) const {
    for (size_t i = 0; i < x.data.size(); ++i) x.data[i] = store(x.data[i] * scale[i % x.c] + shift[i % x.c]);
    return finish(relu(x));
  }
  Image max_pool(const Image& x, int kernel, int stride, int padding) const {
    Image y(x.n, (x.h + 2 * padding - kernel) / stride + 1, (x.w + 2 * padding - kernel) / stride + 1, x.c);
    for (int i = 0; i < y.n; ++i)
      for (int p = 0; p < y.h; ++p)
        for (int q = 0; q < y.w; ++q)
          for (int k = 0; k < y.c; ++k) {
            double m = -INFINITY;
            for (int yy = p * stride - padding; yy < p * stride - padding + kernel; ++yy)
              for (int xx = q * stride - padding; xx < q * stride - padding + kernel; ++xx) {
                if (yy < 0 || yy >= x.h || xx < 0 || xx >= x.w) continue;
                const double v = x.at(i, yy, xx, k);
                m = v > m || std::isnan(v) ? v : m;
              }
            y.at(i, p, q, k) = m;
          }
    return y;
  }
};

// Test values: small integers with sparse weights and powers of two as scales, of which no sum needs rounding; or
// random.
struct Values {
  bool integers;
  std::mt19937 random;

  Values(bool integers, unsigned seed) : integers(integers), random(seed) {}

  template <class T>
  Image image(int n, int h, int w, int c) {
    Image x(n, h, w, c);
    for (double& v : x.data) v = integers ? whole(-3, 3) : rounded(normal(1), T{});
    return x;
  }
  template <class T>
  Convolution layer(Convolution l) {
    const int depth = l.r * l.s * l.c;
    l.weight.resize(static_cast<size_t>(l.k) * depth);
    for (double& v : l.weight)
      v = integers ? (whole(0, depth - 1) < 4 ? whole(-1, 1) : 0) : rounded(normal(1 / std::sqrt(depth)), T{});
    l.scale = scales(l.k);
    l.shift = shifts(l.k);
    return l;
  }
  std::vector<double> scales(int k) {
    std::vector<double> v(k);
    for (double& s : v) s = integers ? std::ldexp(1, whole(-1, 1)) : static_cast<float>(0.5 + std::abs(normal(0.5)));
    return v;
  }
  std::vector<double> shifts(int k) {
    std::vector<double> v(k);
    for (double& s : v) s = integers ? whole(-3, 3) : static_cast<float>(normal(0.5));
    return v;
  }

 private:
  int whole(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }
  double normal(double deviation) { return std::normal_distribution<double>(0, deviation)(random); }
};

// A tensor as a kernel sees it: pixels `pitch` elements apart, the elements between them NaN, and 16-byte aligned.
// Exactly as long as it has to be, so that AddressSanitizer sees an access past its end.
template <class T>
class Buffer {
 public:
  Buffer(const Image& x, int pitch) : n_(x.n), h_(x.h), w_(x.w), c_(x.c), pitch_(pitch) {
    const size_t pixels = static_cast<size_t>(x.n) * x.h * x.w;
    data_ = allocate((pixels - 1) * pitch + x.c);
    for (size_t i = 0; i < pixels; ++i)
      for (int k = 0; k < c_; ++k) from_double(x.data[i * c_ + k], data_.get()[i * pitch + k]);
  }
  // An output, all NaN.
  Buffer(int n, int h, int w, int c, int pitch) : n_(n), h_(h), w_(w), c_(c), pitch_(pitch) {
    data_ = allocate((static_cast<size_t>(n) * h * w - 1) * pitch + c);
  }
  explicit Buffer(const std::vector<double>& values)
      : n_(1), h_(1), w_(1), c_(static_cast<int>(values.size())), pitch_(c_) {
    data_ = allocate(values.size());
    for (size_t i = 0; i < values.size(); ++i) from_double(values[i], data_.get()[i]);
  }

  T* get() const { return data_.get(); }
  int pitch() const { return pitch_; }
  Image image() const {
    Image x(n_, h_, w_, c_);
    for (size_t i = 0; i < static_cast<size_t>(n_) * h_ * w_; ++i)
      for (int k = 0; k < c_; ++k) x.data[i * c_ + k] = to_double(data_.get()[i * pitch_ + k]);
    return x;
  }
  // Whether everything between the pixels' channels is as it was.
  bool untouched_between() const {
    for (size_t i = 0; i + 1 < static_cast<size_t>(n_) * h_ * w_; ++i)
      for (int k = c_; k < pitch_; ++k)
        if (!std::isnan(to_double(data_.get()[i * pitch_ + k]))) return false;
    return true;
  }

 private:
  struct Free {
    void operator()(T* p) const { free(p); }
  };
  std::unique_ptr<T, Free> allocate(size_t size) {
    void* p = nullptr;
    if (posix_memalign(&p, 16, size * sizeof(T)) != 0) abort();
    std::memset(p, 0xff, size * sizeof(T));
    size_ = size;
    return std::unique_ptr<T, Free>(static_cast<T*>(p));
  }
  int n_, h_, w_, c_, pitch_;
  size_t size_ = 0;
  std::unique_ptr<T, Free> data_;
};

// Scales or shifts. They start where a float may, 4 bytes behind a multiple of 16: sanitizers tell who reads more at a
// time.
class Vector {
 public:
  explicit Vector(const std::vector<double>& values) : buffer_(behind_one(values)) {}
  const float* get() const { return buffer_.get() + 1; }

 private:
  static std::vector<double> behind_one(std::vector<double> values) {
    values.insert(values.begin(), NAN);
    return values;
  }
  Buffer<float> buffer_;
};

// Counts and reports what fails.
struct Report {
  int passed = 0, failed = 0;

  void check(bool ok, const std::string& name, const std::string& why) {
    ++(ok ? passed : failed);
    if (!ok) std::printf("FAILED %s: %s\n", name.c_str(), why.c_str());
  }

  // Bit for bit (NaN equal to NaN, infinities of one sign equal).
  void same(const Image& y, const Image& exact, const std::string& name) {
    for (size_t i = 0; i < exact.data.size(); ++i) {
      const double a = y.data[i], b = exact.data[i];
      if (a == b || (std::isnan(a) && std::isnan(b))) continue;
      const size_t pixel = i / exact.c;
      check(false, name,
            "image " + std::to_string(pixel / (exact.h * exact.w)) + " row " +
                std::to_string(pixel / exact.w % exact.h) + " column " + std::to_string(pixel % exact.w) + " channel " +
                std::to_string(i % exact.c) + ": " + std::to_string(a) + ", expected " + std::to_string(b));
      return;
    }
    check(true, name, "");
  }

  // The parity rule: at most twice the error of the unfused computation, and one rounding of the largest value, in
  // case the unfused one is exact by luck.
  void parity(const Image& y, const Image& exact, const Image& unfused, double epsilon, const std::string& name) {
    double error = 0, allowed = 0, largest = 0;
    for (size_t i = 0; i < exact.data.size(); ++i) {
      if (std::isnan(y.data[i])) return check(false, name, "NaN");
      error = std::max(error, std::abs(y.data[i] - exact.data[i]));
      allowed = std::max(allowed, std::abs(unfused.data[i] - exact.data[i]));
      largest = std::max(largest, std::abs(exact.data[i]));
    }
    check(error <= 2 * allowed + epsilon / 2 * largest, name,
          "error " + std::to_string(error) + ", unfused " + std::to_string(allowed));
  }
};

template <class T>
constexpr double kEpsilon = 0x1p-23;
template <>
inline constexpr double kEpsilon<__nv_bfloat16> = 0x1p-7;
template <>
inline constexpr double kEpsilon<__half> = 0x1p-10;

}  // namespace reference
