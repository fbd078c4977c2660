// Dense blocks without concatenation: every layer reads a slice of one buffer and writes the next one.
#include <cstring>

#include "block.h"

namespace resnet_fused::cpu {

Block dense_layer(const DenseShape& s, int i, void* buffer) {
  static const float prologue = 0;  // stands for vectors that are not null
  const int c = s.channels(i);
  Block b;
  b.n = s.n;
  b.h = s.h;
  b.w = s.w;
  b.dtype = s.dtype;
  b.x = buffer;
  b.out = static_cast<char*>(buffer) + int64_t{c} * element_size(s.dtype);
  b.x_pitch = b.out_pitch = s.channels(s.count);
  b.reread = true;
  b.in_scale = b.in_shift = &prologue;
  if (s.mid) b.layers[b.layer_count++].shape = square_conv(c, s.mid, 1, 1, 1);
  Layer& last = b.layers[b.layer_count++];
  last.shape = square_conv(s.mid ? s.mid : c, s.growth, 3, 1, 1);
  last.algorithm = s.algorithm;
  last.relu = false;
  return b;
}

void copy_into_buffer(const DenseShape& s, const void* x, Pitch x_pitch, void* buffer, const Parallel& parallel) {
  const int64_t element = element_size(s.dtype), from_pitch = (x_pitch ? x_pitch : s.c) * element,
                to_pitch = s.channels(s.count) * element;
  auto copy = [&](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel)
      std::memcpy(static_cast<char*>(buffer) + pixel * to_pitch, static_cast<const char*>(x) + pixel * from_pitch,
                  static_cast<size_t>(s.c * element));
  };
  parallel.run(
      int64_t{s.n} * s.h * s.w, [](int64_t a, int64_t b, void* f) { (*static_cast<decltype(copy)*>(f))(a, b); }, &copy);
}

void run_dense_block(const Kernels& kernels, const DenseShape& s, const void* x, Pitch x_pitch, void* buffer,
                     const std::vector<Block>& layers, const Parallel& parallel) {
  copy_into_buffer(s, x, x_pitch, buffer, parallel);
  Sequence(kernels, layers, parallel.threads).run(parallel);
}

}  // namespace resnet_fused::cpu
