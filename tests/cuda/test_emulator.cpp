// The emulator tested by small kernels: right ones give right numbers in every order of warps and timing of copies,
// wrong ones are caught.
//
//   test_emulator           all of it
//   test_emulator layouts   the register and swizzle layouts, one place a line, for tests/test_cuda_layouts.py
//   test_emulator correct   the kernels without faults only
//   test_emulator race      a kernel without its barrier: ThreadSanitizer must complain
//   test_emulator overrun   a kernel that writes past its shared memory: AddressSanitizer must complain
#include <cstdio>
#include <random>

#include "cuda/launch.h"
#include "cuda/ptx90.h"
#include "cuda/tensor_map.h"

using namespace resnet_fused::cuda;
using Bf16 = __nv_bfloat16;

namespace {

int failures = 0, checks = 0;
bool plant_faults = true;

void expect(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  ++failures;
  const emu::Options& o = emu::options();
  std::printf("FAILED (order %d, async %d): %s\n", static_cast<int>(o.order), static_cast<int>(o.async), what.c_str());
}

// The launch must end with a violation whose message holds `part`.
template <class Run>
void expect_failure(const char* part, Run run) {
  if (!plant_faults) return;
  std::string message = "no violation was seen";
  try {
    run();
  } catch (const emu::Failure& failure) {
    message = failure.what();
  }
  expect(message.find(part) != std::string::npos, std::string("expected \"") + part + "\", got \"" + message + '"');
}

// A planted fault must not go unseen: a violation, or wrong numbers.
template <class Right>
void expect_caught(const char* fault, Right right) {
  if (!plant_faults) return;
  bool caught;
  try {
    caught = !right();
  } catch (const emu::Failure&) {
    caught = true;
  }
  expect(caught, std::string(fault) + " goes unseen");
}

template <class T>
T from_float(float v) {
  if constexpr (std::is_same_v<T, float>)
    return v;
  else if constexpr (std::is_same_v<T, Bf16>)
    return __float2bfloat16(v);
  else
    return __float2half(v);
}
template <class T>
float to_float(T v) {
  if constexpr (std::is_same_v<T, float>)
    return v;
  else if constexpr (std::is_same_v<T, Bf16>)
    return __bfloat162float(v);
  else
    return __half2float(v);
}
template <class T>
constexpr DType kDType = sizeof(T) == 4            ? DType::kF32
                         : std::is_same_v<T, Bf16> ? DType::kBf16
                                                   : DType::kF16;

// Small integers: every product and sum is exact.
template <class T>
std::vector<T> integers(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<T> values(count);
  for (T& v : values) v = from_float<T>(static_cast<float>(static_cast<int>(random() % 9) - 4));
  return values;
}

// c[m][n] = sum of a[m][k] * b[n][k]
template <class T>
std::vector<float> product(const std::vector<T>& a, const std::vector<T>& b, int m, int n, int k) {
  std::vector<float> c(static_cast<size_t>(m) * n);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j)
      for (int l = 0; l < k; ++l) c[i * n + j] += to_float(a[i * k + l]) * to_float(b[j * k + l]);
  return c;
}

// ---- cp.async, ldmatrix, mma ---------------------------------------------------------------------------------------
enum class Bug { kNone, kNoBarrier, kShortWait, kDivergentBarrier, kWrongLanes };

// One warp a 16 x 8 tile of a [16 * warps][64 bytes] times b [8][64 bytes], through shared memory that warps fill for
// each other: warp w loads the rows of warp w + 1.
template <class T, Bug kBug>
__global__ void mma_kernel(const T* a, const T* b, float* c) {
  DYN_SMEM(shared);
  const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32, next = (warp + 1) % warps;
  constexpr int kRow = 64 / sizeof(T);
  const uint32_t base = ptx::smem_addr(shared), b_base = base + warps * 1024;
  auto swizzle = [](int row, int unit) { return static_cast<uint32_t>(row * 64 + (unit ^ (row >> 1 & 3)) * 16); };
  for (int i = lane; i < 64; i += 32)
    ptx::cp_async16(base + next * 1024 + swizzle(i / 4, i % 4), a + (next * 16 + i / 4) * kRow + i % 4 * (kRow / 4),
                    true);
  ptx::cp_commit();
  if (warp == 0) ptx::cp_async<16>(b_base + swizzle(lane / 4, lane % 4), b + lane * (kRow / 4), true);
  ptx::cp_commit();
  if constexpr (kBug == Bug::kShortWait)
    ptx::cp_wait<1>();
  else
    ptx::cp_wait<0>();
  if constexpr (kBug == Bug::kDivergentBarrier) {
    if (warp != 0) __syncthreads();
  } else if constexpr (kBug != Bug::kNoBarrier) {
    __syncthreads();
  }
  float d[4] = {};
  for (int step = 0; step < 2; ++step) {  // 32 bytes of depth each
    uint32_t af[4], bf[4];
    const int row = kBug == Bug::kWrongLanes ? lane / 2 : lane % 16;
    ptx::ldmatrix_x4(af, base + warp * 1024 + swizzle(row, step * 2 + lane / 16));
    ptx::ldmatrix_x4(bf, b_base + swizzle(lane % 8, step * 2 + (lane >> 3 & 1)));
    ptx::mma<T>(d, af, bf[0], bf[1]);
  }
  for (int i = 0; i < 4; ++i) c[(warp * 16 + lane / 4 + (i >> 1) * 8) * 8 + lane % 4 * 2 + (i & 1)] = d[i];
}

template <class T, Bug kBug = Bug::kNone>
bool mma_is_right() {
  constexpr int kWarps = 3, kDepth = 64 / sizeof(T);
  const auto a = integers<T>(kWarps * 16 * kDepth, 1), b = integers<T>(8 * kDepth, 2);
  std::vector<float> c(kWarps * 16 * 8, NAN);
  launch(mma_kernel<T, kBug>, {dim3(1), kWarps * 32, kWarps * 1024 + 512}, nullptr, a.data(), b.data(), c.data());
  return c == product(a, b, kWarps * 16, 8, kDepth);
}

__global__ void transpose_kernel(const uint16_t* in, uint16_t* out, bool by_store) {
  DYN_SMEM(shared);
  const uint32_t base = ptx::smem_addr(shared), row = base + threadIdx.x * 16, copy = row + 512;
  ptx::cp_async16(row, in + threadIdx.x * 8, true);
  ptx::cp_commit();
  ptx::cp_wait<0>();
  __syncwarp();
  uint32_t r[4];
  if (by_store) {
    ptx::ldmatrix_x4(r, row);
    ptx::stmatrix_x4_t(copy, r[0], r[1], r[2], r[3]);
  } else {
    ptx::ldmatrix_x4_t(r, row);
    ptx::stmatrix_x4(copy, r[0], r[1], r[2], r[3]);
  }
  __syncwarp();
  const uint4 v = ptx::lds128(copy);
  std::memcpy(out + threadIdx.x * 8, &v, 16);
}

void test_sm80() {
  expect(mma_is_right<Bf16>(), "mma bf16");
  expect(mma_is_right<__half>(), "mma fp16");
  expect(mma_is_right<float>(), "mma tf32");
  expect(!mma_is_right<Bf16, Bug::kWrongLanes>(), "wrong ldmatrix lanes go unseen");
  if (emu::options().async == emu::Async::kLate)
    expect_caught("a wait that is a group short", mma_is_right<Bf16, Bug::kShortWait>);
  if (emu::options().order != emu::Order::kRandom)
    expect_caught("a missing barrier", mma_is_right<Bf16, Bug::kNoBarrier>);
  expect_failure("deadlock", [] { mma_is_right<Bf16, Bug::kDivergentBarrier>(); });

  std::vector<uint16_t> in(256), out(256);
  for (int i = 0; i < 256; ++i) in[i] = static_cast<uint16_t>(i);
  for (bool by_store : {false, true}) {
    launch(transpose_kernel, {dim3(1), 32, 1024}, nullptr, in.data(), out.data(), by_store);
    bool right = true;
    for (int m = 0; m < 4; ++m)
      for (int r = 0; r < 8; ++r)
        for (int c = 0; c < 8; ++c) right &= out[m * 64 + c * 8 + r] == in[m * 64 + r * 8 + c];
    expect(right, by_store ? "stmatrix.trans" : "ldmatrix.trans");
  }
}

// ---- rules that every kernel must keep -----------------------------------------------------------------------------
enum class Rule {
  kMisaligned,
  kPastEnd,
  kLaneOutsideMask,
  kDivergentWarp,
  kBarrierCount,
  kPartialExit,
  kNoGridWait,
  kMbarrierUnset
};

template <Rule kRule>
__global__ void breaking_kernel() {
  DYN_SMEM(shared);
  const uint32_t base = ptx::smem_addr(shared);
  const unsigned thread = threadIdx.x;
  uint32_t r[4];
  if constexpr (kRule == Rule::kMisaligned) ptx::ldmatrix_x4(r, base + thread * 16 + 8);
  if constexpr (kRule == Rule::kPastEnd) ptx::sts32(base + 1024, 0);
  if constexpr (kRule == Rule::kLaneOutsideMask) __shfl_sync(0xffffu, 1, 0);
  if constexpr (kRule == Rule::kDivergentWarp) {
    if (thread < 16)
      __syncwarp();
    else
      __shfl_sync(emu::kAllLanes, 1, 0);
  }
  if constexpr (kRule == Rule::kBarrierCount) ptx::bar_sync(1, thread < 32 ? 64 : 96);
  if constexpr (kRule == Rule::kPartialExit) {
    if (thread == 0) return;
    __syncthreads();
  }
  if constexpr (kRule == Rule::kMbarrierUnset) ptx::mbar_wait(base, 0);
}
template <Rule kRule>
void break_rule() {
  launch(breaking_kernel<kRule>, {dim3(1), 64, 1024, 1, kRule == Rule::kNoGridWait}, nullptr);
}

void test_rules() {
  expect_failure("not aligned to 16", break_rule<Rule::kMisaligned>);
  expect_failure("past the end", break_rule<Rule::kPastEnd>);
  expect_failure("not in its own mask", break_rule<Rule::kLaneOutsideMask>);
  expect_failure("divergent warp", break_rule<Rule::kDivergentWarp>);
  expect_failure("disagree on the count", break_rule<Rule::kBarrierCount>);
  expect_failure("1 of 64 have exited", break_rule<Rule::kPartialExit>);
  expect_failure("exits without griddepcontrol.wait", break_rule<Rule::kNoGridWait>);
  expect_failure("before its init", break_rule<Rule::kMbarrierUnset>);
}

// ---- TMA -----------------------------------------------------------------------------------------------------------
TensorMapGeometry dense(const void* p, DType dtype, std::vector<uint64_t> sizes, std::vector<uint32_t> box,
                        int swizzle) {
  TensorMapGeometry g;
  g.pointer = p;
  g.dtype = dtype;
  g.rank = static_cast<int>(sizes.size());
  g.swizzle = swizzle;
  uint64_t stride = element_size(dtype);
  for (int i = 0; i < g.rank; ++i) {
    g.size[i] = sizes[i];
    g.stride[i] = i ? stride : 0;
    g.box[i] = box[i];
    stride *= sizes[i];
  }
  return g;
}

enum class TmaBug {
  kNone,
  kWrongParity,
  kTooManyBytes,
  kTooManyArrivals,
  kNoInitFence,
  kMisaligned,
  kNoStoreFence,
  kNoStoreWait,
  kOverwrite
};

// A box in, unswizzled by hand, the box out again through TMA.
template <TmaBug kBug>
__global__ void tma_kernel(const __grid_constant__ CUtensorMap in, const __grid_constant__ CUtensorMap out, int swizzle,
                           int x, int y, uint16_t* seen) {
  DYN_SMEM(shared);
  const int row_bytes = swizzle ? swizzle : 64, units = row_bytes / 16;
  const uint32_t base = ptx::smem_addr(shared), staged = base + 8 * row_bytes, full = base + 2 * 8 * row_bytes;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    ptx::mbar_init(full, 1);
    if constexpr (kBug != TmaBug::kNoInitFence) ptx::fence_init();
  }
  __syncthreads();
  if (thread == 0) {
    ptx::mbar_expect_tx(full, 8 * row_bytes + (kBug == TmaBug::kTooManyBytes ? 16 : 0));
    if constexpr (kBug == TmaBug::kTooManyArrivals) ptx::mbar_arrive(full);
    ptx::tma_load_2d(base + (kBug == TmaBug::kMisaligned ? 64 : 0), &in, full, x, y);
  }
  ptx::mbar_wait(full, kBug == TmaBug::kWrongParity ? 1 : 0);
  for (int i = thread; i < 8 * units; i += 32) {
    const int row = i / units, unit = i % units;
    const uint32_t offset = row * row_bytes + ((swizzle ? unit ^ (row * row_bytes / 128 & (units - 1)) : unit) * 16);
    const uint4 v = ptx::lds128(base + offset);
    std::memcpy(seen + i * 8, &v, 16);
    ptx::sts128(staged + offset, v);
  }
  if constexpr (kBug != TmaBug::kNoStoreFence) ptx::fence_async();
  __syncthreads();
  if (thread != 0) return;
  ptx::tma_store_2d(&out, staged, x, y);
  ptx::tma_store_commit();
  if constexpr (kBug == TmaBug::kOverwrite) ptx::sts128(staged + 5 * row_bytes, uint4{0, 0, 0, 0});
  if constexpr (kBug != TmaBug::kNoStoreWait) ptx::tma_store_wait<0>();
}

template <TmaBug kBug = TmaBug::kNone>
bool tma_is_right(int swizzle = 128) {
  const int columns = (swizzle ? swizzle : 64) / 2, width = columns * 2, height = 12;
  std::vector<uint16_t> image(static_cast<size_t>(width) * height), copy(image.size(), 0xeeee),
      seen(8 * columns, 0xeeee);
  for (size_t i = 0; i < image.size(); ++i) image[i] = static_cast<uint16_t>(i + 1);
  const std::vector<uint64_t> sizes{static_cast<uint64_t>(width), static_cast<uint64_t>(height)};
  const std::vector<uint32_t> box{static_cast<uint32_t>(columns), 8};
  const auto in = encode_tensor_map(dense(image.data(), DType::kBf16, sizes, box, swizzle));
  const auto out = encode_tensor_map(dense(copy.data(), DType::kBf16, sizes, box, swizzle));
  const int x = columns + 8, y = -3;  // past the right and the upper edge
  launch(tma_kernel<kBug>, {dim3(1), 32, 2 * 16 * columns * 2 + 8}, nullptr, in, out, swizzle, x, y, seen.data());
  bool right = true;
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < columns; ++c) {
      const bool inside = y + r >= 0 && x + c < width;
      right &= seen[r * columns + c] == (inside ? image[(y + r) * width + x + c] : 0);
      if (inside) right &= copy[(y + r) * width + x + c] == image[(y + r) * width + x + c];
    }
  for (int r = 0; r < height; ++r)
    for (int c = 0; c < width; ++c)
      if (r >= y + 8 || c < x) right &= copy[r * width + c] == 0xeeee;
  return right;
}

__global__ void im2col_kernel(const __grid_constant__ CUtensorMap in, int w, int h, int n, int s, int r,
                              uint16_t* seen) {
  DYN_SMEM(shared);
  const uint32_t base = ptx::smem_addr(shared), full = base + 16 * 32;
  if (threadIdx.x == 0) {
    ptx::mbar_init(full, 1);
    ptx::fence_init();
    ptx::mbar_expect_tx(full, 16 * 32);
    ptx::tma_load_im2col(base, &in, full, 0, w, h, n, s, r);
  }
  __syncwarp();
  ptx::mbar_wait(full, 0);
  const uint4 v = ptx::lds128(base + threadIdx.x * 16);
  std::memcpy(seen + threadIdx.x * 8, &v, 16);
}

// 16 output pixels from the fifth on, for one tap of a 3x3 convolution of 16 channels.
bool im2col_is_right(int stride, int pad, int dilation, int s, int r) {
  const int n = 2, h = 7, w = 9, c = 16, p = (h + 2 * pad - 2 * dilation - 1) / stride + 1,
            q = (w + 2 * pad - 2 * dilation - 1) / stride + 1, first = 5;
  std::vector<uint16_t> image(n * h * w * c), seen(16 * c, 0xeeee);
  for (size_t i = 0; i < image.size(); ++i) image[i] = static_cast<uint16_t>(i + 1);
  TensorMapGeometry g = dense(image.data(), DType::kBf16, {16, 9, 7, 2}, {1, 1, 1, 1}, 0);
  g.im2col = true;
  g.channels = 16;
  g.pixels = 16;
  for (int i = 0; i < 2; ++i) {
    g.lower[i] = -pad;
    g.upper[i] = pad - 2 * dilation;
    g.step[i + 1] = static_cast<uint32_t>(stride);
  }
  launch(im2col_kernel, {dim3(1), 32, 16 * 32 + 8}, nullptr, encode_tensor_map(g), first % q * stride - pad,
         first / q % p * stride - pad, first / (q * p), s * dilation, r * dilation, seen.data());
  bool right = true;
  for (int i = 0; i < 16; ++i) {
    const int pixel = first + i, b = pixel / (p * q), y = pixel / q % p * stride - pad + r * dilation,
              x = pixel % q * stride - pad + s * dilation;
    const bool inside = b < n && y >= 0 && y < h && x >= 0 && x < w;
    for (int k = 0; k < c; ++k) right &= seen[i * c + k] == (inside ? image[((b * h + y) * w + x) * c + k] : 0);
  }
  return right;
}

void test_tma() {
  for (int swizzle : {0, 32, 64, 128}) expect(tma_is_right(swizzle), "TMA, swizzle " + std::to_string(swizzle));
  for (int stride : {1, 2})
    for (int pad : {0, 1})
      for (int dilation : {1, 2})
        for (int tap = 0; tap < 9; tap += 2)
          expect(im2col_is_right(stride, pad, dilation, tap % 3, tap / 3),
                 "im2col stride " + std::to_string(stride) + " pad " + std::to_string(pad) + " dilation " +
                     std::to_string(dilation) + " tap " + std::to_string(tap));
  if (emu::options().async == emu::Async::kLate) {
    expect_caught("a wait for the wrong parity", [] { return tma_is_right<TmaBug::kWrongParity>(); });
    expect_failure("bulk stores", [] { tma_is_right<TmaBug::kNoStoreWait>(); });
    expect_caught("memory overwritten under a bulk store", [] { return tma_is_right<TmaBug::kOverwrite>(); });
  }
  expect_failure("deadlock", [] { tma_is_right<TmaBug::kTooManyBytes>(); });
  expect_failure("more arrivals", [] { tma_is_right<TmaBug::kTooManyArrivals>(); });
  expect_failure("without fence.proxy.async", [] { tma_is_right<TmaBug::kNoInitFence>(); });
  expect_failure("without fence.proxy.async", [] { tma_is_right<TmaBug::kNoStoreFence>(); });
  expect_failure("not aligned to 1024", [] { tma_is_right<TmaBug::kMisaligned>(); });
}

// ---- wgmma ---------------------------------------------------------------------------------------------------------
enum class WgmmaBug { kNone, kNoFence, kNoWait, kShortWait, kNoProxyFence, kDescriptor };

// c[64][N] = a[64] b[N], two chunks of S bytes of depth, b and (unless in registers) a loaded by TMA.
template <class T, int N, int S, bool kRegisters, WgmmaBug kBug>
__global__ void wgmma_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                             const T* a, float* c) {
  DYN_SMEM(shared);
  constexpr int kDepth = S / sizeof(T), kRound = (N * S + 1023) / 1024 * 1024;
  const uint32_t base = ptx::smem_addr(shared), b_base = base + 2 * 64 * S, full = b_base + 2 * kRound;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    ptx::mbar_init(full, 1);
    ptx::fence_init();
    ptx::mbar_expect_tx(full, 2 * (64 + N) * S);
    for (int chunk = 0; chunk < 2; ++chunk) {
      ptx::tma_load_2d(base + chunk * 64 * S, &a_map, full, chunk * kDepth, 0);
      ptx::tma_load_2d(b_base + chunk * kRound, &b_map, full, chunk * kDepth, 0);
    }
  }
  __syncthreads();
  ptx::mbar_wait(full, 0);
  if constexpr (kBug == WgmmaBug::kNoProxyFence)
    if (thread == 5) ptx::sts32(base, ptx::lds32(base));
  float d[N / 2];
  uint32_t fragments[2][S / 32][4];
  for (int chunk = 0; chunk < 2; ++chunk) {
    for (int step = 0; step < S / 32; ++step)
      for (int i = 0; i < 4; ++i) {
        constexpr int kPerWord = 4 / sizeof(T);
        const layouts::Place p = layouts::mma_a(thread % 32, i, 0, kPerWord);
        std::memcpy(&fragments[chunk][step][i],
                    a + (thread / 32 * 16 + p.row) * 2 * kDepth + chunk * kDepth + step * 8 * kPerWord + p.column, 4);
      }
    if constexpr (kBug != WgmmaBug::kNoFence) ptx::wg_fence();
    const uint64_t da = ptx::wg_desc<S>(base + chunk * 64 * S), db = ptx::wg_desc<S>(b_base + chunk * kRound);
    for (int step = 0; step < S / 32; ++step) {
      const uint64_t forward = step * 32 / 16 + (kBug == WgmmaBug::kDescriptor && step ? 1 : 0);
      if constexpr (kRegisters)
        ptx::wgmma<T>(d, fragments[chunk][step], db + forward, chunk + step > 0);
      else
        ptx::wgmma<T>(d, da + forward, db + forward, chunk + step > 0);
    }
    ptx::wg_commit();
  }
  if constexpr (kBug == WgmmaBug::kShortWait) ptx::wg_wait<1>();
  if constexpr (kBug != WgmmaBug::kShortWait && kBug != WgmmaBug::kNoWait) ptx::wg_wait<0>();
  for (int i = 0; i < N / 2; ++i) {
    const layouts::Place p = layouts::wgmma_d(thread, i);
    c[p.row * N + p.column] = d[i];
  }
  ptx::wg_wait<0>();
}

template <class T, int N, int S, bool kRegisters = false, WgmmaBug kBug = WgmmaBug::kNone>
bool wgmma_is_right() {
  constexpr int kDepth = 2 * S / sizeof(T), kRound = (N * S + 1023) / 1024 * 1024;
  const auto a = integers<T>(64 * kDepth, 3), b = integers<T>(N * kDepth, 4);
  std::vector<float> c(64 * N, NAN);
  const auto map = [](const std::vector<T>& m, uint32_t rows) {
    return encode_tensor_map(dense(m.data(), kDType<T>, {kDepth, rows}, {kDepth / 2, rows}, S));
  };
  launch(wgmma_kernel<T, N, S, kRegisters, kBug>, {dim3(1), 128, 2 * 64 * S + 2 * kRound + 8}, nullptr, map(a, 64),
         map(b, N), a.data(), c.data());
  return c == product(a, b, 64, N, kDepth);
}

// b not swizzled: 8 x 16 bytes packed, the next 16 bytes of depth `lbo` on, the next 8 rows `sbo` on.
__global__ void plain_operand_kernel(const Bf16* a, const Bf16* b, float* c) {
  DYN_SMEM(shared);
  const uint32_t base = ptx::smem_addr(shared);
  constexpr int kPlane = 16 * 16 + 16;  // one plane of 8 channels: 16 rows, and a gap
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  if (thread < 32) {
    uint4 v;
    std::memcpy(&v, b + thread / 2 * 16 + thread % 2 * 8, 16);
    ptx::sts128(base + thread % 2 * kPlane + thread / 2 * 16, v);
    ptx::fence_async();
  }
  __syncthreads();
  uint32_t fragment[4];
  for (int i = 0; i < 4; ++i) {
    const layouts::Place p = layouts::mma_a(thread % 32, i, 0, 2);
    std::memcpy(&fragment[i], a + (warp * 16 + p.row) * 16 + p.column, 4);
  }
  float d[8];
  ptx::wg_fence();
  ptx::wgmma<Bf16>(d, fragment, ptx::wg_desc_ns(base, kPlane, 128), false);
  ptx::wg_commit();
  ptx::wg_wait<0>();
  for (int i = 0; i < 8; ++i) c[layouts::wgmma_d(thread, i).row * 16 + layouts::wgmma_d(thread, i).column] = d[i];
}

void test_wgmma() {
  expect(wgmma_is_right<Bf16, 64, 128>(), "wgmma bf16 N=64 swizzle 128");
  expect(wgmma_is_right<Bf16, 104, 128>(), "wgmma bf16 N=104 swizzle 128");
  expect(wgmma_is_right<__half, 16, 64>(), "wgmma fp16 N=16 swizzle 64");
  expect(wgmma_is_right<Bf16, 8, 32>(), "wgmma bf16 N=8 swizzle 32");
  expect(wgmma_is_right<float, 32, 128>(), "wgmma tf32 N=32 swizzle 128");
  expect(wgmma_is_right<Bf16, 32, 128, true>(), "wgmma bf16 N=32, a in registers");
  expect(wgmma_is_right<float, 16, 128, true>(), "wgmma tf32 N=16, a in registers");
  expect_caught("a wrong descriptor", wgmma_is_right<Bf16, 16, 128, false, WgmmaBug::kDescriptor>);
  expect_failure("no wgmma.fence", [] { wgmma_is_right<Bf16, 16, 128, false, WgmmaBug::kNoFence>(); });
  expect_failure("without fence.proxy.async", [] { wgmma_is_right<Bf16, 16, 128, false, WgmmaBug::kNoProxyFence>(); });
  if (emu::options().async == emu::Async::kLate) {
    expect_caught("no wait for wgmma", wgmma_is_right<Bf16, 16, 128, false, WgmmaBug::kNoWait>);
    expect_caught("a short wait for wgmma", wgmma_is_right<Bf16, 16, 128, false, WgmmaBug::kShortWait>);
  }
  const auto a = integers<Bf16>(64 * 16, 5), b = integers<Bf16>(16 * 16, 6);
  std::vector<float> c(64 * 16, NAN);
  launch(plain_operand_kernel, {dim3(1), 128, 2 * (16 * 16 + 16)}, nullptr, a.data(), b.data(), c.data());
  expect(c == product(a, b, 64, 16, 16), "wgmma, unswizzled operand");
}

// ---- clusters ------------------------------------------------------------------------------------------------------
// Each of 2 blocks loads half a box for both; the first block waits for an arrival of the second at its own barrier.
template <bool kSynchronized>
__global__ void cluster_kernel(const __grid_constant__ CUtensorMap in, uint16_t* seen, int* order) {
  DYN_SMEM(shared);
  const uint32_t base = ptx::smem_addr(shared), full = base + 1024, other = full + 8, rank = ptx::cluster_rank();
  if (threadIdx.x == 0) {
    ptx::mbar_init(full, 1);
    ptx::mbar_init(other, 1);
    ptx::fence_init();
  }
  if constexpr (kSynchronized) ptx::cluster_sync();
  if (threadIdx.x == 0) {
    ptx::mbar_expect_tx(full, 1024);
    ptx::tma_load_multicast_2d(base + rank * 512, &in, full, 3, 0, static_cast<int>(blockIdx.x) * 8);
    if (rank == 1) {
      order[blockIdx.x / 2] = 1;
      ptx::mbar_arrive_cluster(ptx::mapa(other, 0));
    }
  }
  __syncthreads();
  ptx::mbar_wait(full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 64; i += 32) {
    const uint4 v = ptx::lds128(base + i * 16);
    std::memcpy(seen + (blockIdx.x * 64 + i) * 8, &v, 16);
  }
  if (rank == 0) {
    ptx::mbar_wait(other, 0);
    if (threadIdx.x == 0 && order[blockIdx.x / 2] == 1) order[blockIdx.x / 2] = 2;
  }
  ptx::cluster_sync();
}

void test_clusters() {
  std::vector<uint16_t> image(32 * 4 * 8), seen(4 * 512, 0xeeee);
  for (size_t i = 0; i < image.size(); ++i) image[i] = static_cast<uint16_t>(i);
  const auto map = encode_tensor_map(dense(image.data(), DType::kBf16, {32, 32}, {32, 8}, 0));
  std::vector<int> order(2, 0);
  launch(cluster_kernel<true>, {dim3(4), 32, 1024 + 16, 2}, nullptr, map, seen.data(), order.data());
  bool right = order == std::vector<int>{2, 2};
  for (int block = 0; block < 4; ++block)
    for (int i = 0; i < 512; ++i) right &= seen[block * 512 + i] == image[block / 2 * 512 + i];
  expect(right, "multicast and remote arrival");
  if (emu::options().order != emu::Order::kRandom)
    expect_failure("before its init", [&] {
      launch(cluster_kernel<false>, {dim3(4), 32, 1024 + 16, 2}, nullptr, map, seen.data(), order.data());
    });
}

// ---- single faults for the sanitizers ------------------------------------------------------------------------------
__global__ void overrunning_kernel() {
  DYN_SMEM(shared);
  shared[100 + threadIdx.x] = 0;  // through a pointer: nothing but AddressSanitizer can see it
}

void print_layouts() {
  for (int per_word : {1, 2})
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < per_word; ++e) {
        for (int i = 0; i < 4; ++i) {
          const layouts::Place p = layouts::mma_a(lane, i, e, per_word);
          std::printf("a%d %d %d %d %d\n", per_word, lane, i * per_word + e, p.row, p.column);
        }
        for (int i = 0; i < 2; ++i) {
          const layouts::Place p = layouts::mma_b(lane, i, e, per_word);
          std::printf("b%d %d %d %d %d\n", per_word, lane, i * per_word + e, p.row, p.column);
        }
      }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      std::printf("d %d %d %d %d\n", lane, i, layouts::mma_d(lane, i).row, layouts::mma_d(lane, i).column);
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < 32; ++i)
      std::printf("w %d %d %d %d\n", thread, i, layouts::wgmma_d(thread, i).row, layouts::wgmma_d(thread, i).column);
  for (int swizzle : {32, 64, 128})
    for (uint32_t offset = 0; offset < 8u * swizzle; offset += 2)
      std::printf("s%d %u %u %u 0\n", swizzle, offset, layouts::swizzled(offset, swizzle), offset / swizzle);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "";
  if (mode == "layouts") {
    print_layouts();
    return 0;
  }
  if (mode == "race") {
    mma_is_right<Bf16, Bug::kNoBarrier>();
    return 0;
  }
  if (mode == "overrun") {
    launch(overrunning_kernel, {dim3(1), 32, 128}, nullptr);
    return 0;
  }
  plant_faults = mode != "correct";
  for (emu::Order order : {emu::Order::kForward, emu::Order::kReverse, emu::Order::kRandom})
    for (emu::Async async : {emu::Async::kLate, emu::Async::kEarly, emu::Async::kRandom}) {
      emu::options().order = order;
      emu::options().async = async;
      test_sm80();
      test_rules();
      test_tma();
      test_wgmma();
      test_clusters();
    }
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures != 0;
}
