// What the sm_90a kernels are launched with, as pure functions: tiles, shares of the depth, tensor maps, shared memory.
#include <cstdio>
#include <map>
#include <set>
#include <vector>

#include "cuda/sm90/bottleneck64.h"
#include "cuda/sm90/bottleneck_streamed_launch.h"
#include "cuda/sm90/conv.h"
#include "cuda/sm90/rotated_launch.h"

namespace {

using namespace resnet_fused::cuda;
using namespace resnet_fused::cuda::sm90;

int passed = 0, failed = 0;
void check(bool ok, const char* what, int line) {
  ++(ok ? passed : failed);
  if (!ok) std::printf("FAILED line %d: %s\n", line, what);
}
#define CHECK(condition) check(condition, #condition, __LINE__)

alignas(16) char memory[16];
const Device kH100{90, 132, kMaxShared};
const ConvTile kTiles[] = {{128, 128, 5, 2, true, 1},  {128, 128, 5, 2, true, 2}, {128, 256, 3, 2, false, 1},
                           {128, 256, 3, 2, false, 2}, {128, 64, 8, 2, true, 1},  {64, 64, 6, 1, false, 1, 2}};

ConvParams layer(int n, int size, int c, int k, int taps, int stride, int padding, int dilation = 1) {
  ConvParams p;
  p.dtype = DType::kBf16;
  p.x = p.out = memory;
  p.conv.weight = memory;
  p.n = n, p.h = p.w = size, p.c = c, p.k = k, p.r = p.s = taps;
  p.stride_h = p.stride_w = stride, p.pad_h = p.pad_w = padding, p.dil_h = p.dil_w = dilation;
  p.p = p.q = (size + 2 * padding - dilation * (taps - 1) - 1) / stride + 1;
  p.x_pitch = c, p.out_pitch = k;
  return p;
}

const ConvParams kLayers[] = {
    layer(128, 56, 64, 256, 1, 1, 0), layer(128, 56, 128, 128, 3, 2, 1), layer(1, 7, 512, 512, 3, 1, 1),
    layer(1, 14, 256, 1024, 1, 1, 0), layer(3, 15, 40, 72, 1, 2, 0),     layer(2, 9, 16, 24, 3, 1, 2, 2),
    layer(2, 9, 8, 8, 7, 3, 2),       layer(1, 1, 8, 8, 1, 1, 0),        layer(1, 30, 8, 8, 5, 8, 4, 3),
};

// Every tile of the output gets every step of the depth exactly once.
void test_work(const ConvParams& p, const ConvTile& tile, int splits) {
  const ConvArgs a = conv_args(p, tile, splits, nullptr);
  std::map<std::pair<int, int>, std::vector<int>> seen;
  for (int item = 0; item < conv_items(a, tile.cluster); ++item)
    for (int rank = 0; rank < tile.cluster; ++rank) {
      const ConvWork work(a, item, tile.m, tile.n, tile.cluster, rank);
      std::vector<int>& steps = seen[{work.m0, work.n0}];
      steps.resize(static_cast<size_t>(a.main.steps));
      for (int step = work.first_step; step < work.end_step; ++step) ++steps[static_cast<size_t>(step)];
    }
  bool once = true, all = true;
  for (const auto& [origin, steps] : seen)
    for (const int count : steps) once &= count == 1;
  for (int m = 0; m < a.pixels; m += tile.m)
    for (int n = 0; n < p.k; n += tile.n) all &= seen.count({m, n}) == 1;
  CHECK(once);
  CHECK(all);
}

// im2col walks over as many positions of an image as the output has pixels.
void test_maps(const ConvParams& p, const ConvTile& tile) {
  const TensorMapGeometry x = conv_map_x(p, tile);
  CHECK(defect(x) == nullptr);
  CHECK(defect(conv_map_weight(p, tile)) == nullptr);
  CHECK(defect(conv_map_side(p, tile, p.out, p.out_pitch)) == nullptr);
  if (!x.im2col) return;
  int rows = 0, columns = 0;
  for (int w = x.lower[0]; w <= static_cast<int>(x.size[1]) - 1 + x.upper[0]; w += static_cast<int>(x.step[1]))
    ++columns;
  for (int h = x.lower[1]; h <= static_cast<int>(x.size[2]) - 1 + x.upper[1]; h += static_cast<int>(x.step[2])) ++rows;
  CHECK(rows == p.p);
  CHECK(columns == p.q);
}

void test_conv() {
  for (const ConvParams& p : kLayers)
    for (const ConvTile& tile : kTiles) {
      const int splits = conv_splits(p, tile, kH100);
      test_work(p, tile, 1);
      test_work(p, tile, splits);
      test_maps(p, tile);
      const ConvArgs a = conv_args(p, tile, splits, nullptr);
      const int grid = conv_grid(a, tile, kH100);
      CHECK(grid > 0 && grid <= tile.blocks * kH100.multiprocessors && grid % tile.cluster == 0);
      CHECK(splits == 1 || a.main.steps / splits >= 4);
      CHECK(conv_estimate(p, tile, splits, kH100) > 0);
    }
  const ConvTile small = kTiles[5];
  CHECK(conv_grid(conv_args(kLayers[0], small, 1, nullptr), small, kH100) == 2 * kH100.multiprocessors);
  CHECK(conv_grid(conv_args(kLayers[7], small, 1, nullptr), small, kH100) == 1);
  CHECK(conv_splits(kLayers[0], small, kH100) == 1);   // the device is full
  CHECK(conv_splits(kLayers[2], small, kH100) == 16);  // 8 tiles of 72 steps
  CHECK(conv_unsupported<false>(layer(1, 7, 12, 64, 1, 1, 0)) != nullptr);
  CHECK(conv_unsupported<false>(layer(1, 7, 64, 12, 1, 1, 0)) != nullptr);
  CHECK(conv_unsupported<false>(layer(1, 40, 8, 8, 1, 9, 0)) != nullptr);
  CHECK(conv_unsupported<false>(layer(1, 400, 8, 8, 3, 1, 1, 64)) != nullptr);
  ConvParams dual = layer(2, 7, 64, 256, 1, 1, 0);
  CHECK(conv_unsupported<true>(dual) != nullptr);
  dual.projection = {memory, 128, memory, nullptr, 14, 14, 128, 2};
  CHECK(conv_unsupported<true>(dual) == nullptr && conv_unsupported<false>(dual) != nullptr);
  test_maps(conv_projection(dual), kTiles[4]);
  CHECK(conv_args(dual, kTiles[4], 1, nullptr).projection.steps == 2);
  CHECK(conv_unsupported<false>(layer(1 << 15, 256, 8, 8, 1, 1, 0)) != nullptr);
}

template <class T>
void test_ring() {
  // The parts of shared memory follow one another, stages where a 128-byte swizzle can start.
  CHECK(T::kStageBytes % 1024 == 0 && T::kBytesX % 1024 == 0 && T::kStaging % 1024 == 0 && T::kPanelBytes % 1024 == 0);
  CHECK(T::kBarriers % 8 == 0 && T::kShared <= kMaxShared);
  std::set<uint32_t> offsets;
  for (int row = 0; row < T::kGroupM; ++row)
    for (int chunk = 0; chunk < T::kTileN / 8; ++chunk) offsets.insert(staging_offset<T>(row, chunk));
  CHECK(offsets.size() == static_cast<size_t>(T::kGroupM) * T::kTileN / 8);
  CHECK(*offsets.rbegin() + 16 == static_cast<uint32_t>(T::kPanels) * T::kPanelBytes);
}

template <bool kProjection>
void test_bottleneck64() {
  using L = Bottleneck64Layout<kProjection>;
  std::set<int> bytes;
  const auto claim = [&bytes](int first, int size) {
    for (int b = first; b < first + size; b += 4) CHECK(bytes.insert(b).second);
  };
  claim(0, L::kRing);
  for (int s = 0; s < L::kStages; ++s) claim(L::kRing + s * L::kSlot, L::kSliceBytes);
  claim(L::kH1, 2 * L::kH1Bytes);
  for (int i = 0; i < L::kVectors; ++i) claim(L::vector_offset(i), 4);
  claim(L::kBarriers, L::kShared - L::kBarriers);
  CHECK(*bytes.rbegin() < L::kShared);
  CHECK(L::kRing % 1024 == 0 && L::kSlot % 1024 == 0 && L::kBarriers % 8 == 0);

  BottleneckParams p;
  p.dtype = DType::kBf16;
  p.x = p.conv1.weight = p.conv2.weight = p.conv3.weight = p.out = memory;
  if (kProjection) p.projection.weight = memory;
  p.n = 3, p.h = p.p = 17, p.w = p.q = 9, p.c = kProjection ? 64 : 256, p.mid = 64, p.k = 256;
  p.x_pitch = p.c, p.out_pitch = p.k;
  CHECK(bottleneck64_unsupported<kProjection>(p) == nullptr);
  CHECK(bottleneck64_unsupported<!kProjection>(p) != nullptr);
  const Bottleneck64Args a = bottleneck64_args(p);
  CHECK(a.tiles() == 3 * 3 * 2 && bottleneck64_grid(a, kH100) == 18 && bottleneck64_grid(a, {90, 4, kMaxShared}) == 4);
  const Bottleneck64Tile last(a, a.tiles() - 1);
  CHECK(last.n == 2 && last.h == 16 && last.w == 8);
  CHECK(defect(bottleneck64_map_x(p)) == nullptr);
  CHECK(defect(bottleneck64_map_rows(memory, p.dtype, 576)) == nullptr);
  for (int BottleneckParams::* size :
       {&BottleneckParams::mid, &BottleneckParams::k, &BottleneckParams::c, &BottleneckParams::stride1,
        &BottleneckParams::stride2, &BottleneckParams::dilation}) {
    BottleneckParams other = p;
    other.*size *= 2;
    CHECK(bottleneck64_unsupported<kProjection>(other) != nullptr);
  }
}

template <class L>
void test_streamed() {
  std::set<int> bytes;
  const auto claim = [&bytes](int first, int size) {
    for (int b = first; b < first + size; b += 4) CHECK(bytes.insert(b).second);
  };
  for (int s = 0; s < L::kStages; ++s) claim(s * L::kSlot, std::max(L::kWeightBytes, L::kPieceBytes));
  claim(L::kH1, L::kH1Bytes + 32);  // the last taps' two pixels
  claim(L::kH2, L::kH2Bytes);
  claim(L::kBarriers, L::kShared - L::kBarriers);
  CHECK(*bytes.rbegin() < L::kShared);
  CHECK(L::kSlot % 1024 == 0 && L::kH1 % 1024 == 0 && L::kH2 % 16 == 0 && L::kBarriers % 8 == 0);
  // The furthest tap of the last pixel that a product reads.
  CHECK(2 * L::kHaloW + 2 + L::kPixels <= L::kHalo + 2);

  BottleneckParams p;
  p.dtype = DType::kBf16;
  p.x = p.conv1.weight = p.conv2.weight = p.conv3.weight = p.out = memory;
  p.n = 3, p.h = p.p = 2 * L::kTileH + 1, p.w = p.q = 15, p.c = p.k = L::kOut, p.mid = L::kMid;
  CHECK(streamed_bottleneck_unsupported<L>(p) == nullptr);
  const StreamedBottleneckArgs a = streamed_bottleneck_args<L>(p);
  CHECK(a.tiles() == 3 * 3 * 2 && streamed_bottleneck_grid<L>(a, kH100) == 18);
  CHECK(streamed_bottleneck_grid<L>(a, {90, 5, kMaxShared}) == 4 && streamed_bottleneck_grid<L>(a, {90, 1, 0}) == 2);
  const StreamedBottleneckTile<L> last(a, a.tiles() - 1), beyond(a, a.tiles());
  CHECK(last.n == 2 && last.h == 2 * L::kTileH && last.w == 14 && beyond.n == p.n);
  CHECK(defect(streamed_bottleneck_image(p, memory, L::kOut, L::kOut, L::kPieceH, L::kHaloW)) == nullptr);
  CHECK(defect(streamed_bottleneck_image(p, memory, L::kOut, L::kOut, L::kTileH, L::kTileW)) == nullptr);
  CHECK(defect(streamed_bottleneck_weights<L>(p, memory, L::kMid, 9 * L::kMid)) == nullptr);
  for (int BottleneckParams::* size :
       {&BottleneckParams::mid, &BottleneckParams::k, &BottleneckParams::c, &BottleneckParams::stride1,
        &BottleneckParams::stride2, &BottleneckParams::dilation}) {
    BottleneckParams other = p;
    other.*size *= 2;
    CHECK(streamed_bottleneck_unsupported<L>(other) != nullptr);
  }
  p.projection.weight = memory;
  CHECK(streamed_bottleneck_unsupported<L>(p) != nullptr);
}

template <class L>
void test_rotated() {
  std::set<int> bytes;
  const auto claim = [&bytes](int first, int size) {
    for (int b = first; b < first + size; b += 4) CHECK(bytes.insert(b).second);
  };
  for (int s = 0; s < L::kStages; ++s) {
    CHECK(L::kSlices * kMatrixBytes <= L::kSecond);  // a chunk's part of W3 lies where h1 does
    claim(s * L::kStageBytes, L::kBytesH1);
    claim(s * L::kStageBytes + L::kSecond, L::kBytesW);
  }
  claim(L::kSide, L::kGroups * L::kSides * L::kPanelBytes);
  claim(L::kVector, 4 * L::kVectors);
  claim(L::kBarriers, L::kShared - L::kBarriers);
  CHECK(*bytes.rbegin() < L::kShared);
  CHECK(L::kStageBytes % 1024 == 0 && L::kSecond % 1024 == 0 && L::kSide % 1024 == 0 && L::kBarriers % 8 == 0);

  RotatedParams p;
  p.dtype = DType::kBf16;
  p.h1 = p.x = p.conv2.weight = p.conv3.weight = p.conv1.weight = p.y = p.h1_next = memory;
  p.n = 3, p.h = 17, p.w = 9, p.mid = L::kMid, p.k = L::kOut;
  p.h1_pitch = p.h1_next_pitch = p.mid, p.x_pitch = p.y_pitch = p.k;
  CHECK(rotated_unsupported<L>(p) == nullptr);
  const RotatedArgs a = rotated_args(p);
  CHECK(a.tiles() == 4 && a.next);  // 459 pixels
  CHECK(rotated_grid<L>(a, kH100) == 4 && rotated_grid<L>(a, {90, 3, kMaxShared}) == 2);
  const TensorMapGeometry h1 = rotated_map_h1<L>(p);
  CHECK(defect(h1) == nullptr);
  for (int i = 0; i < 2; ++i) CHECK(h1.lower[i] == -1 && h1.upper[i] == -1 && h1.step[i + 1] == 1);
  CHECK(h1.pixels * h1.channels * 2 == static_cast<uint32_t>(L::kBytesH1));
  CHECK(defect(rotated_map_weight<L>(p, p.conv2, L::kMid, 9 * L::kMid, L::kMid)) == nullptr);
  CHECK(defect(rotated_map_weight<L>(p, p.conv3, L::kOut, L::kMid, kDepth)) == nullptr);
  CHECK(defect(rotated_map_weight<L>(p, p.conv1, L::kMid, L::kOut, L::kMid)) == nullptr);
  CHECK(defect(rotated_map_side<L>(p, memory, L::kOut, L::kOut)) == nullptr);
  const float with_next = rotated_estimate<L>(p, kH100);
  p.conv1.weight = nullptr;
  CHECK(!rotated_args(p).next && rotated_unsupported<L>(p) == nullptr);
  CHECK(rotated_estimate<L>(p, kH100) > 0 && rotated_estimate<L>(p, kH100) < with_next);
  for (int RotatedParams::* size : {&RotatedParams::mid, &RotatedParams::k}) {
    RotatedParams other = p;
    other.*size *= 2;
    CHECK(rotated_unsupported<L>(other) != nullptr);
  }
  p.n = 1 << 15, p.h = p.w = 256;
  CHECK(rotated_unsupported<L>(p) != nullptr);
}

// The permutation of W3's rows: a thread's columns 2t, 2t + 1 of four neighbouring 8-column blocks are 8 channels in a
// row.
void test_permutation() {
  const TensorMapGeometry g = bottleneck64_map_permuted(memory, DType::kBf16);
  CHECK(defect(g) == nullptr);
  std::vector<int> channel;
  for (uint64_t a = 0; a < g.size[4]; ++a)
    for (uint64_t b = 0; b < g.size[3]; ++b)
      for (uint64_t c = 0; c < g.size[2]; ++c)
        for (uint64_t d = 0; d < g.size[1]; ++d)
          channel.push_back(
              static_cast<int>((a * g.stride[4] + b * g.stride[3] + c * g.stride[2] + d * g.stride[1]) / kRowBytes));
  CHECK(std::set<int>(channel.begin(), channel.end()).size() == 256 && channel.size() == 256);
  for (int first = 0; first < 256; first += 32)
    for (int t = 0; t < 4; ++t)
      for (int e = 0; e < 8; ++e)
        CHECK(channel[static_cast<size_t>(first + e / 2 * 8 + 2 * t + e % 2)] == first + 8 * t + e);
}

}  // namespace

int main() {
  test_conv();
  test_ring<ConvTraits<__half, 128, 256, 3, 2, false, 2>>();
  test_ring<ConvTraits<__half, 128, 128, 5, 2, true>>();
  test_ring<ConvTraits<__half, 64, 64, 6, 1, false>>();
  test_bottleneck64<false>();
  test_bottleneck64<true>();
  test_streamed<StreamedBottleneck128>();
  test_streamed<StreamedBottleneck256>();
  test_rotated<Rotated64>();
  test_rotated<Rotated128>();
  test_permutation();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
