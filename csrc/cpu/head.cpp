// The end of a classifier: the mean over the pixels of each image, and a linear layer on it.
#include <algorithm>
#include <cmath>

#include "block.h"
#include "memory.h"

namespace resnet_fused::cpu {
namespace {

constexpr int64_t kChannels = 128;          // of an image, a unit of work of the pooling
constexpr int64_t kWorthThreads = 1 << 15;  // elements read, or products, below which one thread does it: about 2 us

template <class F>
void fork(const Parallel& parallel, int64_t count, int64_t work, F f) {
  if (work < kWorthThreads || parallel.threads == 1) return f(0, count);
  parallel.run(count, [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); }, &f);
}

}  // namespace

void run_head(const Kernels& kernels, const Head& head, const Parallel& parallel) {
  if (head.n == 0) return;
  const int64_t n = head.n, c = head.c, k = head.k, pixels = int64_t{head.h} * head.w;
  const int64_t element = element_size(head.dtype);
  const bool bf16 = head.dtype == DType::kBf16;
  auto* const means = static_cast<float*>(workspace(Slot::kLevel0, static_cast<size_t>(n * c) * sizeof(float)));

  const int64_t blocks = (c + kChannels - 1) / kChannels;
  fork(parallel, n * blocks, n * c * pixels, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / blocks, channel = unit % blocks * kChannels;
      MeanArgs args;
      args.pitch = (head.x_pitch ? head.x_pitch : c) * element;
      args.x = static_cast<const char*>(head.x) + image * pixels * args.pitch + channel * element;
      args.pixels = pixels;
      args.chain = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(pixels))));
      args.channels = std::min(kChannels, c - channel);
      args.out = means + image * c + channel;
      args.bf16 = bf16;
      kernels.mean(args);
    }
  });
  fork(parallel, (k + kLinearRows - 1) / kLinearRows, n * k * c, [&](int64_t begin, int64_t end) {
    const auto* const weight = static_cast<const char*>(head.weight);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit * kLinearRows;
      LinearArgs args;
      args.x = means;
      args.ldx = c;
      args.images = n;
      args.channels = c;
      args.weight = weight + row * c * element;
      args.rows = static_cast<int>(std::min<int64_t>(kLinearRows, k - row));
      args.ahead = unit + 1 < end ? kLinearRows * c * element : 0;
      args.bias = head.bias ? head.bias + row : nullptr;
      args.out = static_cast<char*>(head.out) + row * element;
      args.out_pitch = k * element;
      args.bf16 = bf16;
      kernels.linear(args);
    }
  });
}

}  // namespace resnet_fused::cpu
