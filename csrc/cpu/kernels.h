// The leaf kernels: everything that depends on the instruction set, behind one table of function pointers.
//
// One source (kernels_impl.h) is compiled once per instruction set (kernels_*.cpp), each with its own compiler
// flags; the loops around the leaves (chain.cpp, dense.cpp) are compiled once, without any. No std container is used
// inside the leaves: a template instantiated there with AVX-512 flags could be picked by the linker for everybody.
#pragma once
#include <cstddef>
#include <cstdint>

// What the Python bindings, a library of their own, call in this one.
#define RF_EXPORT __attribute__((visibility("default")))

namespace resnet_fused::cpu {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };
constexpr int kIsaCount = 5;

constexpr int kMaxPanel = 32;    // widest panel of output channels of any instruction set
constexpr int kMaxSubTile = 32;  // tallest half of a register tile of any instruction set
constexpr int kMaxTileRows = 2 * kMaxSubTile;
constexpr int kRowTaps = 3;  // of a kernel row that is one tap

// One tap of the convolution window: byte offsets of its operands from the tile's and the panel's start, and the chain
// that it is added up in. The same one whether or not taps before it are left out, so that all tiles round alike.
struct Tap {
  ptrdiff_t a, b;
  int chain;
};

// What becomes of a panel of sums: out[pixel] = relu?(sum * scale + shift + residual[pixel]).
struct Epilogue {
  int columns;         // valid ones of the panel; scratch outputs take the whole panel
  const float* scale;  // [panel], padded with zeros
  const float* shift;
  const char* residual;      // addressed like out, or null; may be out itself
  ptrdiff_t residual_pitch;  // bytes between pixels
  char* out;
  ptrdiff_t out_pitch;  // bytes between pixels
  bool bf16;            // residual and out
  bool relu;
  bool stream;  // non-temporal stores: out is 64-byte aligned and takes whole cache lines
};
// The same of sums in memory: row i of c goes to pixel dst[i]; negative: is dropped.
struct EpilogueArgs : Epilogue {
  const float* c;  // [rows][panel]
  int panel;
  int rows;
  const int32_t* dst;
};

// c[2 * rows][panel] (+)= sum over taps and k of a[row][tap.a + k] * b[tap.b + k][panel]. A panel is two vectors wide,
// or one: layers of few output channels would waste the second.
// A row of A is `words` consecutive 32-bit words: one float32, or two bfloat16. Rows come in two sub-tiles, each with
// a start of its own and one common distance between rows: two rows of a 7-pixel-wide image make one 14-row tile.
// Where a tap is a kernel row of kRowTaps (`f32_row`), its pixels are `lda` apart, and its weights follow each other.
struct GemmArgs {
  const char* a[2];
  ptrdiff_t lda;  // bytes between rows of a sub-tile
  const Tap* taps;
  int tap_count;
  int words;  // per tap, or per pixel of a kernel row
  const char* b;
  float* c;
  const char* b2;  // the next panel and its results: wide tiles only
  float* c2;
  bool accumulate;
  int segment;  // words of a tap that are added up in one chain; the chains are added in memory (float32 only)
  // Of each panel, whose columns are all valid: the sums go from the registers to pixels, not to c, which may still
  // take those of chains. null: to c; always where the tiles say `to_memory`.
  const Epilogue* epilogue;
  const int32_t* dst[2];  // of each sub-tile: the pixels of its rows; negative: dropped
  // Into L2 meanwhile, `prefetch_lines` cache lines a step of products; moved on past those that were asked for.
  const char *prefetch, *prefetch_end;
  int prefetch_lines;
};
using GemmFn = void (*)(GemmArgs&);

// c[row][panel] = sum over k of a[row][k] * b[k][panel], for the rows of `tiles` tiles that follow each other, of each
// frequency: Winograd's products are short (32 words, 16 in bfloat16, in CIFAR ResNet-56), and a call of GemmFn for
// each tile takes 2 to 7% of such a stage.
struct ProductArgs {
  int frequencies;
  int64_t tiles;
  const char* a;
  ptrdiff_t lda;          // bytes between rows
  ptrdiff_t a_frequency;  // bytes between frequencies
  int words;              // of a row
  const char* b;          // frequencies follow each other
  float* c;
  ptrdiff_t c_frequency;  // floats between frequencies
  const char* b2;         // the next panel and its results: wide tiles only
  float* c2;
  int segment;  // as in GemmArgs, as are these
  const char *prefetch, *prefetch_end;
  int prefetch_lines;
};
using ProductFn = void (*)(ProductArgs&);

// A 1x1 convolution of a run of pixels that lie one after the other: all tiles of a panel in one call, their sums to
// their pixels from the registers. Its sums are short (16 words in pre-activation ResNet-164): what a call of GemmFn
// for each tile takes, and that the end of a tile does not overlap with the products of the next one, is up to 0.7 of
// them.
struct PointwiseArgs {
  const char* a;
  ptrdiff_t lda;  // bytes between pixels
  int pixels;
  int64_t readable;  // pixels from `a` on, at least `pixels`; before them there are as many as a tile has
  int words;
  const char *b, *b2;        // b2: of the next panel, wide tiles only
  const Epilogue* epilogue;  // of each panel; columns may be missing
  // Pixel i goes to pixel first + p / of_image * image + p % of_image / width * row + p % of_image % width, p being
  // place + i: an image's rows of `width` pixels need not follow each other, nor need the images.
  int32_t first, row, image;
  int width, of_image, place;
  float *c, *c2;  // room for the sums of a tile
  int segment;    // as in GemmArgs, as are these
  const char *prefetch, *prefetch_end;
  int prefetch_lines;
};
using PointwiseFn = void (*)(PointwiseArgs&);

// Register tiles of one kind, by height of the sub-tile; null where there is none of that height.
struct Tiles {
  GemmFn of_height[kMaxSubTile + 1];
  ProductFn product_of_height[kMaxSubTile + 1];      // of two sub-tiles; none for AMX
  PointwiseFn pointwise_of_height[kMaxSubTile + 1];  // of two sub-tiles; none for AMX
  int tallest;                                       // 0: there are none
  bool to_memory;                                    // no epilogue
};

// out[i] = relu(x[pixels[i]] * scale + shift), rounded to x's type, for every row i; or the average of that over 2x2
// pixels; or x as it is.
struct PrologueArgs {
  const char* x;
  ptrdiff_t pitch;        // bytes between pixels of x
  const int32_t* pixels;  // of each row; null: 0, 1, 2, ...
  int rows;
  ptrdiff_t below;  // bytes to the pixel below, where 2x2 are averaged; else 0
  int channels;
  const float* scale;  // [channels], padded to whole panels; null: neither scale nor ReLU nor average
  const float* shift;
  char* out;
  ptrdiff_t out_pitch;
  ptrdiff_t bytes;  // of a row of out: zeros behind the channels
  bool bf16_in, bf16_out;
};

// Winograd F(m x m, 3x3): a tile of (m+2)^2 pixels becomes (m+2)^2 frequencies, and frequencies become m^2 pixels, for
// the tiles of a row of an image, m pixels apart.
struct WinogradIn {
  const char* src;            // the first tile's first pixel, channel 0
  ptrdiff_t row, pixel;       // in bytes
  char* dst;                  // [frequency][tile][channel], of src's type
  ptrdiff_t frequency, tile;  // in bytes
  int tiles;
  int channels;  // a multiple of a vector
};
struct WinogradOut {
  const float* src;     // [frequency][tile][panel]
  ptrdiff_t frequency;  // in floats
  int tiles, panel;
  int rows, columns;  // of the pixels, those that there are: at most m of rows, tiles * m of columns
  int32_t pixel;      // the first one
  int32_t row;        // pixels between rows
};

// out[i] = max over window i: `rows` rows of the pixels [i * stride - pad, i * stride - pad + kernel) that there are. A
// NaN wins, as in torch.
struct MaxPoolArgs {
  const float* x;        // [row][pixel][channel], the first row of the windows
  ptrdiff_t row, pixel;  // in floats
  int rows, width;       // of x
  int kernel, stride, pad;
  int windows, channels;
  char* out;
  ptrdiff_t out_pitch;  // bytes between pixels
  bool bf16;            // out
};

// out[i] = mean over the pixels of x[pixel][i]. Sums of `chain` pixels are added up in memory.
struct MeanArgs {
  const char* x;
  ptrdiff_t pitch;  // bytes between pixels
  int64_t pixels, chain;
  int64_t channels;
  float* out;
  bool bf16;  // x
};

constexpr int kLinearRows = 4;  // of the weight that a linear layer reads at once: their sums are added up as a vector

// out[image][row] = sum over c of x[image][c] * weight[row][c] + bias[row].
struct LinearArgs {
  const float* x;
  ptrdiff_t ldx;  // floats between images
  int64_t images, channels;
  const char* weight;
  int rows;           // at most kLinearRows
  ptrdiff_t ahead;    // bytes to the rows that come into L2 meanwhile
  const float* bias;  // null: zeros
  char* out;
  ptrdiff_t out_pitch;  // bytes between images
  bool bf16;            // weight and out
};

struct Kernels {
  Isa isa;
  const char* name;
  int panel;   // output channels of a tile: two vectors
  int narrow;  // ... of a narrow one: one vector
  Tiles f32, f32_narrow;
  Tiles f32_row, f32_narrow_row;  // a tap being a kernel row, pixels one step apart
  int wide_sub;                   // height of a sub-tile of the wide tile, two panels at once; 0: none
  GemmFn gemm_f32_wide;
  ProductFn product_f32_wide;
  PointwiseFn pointwise_f32_wide;
  Tiles bf16, bf16_narrow;   // empty: no such instruction, compute in float32
  int bf16_word_multiple;    // words per tap are padded to a multiple of this ...
  int bf16_narrow_multiple;  // ... and for narrow panels
  int f32_step, bf16_step;   // words of a tap that are one step
  // Per thread, around runs of bf16 or of bf16_narrow tiles (AMX tile configuration).
  void (*begin)(bool is_narrow);
  void (*end)();
  void (*epilogue)(const EpilogueArgs&);
  void (*prologue)(const PrologueArgs&);
  void (*winograd_in[2])(const WinogradIn&);    // F(2x2), F(4x4)
  void (*winograd_in_bf16)(const WinogradIn&);  // F(2x2); null: products of bfloat16 are computed in float32
  void (*winograd_out[2])(const WinogradOut&, const Epilogue&);
  void (*max_pool)(const MaxPoolArgs&);
  void (*mean)(const MeanArgs&);
  void (*linear)(const LinearArgs&);
};

const Kernels& kernels_portable();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();
const Kernels& kernels_amx();

}  // namespace resnet_fused::cpu
