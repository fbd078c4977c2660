// The leaf kernels of one instruction set. A kernels_*.cpp defines RF_TABLE (the function to define), RF_ISA and
// RF_NAME, is compiled with that instruction set's flags, and includes this file.
#include "kernels.h"
#include "simd.h"

namespace {

using namespace resnet_fused::cpu;

constexpr int kPanel = 2 * kLanes;  // output channels of a tile; of a narrow one: kLanes

template <bool kValue>
struct Whole {
  static constexpr bool value = kValue;
};
template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

// ---- vectors in memory -----------------------------------------------------------------------------------------
// `count` elements as float32, zeros behind them; whole vectors where kWhole.
template <bool kBf16, bool kWhole>
RF_INLINE Vec load_part(const char* p, int count) {
  constexpr int kElement = kBf16 ? 2 : 4;
  char part[kLanes * kElement] = {};
  if (!kWhole) p = static_cast<const char*>(std::memcpy(part, p, static_cast<size_t>(count) * kElement));
  return kBf16 ? load_bf16(reinterpret_cast<const uint16_t*>(p)) : load(reinterpret_cast<const float*>(p));
}
template <bool kBf16, bool kWhole>
RF_INLINE void store_part(char* p, Vec v, int count) {
  constexpr int kElement = kBf16 ? 2 : 4;
  char part[kLanes * kElement];
  char* const d = kWhole ? p : part;
  if (kBf16)
    store_bf16(reinterpret_cast<uint16_t*>(d), v);
  else
    store(reinterpret_cast<float*>(d), v);
  if (!kWhole) std::memcpy(p, part, static_cast<size_t>(count) * kElement);
}

// ---- epilogue --------------------------------------------------------------------------------------------------
// Scale and shift of a panel. In registers: a store might change them, which would be read again for every pixel.
template <int kVectors>
struct Affine {
  Vec scale[kVectors], shift[kVectors], floor;  // floor: zero for ReLU, else minus infinity
  RF_INLINE explicit Affine(const Epilogue& e) : floor(splat(e.relu ? 0.0f : -__builtin_inff())) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      scale[j] = load(e.scale + j * kLanes);
      shift[j] = load(e.shift + j * kLanes);
    }
  }
};

// One pixel: `r` its residual, `o` its output.
template <bool kBf16, bool kStream, bool kResidual, int kVectors>
RF_INLINE void write_vectors(const Affine<kVectors>& affine, const char* r, char* o, const Vec (&sum)[kVectors]) {
  constexpr int kVectorBytes = kLanes * (kBf16 ? 2 : 4);
  Vec v[kVectors];
#pragma GCC unroll 2
  for (int j = 0; j < kVectors; ++j) {
    v[j] = fma(sum[j], affine.scale[j], affine.shift[j]);
    if (kResidual) v[j] += load_part<kBf16, true>(r + j * kVectorBytes, kLanes);
    v[j] = at_least(affine.floor, v[j]);
  }
  if (kStream && kBf16) {
    stream_bf16_pair(reinterpret_cast<uint16_t*>(o), v[0], v[kVectors - 1]);
    return;
  }
#pragma GCC unroll 2
  for (int j = 0; j < kVectors; ++j) {
    if (kStream)
      stream(reinterpret_cast<float*>(o) + j * kLanes, v[j]);
    else
      store_part<kBf16, true>(o + j * kVectorBytes, v[j], kLanes);
  }
}
// Where a pixel is dropped it goes to a place of its own: if there are some in every row of an image, a branch is
// mispredicted.
template <bool kBf16, bool kStream, bool kResidual, int kVectors>
RF_INLINE void write_pixel(const Epilogue& e, const Affine<kVectors>& affine, ptrdiff_t pixel,
                           const Vec (&sum)[kVectors], char* dropped) {
  if (kStream && pixel < 0) return;
  const char* const r = pixel < 0 ? dropped : e.residual + pixel * e.residual_pitch;
  char* const o = pixel < 0 ? dropped : e.out + pixel * e.out_pitch;
  write_vectors<kBf16, kStream, kResidual>(affine, r, o, sum);
}

// f(type, stream, residual), each a Whole<...>: what an epilogue of full panels is, known when it is compiled.
template <int kVectors, class F>
RF_INLINE void choose_epilogue(const Epilogue& e, F f) {
  constexpr bool kStreamsBf16 = kVectors == 2;  // whole cache lines
  auto of_type = [&](auto bf16) __attribute__((always_inline)) {
    auto of_store = [&](auto stream) __attribute__((always_inline)) {
      e.residual ? f(bf16, stream, Whole<true>{}) : f(bf16, stream, Whole<false>{});
    };
    constexpr bool kCanStream = kStreamsBf16 || !decltype(bf16)::value;
    if (kCanStream && e.stream)
      of_store(Whole<kCanStream>{});
    else
      of_store(Whole<false>{});
  };
  e.bf16 ? of_type(Whole<true>{}) : of_type(Whole<false>{});
}

// The arguments by value: a store may alias what a reference refers to, which is then read again for every row.
template <bool kBf16, bool kStream, bool kResidual, int kVectors>
void epilogue_rows(const EpilogueArgs e) {
  alignas(64) char dropped[kVectors * kLanes * 4] = {};
  const Affine<kVectors> affine(e);
  for (int i = 0; i < e.rows; ++i) {
    Vec sum[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[j] = load(e.c + (i * kVectors + j) * kLanes);
    write_pixel<kBf16, kStream, kResidual>(e, affine, e.dst[i], sum, dropped);
  }
}

// The last panel of a tensor whose channels do not fill it.
template <bool kBf16>
void epilogue_tail(const EpilogueArgs& e) {
  constexpr int kElement = kBf16 ? 2 : 4;
  for (int i = 0; i < e.rows; ++i) {
    const ptrdiff_t pixel = e.dst[i];
    if (pixel < 0) continue;
    const char* const r = e.residual ? e.residual + pixel * e.residual_pitch : nullptr;
    char* const o = e.out + pixel * e.out_pitch;
    auto vector = [&](int j, int count, auto whole) __attribute__((always_inline)) {
      constexpr bool kWhole = decltype(whole)::value;
      Vec v = fma(load(e.c + i * e.panel + j), load(e.scale + j), load(e.shift + j));
      if (r) v += load_part<kBf16, kWhole>(r + j * kElement, count);
      if (e.relu) v = relu(v);
      store_part<kBf16, kWhole>(o + j * kElement, v, count);
    };
    int j = 0;
    for (; j + kLanes <= e.columns; j += kLanes) vector(j, kLanes, Whole<true>{});
    if (j < e.columns) vector(j, e.columns - j, Whole<false>{});
  }
}

template <int kVectors>
void epilogue_whole(const EpilogueArgs& e) {
  choose_epilogue<kVectors>(e, [&](auto bf16, auto stream, auto residual) __attribute__((always_inline)) {
    epilogue_rows<decltype(bf16)::value, decltype(stream)::value, decltype(residual)::value, kVectors>(e);
  });
}
void epilogue(const EpilogueArgs& e) {
  if (e.columns < e.panel)
    e.bf16 ? epilogue_tail<true>(e) : epilogue_tail<false>(e);
  else
    e.panel == kPanel ? epilogue_whole<2>(e) : epilogue_whole<1>(e);
}

// ---- register tile ---------------------------------------------------------------------------------------------
// AVX-512: up to 14 rows x 2 vectors of 16 (28 of 32 registers), or 6 x 4; AVX2: 6 x 2 x 8 (12 of 16); portable: 4 x 2
// x 4. 14 x 2 wastes less at the edges, 6 x 4 takes fewer loads: 10 for 24 products instead of 16 for 28. Narrow: one
// vector and as many registers.
#if defined(__AVX512F__)
constexpr int kSubMax = 7, kWideSub = 3, kNarrowSub = 14;
#elif defined(__AVX2__)
constexpr int kSubMax = 3, kNarrowSub = 6;
#else
constexpr int kSubMax = 2, kNarrowSub = 4;
#endif

// The asm keeps GCC from carrying elements of A between rows and iterations in registers that it does not have.
RF_INLINE Vec broadcast(const char* p) {
#if defined(__AVX512F__)
  __m512 v;
  asm("vbroadcastss %1, %0" : "=v"(v) : "m"(*reinterpret_cast<const float*>(p)));
  return v;
#elif defined(__AVX2__)
  __m256 v;
  asm("vbroadcastss %1, %0" : "=x"(v) : "m"(*reinterpret_cast<const float*>(p)));
  return v;
#else
  float f;
  std::memcpy(&f, p, 4);
  return splat(f);
#endif
}

// c + a * b; apply_at: of the word of A at `a`, for the one product that takes it. In assembly the sum stays in its
// register: GCC 12 moves six of them and spills one every four steps, 2-5% of a layer.
struct F32Product {
  static RF_INLINE void apply(Vec a, Vec b, Vec& c) {
#if defined(__AVX512F__)
    asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
#else
    c = fma(a, b, c);
#endif
  }
  static RF_INLINE void apply_at(const char* a, Vec b, Vec& c) {
#if defined(__AVX512F__)
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*reinterpret_cast<const float*>(a)));
#else
    apply(broadcast(a), b, c);
#endif
  }
};
#if defined(__AVX512BF16__)
struct Bf16Product {
  static RF_INLINE void apply(Vec a, Vec b, Vec& c) { asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); }
  static RF_INLINE void apply_at(const char* a, Vec b, Vec& c) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*reinterpret_cast<const float*>(a)));
  }
};
#endif

template <int Vectors>
constexpr int panels_of() {
  return Vectors > 2 ? 2 : 1;
}
template <int Vectors>
constexpr int columns_of() {  // of a panel
  return Vectors == 1 ? kLanes : kPanel;
}

// The weights of a step: one panel's, or two's where there are four vectors.
template <int Vectors>
RF_INLINE void load_columns(Vec (&columns)[Vectors], const float* const (&b)[panels_of<Vectors>()], int step) {
#pragma GCC unroll 4
  for (int j = 0; j < Vectors; ++j) columns[j] = load(b[j / 2] + step * columns_of<Vectors>() + j % 2 * kLanes);
}

// One step of `Rows` rows, whose sums are from c[first] on. Rows are addressed as three per base pointer (base, base +
// lda, base + 2 * lda), which x86 encodes: 14 rows need 6 pointers and one stride, and fit the 16 general registers.
template <class Product, int Rows, int Vectors, int All>
RF_INLINE void step_of_rows(Vec (&c)[All][Vectors], int first, const char* const (&base)[(Rows + 2) / 3], ptrdiff_t lda,
                            ptrdiff_t offset, const Vec (&columns)[Vectors]) {
#pragma GCC unroll 28
  for (int i = 0; i < Rows; ++i) {
    const char* const p = base[i / 3] + offset + (i % 3) * lda;
    if (Vectors == 1) {
      Product::apply_at(p, columns[0], c[first + i][0]);
      continue;
    }
    const Vec a = broadcast(p);
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) Product::apply(a, columns[j], c[first + i][j]);
  }
}

// `Unroll` steps of k for two sub-tiles.
template <class Product, int Sub, int Vectors, int Unroll>
RF_INLINE void gemm_steps(Vec (&c)[2 * Sub][Vectors], const char* const (&base)[2][(Sub + 2) / 3], ptrdiff_t lda,
                          ptrdiff_t k, const float* const (&b)[panels_of<Vectors>()]) {
#pragma GCC unroll 8
  for (int u = 0; u < Unroll; ++u) {
    Vec columns[Vectors];
    load_columns(columns, b, u);
    step_of_rows<Product, Sub>(c, 0, base[0], lda, k + u * 4, columns);
    step_of_rows<Product, Sub>(c, Sub, base[1], lda, k + u * 4, columns);
  }
}

// In every step: many at once would fill the buffers that the products' own operands come through.
template <class Args>
RF_INLINE void prefetch_lines(const Args& args, const char*& p) {
  if (p >= args.prefetch_end) return;
#pragma GCC unroll 1
  for (int i = 0; i < args.prefetch_lines; ++i, p += 64) __builtin_prefetch(p, 0, 2);
}

template <int Rows, int Vectors>
RF_INLINE void clear(Vec (&c)[Rows][Vectors]) {
#pragma GCC unroll 28
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) c[i][j] = Vec{};
  }
}

// out: of each panel.
template <int Rows, int Vectors>
RF_INLINE void add_from(float* const (&out)[2], Vec (&c)[Rows][Vectors]) {
#pragma GCC unroll 28
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) c[i][j] += load(out[j / 2] + i * columns_of<Vectors>() + j % 2 * kLanes);
  }
}
template <int Rows, int Vectors>
RF_INLINE void store_to(float* const (&out)[2], const Vec (&c)[Rows][Vectors]) {
#pragma GCC unroll 28
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) store(out[j / 2] + i * columns_of<Vectors>() + j % 2 * kLanes, c[i][j]);
  }
}

// `partial`: whether there are sums in memory to add to.
template <int Rows, int Vectors>
RF_INLINE void flush(bool& partial, float* const (&out)[2], Vec (&c)[Rows][Vectors]) {
  if (partial) add_from(out, c);
  store_to(out, c);
  partial = true;
}

// The sums of one panel, whose vectors are from kFirst on, to their pixels. The arguments by value: see epilogue_rows.
template <bool kBf16, bool kStream, bool kResidual, int kFirst, int Rows, int Vectors>
RF_INLINE void write_rows(const Epilogue e, const int32_t* const first, const int32_t* const second,
                          const Vec (&c)[Rows][Vectors]) {
  constexpr int kOfPanel = Vectors == 1 ? 1 : 2;
  alignas(64) char dropped[kOfPanel * kLanes * 4];
  if (!kStream) std::memset(dropped, 0, sizeof dropped);
  const Affine<kOfPanel> affine(e);
#pragma GCC unroll 28
  for (int i = 0; i < Rows; ++i) {
    Vec sum[kOfPanel];
#pragma GCC unroll 2
    for (int j = 0; j < kOfPanel; ++j) sum[j] = c[i][kFirst + j];
    const ptrdiff_t pixel = i < Rows / 2 ? first[i] : second[i - Rows / 2];
    write_pixel<kBf16, kStream, kResidual>(e, affine, pixel, sum, dropped);
  }
}
template <int kFirst, int Rows, int Vectors>
RF_INLINE void write_to_pixels(const GemmArgs& args, const Vec (&c)[Rows][Vectors]) {
  const Epilogue& e = args.epilogue[kFirst / 2];
  choose_epilogue<Vectors == 1 ? 1 : 2>(e, [&](auto bf16, auto stream, auto residual) __attribute__((always_inline)) {
    write_rows<decltype(bf16)::value, decltype(stream)::value, decltype(residual)::value, kFirst>(e, args.dst[0],
                                                                                                  args.dst[1], c);
  });
}

// The end of a tile's products.
template <int Rows, int Vectors>
RF_INLINE void finish(const GemmArgs& args, bool partial, float* const (&out)[2], Vec (&c)[Rows][Vectors]) {
  if (!args.epilogue) {
    flush(partial, out, c);
    return;
  }
  if (partial) add_from(out, c);
  write_to_pixels<0>(args, c);
  if constexpr (Vectors > 2) write_to_pixels<2>(args, c);
}

constexpr int kUnroll = 4;

template <class Product, int Sub, int Vectors>
void gemm(GemmArgs& args) {
  constexpr int kPanels = panels_of<Vectors>(), kColumns = columns_of<Vectors>();
  float* const out[2] = {args.c, args.c2};
  Vec c[2 * Sub][Vectors];
  bool partial = args.accumulate;
  clear(c);
  const ptrdiff_t lda = args.lda;
  const char* ahead = args.prefetch;
  int chain = args.tap_count ? args.taps[0].chain : 0;
  for (int t = 0; t < args.tap_count; ++t) {
    const char* base[2][(Sub + 2) / 3];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 5
      for (int j = 0; j < (Sub + 2) / 3; ++j) base[half][j] = args.a[half] + args.taps[t].a + 3 * j * lda;
    }
    const float* b[kPanels];
    b[0] = reinterpret_cast<const float*>(args.b + args.taps[t].b);
    if (kPanels > 1) b[kPanels - 1] = reinterpret_cast<const float*>(args.b2 + args.taps[t].b);
    for (int k0 = 0; k0 < args.words; k0 += args.segment) {
      if (k0 > 0 || args.taps[t].chain != chain) {
        flush(partial, out, c);
        clear(c);
        chain = args.taps[t].chain;
      }
      int left = args.words - k0 < args.segment ? args.words - k0 : args.segment;
      for (; left >= kUnroll; left -= kUnroll) {
        prefetch_lines(args, ahead);
        gemm_steps<Product, Sub, Vectors, kUnroll>(c, base, lda, 0, b);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 5
          for (int j = 0; j < (Sub + 2) / 3; ++j) base[half][j] += kUnroll * 4;
        }
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) b[p] += kUnroll * kColumns;
      }
#pragma GCC unroll 1
      for (ptrdiff_t k = 0; k < left; ++k) {
        gemm_steps<Product, Sub, Vectors, 1>(c, base, lda, 4 * k, b);
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) b[p] += kColumns;
      }
    }
  }
  finish(args, partial, out, c);
  args.prefetch = ahead;
}

// `Unroll` steps of rows that all have one distance.
template <class Product, int Rows, int Vectors, int Unroll>
RF_INLINE void product_steps(Vec (&c)[Rows][Vectors], const char* const (&base)[(Rows + 2) / 3], ptrdiff_t lda,
                             const float* const (&b)[panels_of<Vectors>()]) {
#pragma GCC unroll 8
  for (int u = 0; u < Unroll; ++u) {
    Vec columns[Vectors];
    load_columns(columns, b, u);
    step_of_rows<Product, Rows>(c, 0, base, lda, u * 4, columns);
  }
}

template <class Product, int Sub, int Vectors>
void product(ProductArgs& args) {
  constexpr int kRows = 2 * Sub, kBases = (kRows + 2) / 3, kPanels = panels_of<Vectors>();
  constexpr int kColumns = columns_of<Vectors>();
  const char* ahead = args.prefetch;
  const ptrdiff_t lda = args.lda;
  for (int f = 0; f < args.frequencies; ++f) {
    const char* a = args.a + f * args.a_frequency;
    const ptrdiff_t weights = ptrdiff_t{f} * args.words * kColumns * 4;
    float* out[2] = {args.c + f * args.c_frequency, kPanels > 1 ? args.c2 + f * args.c_frequency : nullptr};
    for (int64_t tile = 0; tile < args.tiles; ++tile, a += kRows * lda) {
      const char* base[kBases];
#pragma GCC unroll 10
      for (int j = 0; j < kBases; ++j) base[j] = a + 3 * j * lda;
      const float* b[kPanels];
      b[0] = reinterpret_cast<const float*>(args.b + weights);
      if (kPanels > 1) b[kPanels - 1] = reinterpret_cast<const float*>(args.b2 + weights);
      Vec c[kRows][Vectors];
      bool partial = false;
      clear(c);
      auto steps = [&](auto unroll) __attribute__((always_inline)) {
        constexpr int kSteps = decltype(unroll)::value;
        product_steps<Product, kRows, Vectors, kSteps>(c, base, lda, b);
#pragma GCC unroll 10
        for (int j = 0; j < kBases; ++j) base[j] += kSteps * 4;
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) b[p] += kSteps * kColumns;
      };
      for (int k0 = 0; k0 < args.words; k0 += args.segment) {
        if (k0 > 0) {
          flush(partial, out, c);
          clear(c);
        }
        int left = args.words - k0 < args.segment ? args.words - k0 : args.segment;
        for (; left >= kUnroll; left -= kUnroll) {
          prefetch_lines(args, ahead);
          steps(Number<kUnroll>{});
        }
#pragma GCC unroll 1
        for (; left > 0; --left) steps(Number<1>{});
      }
      flush(partial, out, c);
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) out[p] += kRows * kColumns;
    }
  }
  args.prefetch = ahead;
}

// The sums of one panel, whose vectors are from kFirst on, to pixels that follow each other. The arguments by value:
// see epilogue_rows.
template <bool kBf16, bool kStream, bool kResidual, int kFirst, int Rows, int Vectors>
RF_INLINE void write_run(const Epilogue e, ptrdiff_t pixel, const Vec (&c)[Rows][Vectors]) {
  constexpr int kOfPanel = Vectors == 1 ? 1 : 2;
  const Affine<kOfPanel> affine(e);
  const char* r = e.residual + pixel * e.residual_pitch;
  char* o = e.out + pixel * e.out_pitch;
#pragma GCC unroll 28
  for (int i = 0; i < Rows; ++i, r += e.residual_pitch, o += e.out_pitch) {
    Vec sum[kOfPanel];
#pragma GCC unroll 2
    for (int j = 0; j < kOfPanel; ++j) sum[j] = c[i][kFirst + j];
    write_vectors<kBf16, kStream, kResidual>(affine, r, o, sum);
  }
}
template <int kFirst, int Rows, int Vectors>
RF_INLINE void write_run_of(const Epilogue& e, ptrdiff_t pixel, const Vec (&c)[Rows][Vectors]) {
  choose_epilogue<Vectors == 1 ? 1 : 2>(e, [&](auto bf16, auto stream, auto residual) __attribute__((always_inline)) {
    write_run<decltype(bf16)::value, decltype(stream)::value, decltype(residual)::value, kFirst>(e, pixel, c);
  });
}

// Where the output's pixels are: as unsigned numbers of 32 bits, whose division is short.
struct Place {
  uint32_t column;  // in a row of the image
  ptrdiff_t pixel;
  RF_INLINE Place(const PointwiseArgs& args, ptrdiff_t i) {
    const auto p = static_cast<uint32_t>(args.place + i), of_image = static_cast<uint32_t>(args.of_image);
    const auto width = static_cast<uint32_t>(args.width);
    const uint32_t image = p / of_image, q = p % of_image;
    column = q % width;
    pixel = args.first + ptrdiff_t{image} * args.image + ptrdiff_t{q / width} * args.row + column;
  }
};

// The same from memory, of a tile whose pixels do not all follow each other: the end of an image row, or of the run.
// `begin`: of the run, the tile's first pixel, may be negative; those before `written` are not written again.
template <int Rows, int Vectors>
void write_apart(const PointwiseArgs& args, ptrdiff_t begin, ptrdiff_t written) {
  constexpr int kPanels = panels_of<Vectors>(), kColumns = columns_of<Vectors>();
  int32_t dst[Rows];
  for (int i = 0; i < Rows; ++i) {
    const ptrdiff_t pixel = begin + i;
    const bool valid = pixel >= written && pixel < args.pixels;
    dst[i] = valid ? static_cast<int32_t>(Place(args, pixel).pixel) : -1;
  }
  for (int p = 0; p < kPanels; ++p) epilogue({args.epilogue[p], p ? args.c2 : args.c, kColumns, Rows, dst});
}

template <class Product, int Sub, int Vectors>
void pointwise(PointwiseArgs& args) {
  constexpr int kRows = 2 * Sub, kBases = (kRows + 2) / 3, kPanels = panels_of<Vectors>();
  constexpr int kColumns = columns_of<Vectors>();
  const char* ahead = args.prefetch;
  const ptrdiff_t lda = args.lda;
  float* const out[2] = {args.c, args.c2};
  bool whole = true;  // panels
  for (int p = 0; p < kPanels; ++p) whole = whole && args.epilogue[p].columns == kColumns;
  for (ptrdiff_t first = 0, written = 0; written < args.pixels; written += kRows) {
    first = written + kRows <= args.readable ? written : static_cast<ptrdiff_t>(args.readable) - kRows;
    const char* base[kBases];
#pragma GCC unroll 10
    for (int j = 0; j < kBases; ++j) base[j] = args.a + (first + 3 * j) * lda;
    const float* b[kPanels];
    b[0] = reinterpret_cast<const float*>(args.b);
    if (kPanels > 1) b[kPanels - 1] = reinterpret_cast<const float*>(args.b2);
    Vec c[kRows][Vectors];
    bool partial = false;
    clear(c);
    auto steps = [&](auto unroll) __attribute__((always_inline)) {
      constexpr int kSteps = decltype(unroll)::value;
      product_steps<Product, kRows, Vectors, kSteps>(c, base, lda, b);
#pragma GCC unroll 10
      for (int j = 0; j < kBases; ++j) base[j] += kSteps * 4;
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) b[p] += kSteps * kColumns;
    };
    for (int k0 = 0; k0 < args.words; k0 += args.segment) {
      if (k0 > 0) {
        flush(partial, out, c);
        clear(c);
      }
      int left = args.words - k0 < args.segment ? args.words - k0 : args.segment;
      for (; left >= kUnroll; left -= kUnroll) {
        prefetch_lines(args, ahead);
        steps(Number<kUnroll>{});
      }
#pragma GCC unroll 1
      for (; left > 0; --left) steps(Number<1>{});
    }
    if (partial) add_from(out, c);
    const Place place(args, written);
    if (whole && place.column + kRows <= static_cast<uint32_t>(args.width) && first + kRows <= args.pixels &&
        first == written) {
      write_run_of<0>(args.epilogue[0], place.pixel, c);
      if constexpr (Vectors > 2) write_run_of<2>(args.epilogue[1], place.pixel, c);
    } else {
      store_to(out, c);
      write_apart<kRows, Vectors>(args, first, written);
    }
  }
  args.prefetch = ahead;
}

// A kernel row of three taps at once, pixels one step apart: a pixel of A is read once and multiplied by the weights of
// all taps that meet it: 0.4 loads a product, where `gemm` takes 1 with one vector and 0.6 with two. `words` are one
// tap's, and the weights of the row's taps follow each other. 28 rows, three vectors of weights and a broadcast are 32
// registers.
template <int Sub, int Vectors>
void gemm_row(GemmArgs& args) {
  constexpr int kColumns = columns_of<Vectors>();
  float* const out[2] = {args.c, nullptr};
  Vec c[2 * Sub][Vectors];
  bool partial = args.accumulate;
  clear(c);
  const ptrdiff_t lda = args.lda, tap_floats = ptrdiff_t{args.words} * kColumns;
  const char* ahead = args.prefetch;
  int chain = args.tap_count ? args.taps[0].chain : 0;
  for (int t = 0; t < args.tap_count; ++t) {
    const char* a[2] = {args.a[0] + args.taps[t].a, args.a[1] + args.taps[t].a};
    const float* b = reinterpret_cast<const float*>(args.b + args.taps[t].b);
    for (int k0 = 0; k0 < args.words; k0 += args.segment) {
      if (k0 > 0 || args.taps[t].chain != chain) {
        flush(partial, out, c);
        clear(c);
        chain = args.taps[t].chain;
      }
      const int end = args.words - k0 < args.segment ? args.words : k0 + args.segment;
      for (int k = k0; k < end; ++k) {
        prefetch_lines(args, ahead);
        Vec w[kRowTaps][Vectors];
#pragma GCC unroll 3
        for (int x = 0; x < kRowTaps; ++x) {
#pragma GCC unroll 2
          for (int j = 0; j < Vectors; ++j) w[x][j] = load(b + x * tap_floats + j * kLanes);
        }
        const char* p[2] = {a[0], a[1]};
#pragma GCC unroll 16
        for (int i = 0; i < Sub + kRowTaps - 1; ++i) {
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            if (i && i % 3 == 0) p[half] += 3 * lda;
            const Vec pixel = broadcast(p[half] + i % 3 * lda);
#pragma GCC unroll 3
            for (int x = 0; x < kRowTaps; ++x) {
              if (i < x || i - x >= Sub) continue;
#pragma GCC unroll 2
              for (int j = 0; j < Vectors; ++j) F32Product::apply(pixel, w[x][j], c[half * Sub + i - x][j]);
            }
          }
        }
        a[0] += 4;
        a[1] += 4;
        b += kColumns;
      }
    }
  }
  finish(args, partial, out, c);
  args.prefetch = ahead;
}

// ---- AMX tile --------------------------------------------------------------------------------------------------
#if defined(__AMX_BF16__)
// Two sub-tiles of 16 rows by two blocks of 16 columns: four accumulators, two tiles of A, two of B. For a narrow
// panel, one tile of A and one of B are half as deep: 16 channels. Constants in memory: GCC 12's _tile_loadconfig tells
// the compiler of 8 of the 64 bytes that it reads, and the stores into a local one would be dropped.
struct alignas(64) AmxConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const AmxConfig kAmxConfig, kAmxNarrowConfig{
                                .row_bytes = {64, 64, 64, 64, 64, 64, 32, 64},
                                .rows = {16, 16, 16, 16, 16, 16, 16, 8},
                            };
void amx_begin(bool is_narrow) { _tile_loadconfig(is_narrow ? &kAmxNarrowConfig : &kAmxConfig); }
void amx_end() { _tile_release(); }

template <int Count>
RF_INLINE void prefetch_amx_rows(const char* p, ptrdiff_t pitch) {
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) __builtin_prefetch(p + i * pitch, 0, 3);
}

// While another thread runs on the core, loads run ahead of products only if not all eight tile registers hold
// something (one set to zero, or never loaded, does not): seven of them take 1 / 1.4 of the time.
// The hardware does not prefetch for tile loads; asking for the operands two steps ahead takes 10-40% off a block.
void gemm_amx(GemmArgs& args) {
  constexpr int kRowBytes = kPanel * 4, kStepBytes = 16 * kRowBytes, kAhead = 2;
  if (args.accumulate) {
    _tile_loadd(0, args.c, kRowBytes);
    _tile_loadd(1, args.c + 16, kRowBytes);
    _tile_loadd(2, args.c + 16 * kPanel, kRowBytes);
    _tile_loadd(3, args.c + 16 * kPanel + 16, kRowBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const char* ahead = args.prefetch;
  for (int t = 0; t < args.tap_count; ++t) {
    const char* a0 = args.a[0] + args.taps[t].a;
    const char* a1 = args.a[1] + args.taps[t].a;
    const char* b = args.b + args.taps[t].b;
    for (int k = 0; k < args.words; k += 16) {
      prefetch_lines(args, ahead);
      _tile_loadd(5, b, kRowBytes);
      _tile_loadd(6, b + 64, kRowBytes);
      _tile_loadd(4, a0, args.lda);
      prefetch_amx_rows<8>(a0 + kAhead * 64, args.lda);
      prefetch_amx_rows<8>(b + kAhead * kStepBytes, 64);
      _tile_dpbf16ps(0, 4, 5);
      prefetch_amx_rows<8>(a0 + 8 * args.lda + kAhead * 64, args.lda);
      prefetch_amx_rows<8>(b + kAhead * kStepBytes + 8 * 64, 64);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(4, a1, args.lda);
      prefetch_amx_rows<8>(a1 + kAhead * 64, args.lda);
      prefetch_amx_rows<8>(b + kAhead * kStepBytes + 16 * 64, 64);
      _tile_dpbf16ps(2, 4, 5);
      prefetch_amx_rows<8>(a1 + 8 * args.lda + kAhead * 64, args.lda);
      prefetch_amx_rows<8>(b + kAhead * kStepBytes + 24 * 64, 64);
      _tile_dpbf16ps(3, 4, 6);
      a0 += 64;
      a1 += 64;
      b += kStepBytes;
    }
  }
  _tile_stored(0, args.c, kRowBytes);
  _tile_stored(1, args.c + 16, kRowBytes);
  _tile_stored(2, args.c + 16 * kPanel, kRowBytes);
  _tile_stored(3, args.c + 16 * kPanel + 16, kRowBytes);
  args.prefetch = ahead;
}

// Two sub-tiles of 32 rows by one block of columns: four accumulators, each of which waits for its last product. Steps
// of 16 words, then, where that is what each tap has left, of 8: after each other and not in turns, so that six tile
// registers hold something at a time (see gemm_amx) and not eight.
void gemm_amx_narrow(GemmArgs& args) {
  constexpr int kRowBytes = kLanes * 4, kStepBytes = 16 * kRowBytes, kTileFloats = 16 * kLanes;
  if (args.accumulate) {
    _tile_loadd(0, args.c, kRowBytes);
    _tile_loadd(1, args.c + kTileFloats, kRowBytes);
    _tile_loadd(2, args.c + 2 * kTileFloats, kRowBytes);
    _tile_loadd(3, args.c + 3 * kTileFloats, kRowBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const ptrdiff_t lower = 16 * args.lda;
  const int whole = args.words / 16 * 16;
  const char* ahead = args.prefetch;
  for (int t = 0; t < args.tap_count; ++t) {
    const char* a0 = args.a[0] + args.taps[t].a;
    const char* a1 = args.a[1] + args.taps[t].a;
    const char* b = args.b + args.taps[t].b;
    for (int k = 0; k < whole; k += 16) {
      prefetch_lines(args, ahead);
      _tile_loadd(5, b, kRowBytes);
      _tile_loadd(4, a0, args.lda);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(4, a0 + lower, args.lda);
      _tile_dpbf16ps(1, 4, 5);
      _tile_loadd(4, a1, args.lda);
      _tile_dpbf16ps(2, 4, 5);
      _tile_loadd(4, a1 + lower, args.lda);
      _tile_dpbf16ps(3, 4, 5);
      a0 += 64;
      a1 += 64;
      b += kStepBytes;
    }
  }
  if (whole < args.words) {
    _tile_zero(4);
    _tile_zero(5);
    for (int t = 0; t < args.tap_count; ++t) {
      const char* a0 = args.a[0] + args.taps[t].a + whole * 4;
      const char* a1 = args.a[1] + args.taps[t].a + whole * 4;
      _tile_loadd(7, args.b + args.taps[t].b + whole * kRowBytes, kRowBytes);
      _tile_loadd(6, a0, args.lda);
      _tile_dpbf16ps(0, 6, 7);
      _tile_loadd(6, a0 + lower, args.lda);
      _tile_dpbf16ps(1, 6, 7);
      _tile_loadd(6, a1, args.lda);
      _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(6, a1 + lower, args.lda);
      _tile_dpbf16ps(3, 6, 7);
    }
    _tile_zero(6);
    _tile_zero(7);
  }
  _tile_stored(0, args.c, kRowBytes);
  _tile_stored(1, args.c + kTileFloats, kRowBytes);
  _tile_stored(2, args.c + 2 * kTileFloats, kRowBytes);
  _tile_stored(3, args.c + 3 * kTileFloats, kRowBytes);
  args.prefetch = ahead;
}
#endif

// ---- prologue --------------------------------------------------------------------------------------------------
template <bool kBf16In, bool kBf16Out, bool kAverage, bool kWhole>
RF_INLINE void prologue_vector(const PrologueArgs& p, const char* x, char* out, int channel, int count) {
  const Vec scale = load(p.scale + channel), shift = load(p.shift + channel);
  auto activated = [&](const char* from) __attribute__((always_inline)) {
    return relu(fma(load_part<kBf16In, kWhole>(from, count), scale, shift));
  };
  Vec y = activated(x);
  if (kAverage) {
    const char* const below = x + p.below;
    y = ((y + activated(x + p.pitch)) + (activated(below) + activated(below + p.pitch))) * splat(0.25f);
  }
  if (kBf16In && !kBf16Out) y = widen(to_bf16(y));
  store_part<kBf16Out, kWhole>(out, y, count);
}

// Two whole vectors of bfloat16.
RF_INLINE void prologue_pair(const PrologueArgs& p, const char* x, char* out, int channel) {
  Vec y[2];
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    const int from = channel + j * kLanes;
    y[j] = relu(fma(load_part<true, true>(x + 2 * from, kLanes), load(p.scale + from), load(p.shift + from)));
  }
  store_bf16_pair(reinterpret_cast<uint16_t*>(out) + channel, y[0], y[1]);
}

template <bool kBf16In, bool kBf16Out, bool kAverage>
void prologue_rows(const PrologueArgs& p) {
  constexpr int kIn = kBf16In ? 2 : 4, kOut = kBf16Out ? 2 : 4;
  const ptrdiff_t written = ptrdiff_t{p.channels} * kOut;
  for (int i = 0; i < p.rows; ++i) {
    const char* const x = p.x + (p.pixels ? p.pixels[i] : i) * p.pitch;
    char* const out = p.out + i * p.out_pitch;
    int v = 0;
    if (kBf16Out && !kAverage)
      for (; v + 2 * kLanes <= p.channels; v += 2 * kLanes) prologue_pair(p, x, out, v);
    for (; v + kLanes <= p.channels; v += kLanes)
      prologue_vector<kBf16In, kBf16Out, kAverage, true>(p, x + v * kIn, out + v * kOut, v, kLanes);
    if (v < p.channels)
      prologue_vector<kBf16In, kBf16Out, kAverage, false>(p, x + v * kIn, out + v * kOut, v, p.channels - v);
    if (written < p.bytes) std::memset(out + written, 0, static_cast<size_t>(p.bytes - written));
  }
}

template <bool kAverage>
void prologue_typed(const PrologueArgs& p) {
  if (!p.bf16_in)
    prologue_rows<false, false, kAverage>(p);
  else
    p.bf16_out ? prologue_rows<true, true, kAverage>(p) : prologue_rows<true, false, kAverage>(p);
}

// x as it is. Of the same type not through float32: a NaN keeps its bits.
void copy_rows(const PrologueArgs& p) {
  constexpr ptrdiff_t kChunk = 64;
  const ptrdiff_t written = ptrdiff_t{p.channels} * (p.bf16_in ? 2 : 4);
  for (int i = 0; i < p.rows; ++i) {
    const char* const x = p.x + (p.pixels ? p.pixels[i] : i) * p.pitch;
    char* const out = p.out + i * p.out_pitch;
    ptrdiff_t b = 0;
    for (; b + kChunk <= written; b += kChunk) std::memcpy(out + b, x + b, kChunk);
    if (b < written) std::memcpy(out + b, x + b, static_cast<size_t>(written - b));
    if (written < p.bytes) std::memset(out + written, 0, static_cast<size_t>(p.bytes - written));
  }
}
void widen_rows(const PrologueArgs& p) {
  const ptrdiff_t written = ptrdiff_t{p.channels} * 4;
  for (int i = 0; i < p.rows; ++i) {
    const char* const x = p.x + (p.pixels ? p.pixels[i] : i) * p.pitch;
    char* const out = p.out + i * p.out_pitch;
    int v = 0;
    for (; v + kLanes <= p.channels; v += kLanes)
      store_part<false, true>(out + v * 4, load_part<true, true>(x + v * 2, kLanes), kLanes);
    const int rest = p.channels - v;
    if (rest) store_part<false, false>(out + v * 4, load_part<true, false>(x + v * 2, rest), rest);
    if (written < p.bytes) std::memset(out + written, 0, static_cast<size_t>(p.bytes - written));
  }
}

void prologue(const PrologueArgs& p) {
  if (p.scale)
    p.below ? prologue_typed<true>(p) : prologue_typed<false>(p);
  else
    p.bf16_in == p.bf16_out ? copy_rows(p) : widen_rows(p);
}

// ---- Winograd --------------------------------------------------------------------------------------------------
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015 (F(2x2, 3x3): points 0, 1, -1, inf).
// F(4x4, 3x3) takes the points 0, 1, -1, 2, -1/2, inf: a third of the error of the usual 0, 1, -1, 2, -2, inf
// (Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution", 2018), as many operations.
template <int kM>
struct Winograd;

template <>
struct Winograd<2> {
  static RF_INLINE void in(const Vec (&d)[4], Vec (&o)[4]) {
    o[0] = d[0] - d[2];
    o[1] = d[1] + d[2];
    o[2] = d[2] - d[1];
    o[3] = d[1] - d[3];
  }
  static RF_INLINE void out(const Vec (&m)[4], Vec (&o)[2]) {
    o[0] = m[0] + m[1] + m[2];
    o[1] = m[1] - m[2] - m[3];
  }
};

template <>
struct Winograd<4> {
  static RF_INLINE void in(const Vec (&d)[6], Vec (&o)[6]) {
    const Vec even = d[4] - d[2], odd = d[3] - d[1];
    o[0] = fma(splat(-1.5f), odd, d[0] - d[2] + even);
    o[1] = fma(splat(-1.5f), d[2], fma(splat(-0.5f), d[3], even - d[1]));
    o[2] = fma(splat(1.5f), d[2], fma(splat(-2.5f), d[3], even + d[1]));
    o[3] = fma(splat(0.5f), odd, even);
    o[4] = fma(splat(-2.0f), odd, even);
    o[5] = fma(splat(-1.5f), even, d[5] - d[3] - odd);
  }
  static RF_INLINE void out(const Vec (&m)[6], Vec (&o)[4]) {
    const Vec sum = m[1] + m[2], difference = m[1] - m[2];
    o[0] = (m[0] + sum) + (m[3] + m[4]);
    o[1] = fma(splat(2.0f), m[3], fma(splat(-0.5f), m[4], difference));
    o[2] = fma(splat(4.0f), m[3], fma(splat(0.25f), m[4], sum));
    o[3] = fma(splat(8.0f), m[3], fma(splat(-0.125f), m[4], difference)) + m[5];
  }
};

// Two columns of pixels are also those of the tile beside, and are transformed once.
template <int kM, bool kBf16>
void winograd_in(const WinogradIn& args) {
  constexpr int kT = kM + 2, kElement = kBf16 ? 2 : 4;
  const WinogradIn w = args;  // a store may alias what a reference refers to
  for (int v = 0; v < w.channels; v += kLanes) {
    const char* src = w.src + v * kElement;
    char* dst = w.dst + v * kElement;
    Vec columns[kT][kT];  // [column][frequency along y]
    auto transform = [&](int x) __attribute__((always_inline)) {
      Vec d[kT];
#pragma GCC unroll 6
      for (int y = 0; y < kT; ++y) d[y] = load_part<kBf16, true>(src + y * w.row + x * w.pixel, kLanes);
      Winograd<kM>::in(d, columns[x]);
    };
    transform(0);
    transform(1);
    for (int tile = 0; tile < w.tiles; ++tile, src += kM * w.pixel, dst += w.tile) {
#pragma GCC unroll 6
      for (int x = 2; x < kT; ++x) transform(x);
#pragma GCC unroll 6
      for (int y = 0; y < kT; ++y) {
        Vec d[kT], o[kT];
#pragma GCC unroll 6
        for (int x = 0; x < kT; ++x) d[x] = columns[x][y];
        Winograd<kM>::in(d, o);
#pragma GCC unroll 6
        for (int x = 0; x < kT; ++x) store_part<kBf16, true>(dst + (y * kT + x) * w.frequency, o[x], kLanes);
      }
#pragma GCC unroll 6
      for (int y = 0; y < kT; ++y) {
        columns[0][y] = columns[kM][y];
        columns[1][y] = columns[kM + 1][y];
      }
    }
  }
}
// The pixels of one tile, a vector of channels of each.
template <int kM, int kVectors>
RF_INLINE void winograd_tile(const float* src, ptrdiff_t frequency, int vector, Vec (&pixels)[kM * kM][kVectors]) {
  constexpr int kT = kM + 2;
  Vec columns[kT][kM];  // [frequency along x][row]
#pragma GCC unroll 6
  for (int x = 0; x < kT; ++x) {
    Vec m[kT];
#pragma GCC unroll 6
    for (int y = 0; y < kT; ++y) m[y] = load(src + (y * kT + x) * frequency + vector * kLanes);
    Winograd<kM>::out(m, columns[x]);
  }
#pragma GCC unroll 4
  for (int y = 0; y < kM; ++y) {
    Vec m[kT], o[kM];
#pragma GCC unroll 6
    for (int x = 0; x < kT; ++x) m[x] = columns[x][y];
    Winograd<kM>::out(m, o);
#pragma GCC unroll 4
    for (int x = 0; x < kM; ++x) pixels[y * kM + x][vector] = o[x];
  }
}

// Where pixel y, x of a tile goes; negative: it is dropped.
template <int kM>
RF_INLINE int32_t winograd_pixel(const WinogradOut& w, int tile, int y, int x) {
  return y < w.rows && tile * kM + x < w.columns ? w.pixel + y * w.row + tile * kM + x : -1;
}

// The arguments by value: see epilogue_rows.
template <int kM, bool kBf16, bool kStream, bool kResidual, int kVectors>
void winograd_out_row(const WinogradOut w, const Epilogue e) {
  alignas(64) char dropped[kVectors * kLanes * 4] = {};
  const Affine<kVectors> affine(e);
  const float* src = w.src;
  for (int tile = 0; tile < w.tiles; ++tile, src += kVectors * kLanes) {
    Vec pixels[kM * kM][kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) winograd_tile<kM>(src, w.frequency, j, pixels);
#pragma GCC unroll 4
    for (int y = 0; y < kM; ++y) {
#pragma GCC unroll 4
      for (int x = 0; x < kM; ++x)
        write_pixel<kBf16, kStream, kResidual>(e, affine, winograd_pixel<kM>(w, tile, y, x), pixels[y * kM + x],
                                               dropped);
    }
  }
}

template <int kM, int kVectors>
void winograd_out_whole(const WinogradOut& w, const Epilogue& e) {
  choose_epilogue<kVectors>(e, [&](auto bf16, auto stream, auto residual) __attribute__((always_inline)) {
    winograd_out_row<kM, decltype(bf16)::value, decltype(stream)::value, decltype(residual)::value, kVectors>(w, e);
  });
}
// A panel that is not full.
template <int kM, int kVectors>
void winograd_out_tail(const WinogradOut& w, const Epilogue& e) {
  constexpr int kPixels = kM * kM;
  Vec pixels[kPixels][kVectors];
  int32_t dst[kPixels];
  EpilogueArgs args;
  static_cast<Epilogue&>(args) = e;
  args.c = reinterpret_cast<const float*>(pixels);
  args.panel = w.panel;
  args.rows = kPixels;
  args.dst = dst;
  for (int tile = 0; tile < w.tiles; ++tile) {
    for (int j = 0; j < kVectors; ++j) winograd_tile<kM>(w.src + tile * w.panel, w.frequency, j, pixels);
    for (int i = 0; i < kPixels; ++i) dst[i] = winograd_pixel<kM>(w, tile, i / kM, i % kM);
    epilogue(args);
  }
}
template <int kM>
void winograd_out(const WinogradOut& w, const Epilogue& e) {
  if (e.columns < w.panel)
    w.panel == kPanel ? winograd_out_tail<kM, 2>(w, e) : winograd_out_tail<kM, 1>(w, e);
  else
    w.panel == kPanel ? winograd_out_whole<kM, 2>(w, e) : winograd_out_whole<kM, 1>(w, e);
}

// ---- max pooling -----------------------------------------------------------------------------------------------
// `kVectors` vectors of channels, or `count` channels where that is less than one; kRows rows, or p.rows. Where windows
// overlap by one pixel, as those of 3x3 and stride 2, its column is reduced once.
template <bool kBf16, int kVectors, int kRows, bool kWhole>
void max_pool_vectors(const MaxPoolArgs p, int channel, int count) {
  const int rows = kRows ? kRows : p.rows;
  Vec column[kVectors] = {};  // the largest of a column of pixels
  auto reduce = [&](int x) __attribute__((always_inline)) {
    auto pixel = [&](int row, int j) __attribute__((always_inline)) {
      const float* const v = p.x + row * p.row + x * p.pixel + channel + j * kLanes;
      return load_part<false, kWhole>(reinterpret_cast<const char*>(v), count);
    };
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) column[j] = pixel(0, j);
#pragma GCC unroll 3
    for (int r = 1; r < rows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) column[j] = max_nan(column[j], pixel(r, j));
    }
  };
  char* out = p.out + channel * (kBf16 ? 2 : 4);
  for (int i = 0, reduced = 0; i < p.windows; ++i, out += p.out_pitch) {
    const int left = i * p.stride - p.pad, right = left + p.kernel;
    int x = left > 0 ? left : 0;
    const int end = right < p.width ? right : p.width;
    if (x != reduced - 1) reduce(x);
    Vec largest[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) largest[j] = column[j];
    while (++x < end) {
      reduce(x);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) largest[j] = max_nan(largest[j], column[j]);
    }
    reduced = end;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store_part<kBf16, kWhole>(out + j * kLanes * (kBf16 ? 2 : 4), largest[j], count);
  }
}

template <bool kBf16, int kRows>
void max_pool_typed(const MaxPoolArgs& p) {
  constexpr int kVectors = 4;
  int c = 0;
  for (; c + kVectors * kLanes <= p.channels; c += kVectors * kLanes)
    max_pool_vectors<kBf16, kVectors, kRows, true>(p, c, kLanes);
  for (; c + kLanes <= p.channels; c += kLanes) max_pool_vectors<kBf16, 1, kRows, true>(p, c, kLanes);
  if (c < p.channels) max_pool_vectors<kBf16, 1, kRows, false>(p, c, p.channels - c);
}
void max_pool(const MaxPoolArgs& p) {
  if (p.rows == 3)
    p.bf16 ? max_pool_typed<true, 3>(p) : max_pool_typed<false, 3>(p);
  else
    p.bf16 ? max_pool_typed<true, 0>(p) : max_pool_typed<false, 0>(p);
}

// ---- the end of a classifier -----------------------------------------------------------------------------------
// `kVectors` vectors of channels, or `count` channels where that is less than one.
template <bool kBf16, int kVectors, bool kWhole>
RF_INLINE void mean_vectors(const MeanArgs& m, int64_t channel, int count) {
  constexpr int kElement = kBf16 ? 2 : 4;
  const char* x = m.x + channel * kElement;
  Vec total[kVectors] = {};
  for (int64_t done = 0; done < m.pixels; done += m.chain) {
    Vec sum[kVectors] = {};
    const int64_t end = done + m.chain < m.pixels ? done + m.chain : m.pixels;
    for (int64_t i = done; i < end; ++i, x += m.pitch) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[j] += load_part<kBf16, kWhole>(x + j * kLanes * kElement, count);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) total[j] += sum[j];
  }
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j)
    store_part<false, kWhole>(reinterpret_cast<char*>(m.out + channel + j * kLanes),
                              total[j] / splat(static_cast<float>(m.pixels)), count);
}

template <bool kBf16>
void mean_typed(const MeanArgs& m) {
  constexpr int kVectors = 8;  // additions in flight: two a cycle, of four cycles each
  int64_t c = 0;
  for (; c + kVectors * kLanes <= m.channels; c += kVectors * kLanes) mean_vectors<kBf16, kVectors, true>(m, c, kLanes);
  for (; c + kLanes <= m.channels; c += kLanes) mean_vectors<kBf16, 1, true>(m, c, kLanes);
  if (c < m.channels) mean_vectors<kBf16, 1, false>(m, c, static_cast<int>(m.channels - c));
}
void mean(const MeanArgs& m) { m.bf16 ? mean_typed<true>(m) : mean_typed<false>(m); }

// Products that a lane adds up in one chain; the chains are added up after that.
constexpr int kSegment = 32;
#if defined(__AVX512F__)
constexpr int kLinearImages = 4;  // 16 sums, 4 vectors of weights
#else
constexpr int kLinearImages = 2;
#endif

template <bool kBf16, int kRows, int kImages>
RF_INLINE void linear_tile(const LinearArgs& l, int64_t image) {
  constexpr int kElement = kBf16 ? 2 : 4;
  const ptrdiff_t ldw = l.channels * kElement;
  const float* const x = l.x + image * l.ldx;
  Vec total[kImages][kRows] = {};
  auto step = [&](Vec(&sum)[kImages][kRows], int64_t c, int count, auto whole) __attribute__((always_inline)) {
    constexpr bool kWhole = decltype(whole)::value;
    Vec w[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) w[r] = load_part<kBf16, kWhole>(l.weight + r * ldw + c * kElement, count);
#pragma GCC unroll 4
    for (int i = 0; i < kImages; ++i) {
      const Vec v = load_part<false, kWhole>(reinterpret_cast<const char*>(x + i * l.ldx + c), count);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[i][r] = fma(v, w[r], sum[i][r]);
    }
  };
  for (int64_t c = 0; c < l.channels;) {
    Vec sum[kImages][kRows] = {};
    const int64_t whole = c + kSegment * kLanes <= l.channels ? c + kSegment * kLanes : l.channels / kLanes * kLanes;
    for (; c < whole; c += kLanes) {
      if (image == 0 && c * kElement % 64 == 0) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) __builtin_prefetch(l.weight + r * ldw + c * kElement + l.ahead, 0, 2);
      }
      step(sum, c, kLanes, Whole<true>{});
    }
    if (l.channels - c < kLanes && c < l.channels) {
      step(sum, c, static_cast<int>(l.channels - c), Whole<false>{});
      c = l.channels;
    }
#pragma GCC unroll 4
    for (int i = 0; i < kImages; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) total[i][r] += sum[i][r];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kImages; ++i) {
    const Vec rows[4] = {total[i][0], total[i][1 % kRows], total[i][2 % kRows], total[i][3 % kRows]};
    float sums[4];
    sums_of(rows, sums);
    float y[kLanes] = {};
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) y[r] = sums[r] + (l.bias ? l.bias[r] : 0);
    store_part<kBf16, false>(l.out + (image + i) * l.out_pitch, load(y), kRows);
  }
}

template <bool kBf16, int kRows>
void linear_rows(const LinearArgs& l) {
  int64_t i = 0;
  for (; i + kLinearImages <= l.images; i += kLinearImages) linear_tile<kBf16, kRows, kLinearImages>(l, i);
  for (; i < l.images; ++i) linear_tile<kBf16, kRows, 1>(l, i);
}
template <bool kBf16>
void linear_typed(LinearArgs l) {
  if (l.rows == kLinearRows) return linear_rows<kBf16, kLinearRows>(l);
  constexpr int kElement = kBf16 ? 2 : 4;
  for (; l.rows > 0; --l.rows) {
    linear_rows<kBf16, 1>(l);
    l.weight += l.channels * kElement;
    l.out += kElement;
    if (l.bias) ++l.bias;
  }
}
void linear(const LinearArgs& l) { l.bf16 ? linear_typed<true>(l) : linear_typed<false>(l); }

// What begin and end do without AMX.
[[maybe_unused]] void nothing() {}
[[maybe_unused]] void nothing(bool) {}

constexpr void add(Tiles& tiles, int sub, GemmFn gemm) {
  tiles.of_height[sub] = gemm;
  if (sub > tiles.tallest) tiles.tallest = sub;
}
template <class Product, int Vectors, int... Subs>
constexpr Tiles tiles() {
  Tiles t{};
  (add(t, Subs, gemm<Product, Subs, Vectors>), ...);
  ((t.product_of_height[Subs] = product<Product, Subs, Vectors>), ...);
  ((t.pointwise_of_height[Subs] = pointwise<Product, Subs, Vectors>), ...);
  return t;
}
template <int Vectors, int... Subs>
constexpr Tiles row_tiles() {
  Tiles t{};
  (add(t, Subs, gemm_row<Subs, Vectors>), ...);
  return t;
}

constexpr Kernels make_table() {
  Kernels k{};
  k.isa = RF_ISA;
  k.name = RF_NAME;
  k.panel = kPanel;
  k.narrow = kLanes;
  k.bf16_word_multiple = k.bf16_narrow_multiple = 1;
  k.f32_step = k.bf16_step = kUnroll;
  k.begin = nothing;
  k.end = nothing;
#if defined(__AVX512F__)
  k.f32 = tiles<F32Product, 2, 4, 5, 6, kSubMax>();
  k.f32_narrow = tiles<F32Product, 1, 4, 6, 7, 8, 10, 12, kNarrowSub>();
  k.f32_row = row_tiles<2, 4, 5, 6>();
  k.f32_narrow_row = row_tiles<1, 4, 6, 7, 8, 10, 12, kNarrowSub>();
  k.wide_sub = kWideSub;
  k.gemm_f32_wide = gemm<F32Product, kWideSub, 4>;
  k.product_f32_wide = product<F32Product, kWideSub, 4>;
  k.pointwise_f32_wide = pointwise<F32Product, kWideSub, 4>;
#else
  k.f32 = tiles<F32Product, 2, kSubMax>();
  k.f32_narrow = tiles<F32Product, 1, kNarrowSub>();
  k.f32_narrow_row = row_tiles<1, kNarrowSub>();
#endif
#if defined(__AMX_BF16__)
  add(k.bf16, 16, gemm_amx);
  add(k.bf16_narrow, 32, gemm_amx_narrow);
  k.bf16.to_memory = k.bf16_narrow.to_memory = true;
  k.bf16_word_multiple = 16;
  k.bf16_narrow_multiple = 8;
  k.bf16_step = 16;
  k.begin = amx_begin;
  k.end = amx_end;
#elif defined(__AVX512BF16__)
  k.bf16 = tiles<Bf16Product, 2, 4, 5, 6, kSubMax>();
  k.bf16_narrow = tiles<Bf16Product, 1, 4, 6, 7, 8, 10, 12, kNarrowSub>();
  k.winograd_in_bf16 = winograd_in<2, true>;
#endif
  k.epilogue = epilogue;
  k.prologue = prologue;
  k.winograd_in[0] = winograd_in<2, false>;
  k.winograd_in[1] = winograd_in<4, false>;
  k.winograd_out[0] = winograd_out<2>;
  k.winograd_out[1] = winograd_out<4>;
  k.max_pool = max_pool;
  k.mean = mean;
  k.linear = linear;
  return k;
}

constexpr Kernels kTable = make_table();

}  // namespace

namespace resnet_fused::cpu {
const Kernels& RF_TABLE() { return kTable; }
}  // namespace resnet_fused::cpu
