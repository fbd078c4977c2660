#include "cuda/table.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/api.h"

namespace resnet_fused::cuda {
namespace {

// ---- rows ----------------------------------------------------------------------------------------------------------
template <class Params>
void append(std::vector<TableRow>& rows, const char* op) {
  for (const Kernel<Params>& k : kernels<Params>()) {
    TableRow row{op,       k.name,   k.algorithm, k.arch,         k.dtype, k.tile_m, k.tile_n,
                 k.tile_k, k.stages, k.threads,   k.shared_bytes, -1,      -1};
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, k.function) == cudaSuccess) {
      row.registers = attributes.numRegs;
      int blocks = 0;
      cudaFuncSetAttribute(k.function, cudaFuncAttributeMaxDynamicSharedMemorySize, k.shared_bytes);
      if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, k.function, k.threads,
                                                        static_cast<size_t>(k.shared_bytes)) == cudaSuccess)
        row.blocks_per_multiprocessor = blocks;
    }
    cudaGetLastError();  // a kernel that this GPU cannot run is no error of anyone's
    rows.push_back(row);
  }
}

// ---- parameters from dims ------------------------------------------------------------------------------------------
// Shapes only: the pointers say which tensors there are, and that they are aligned.
alignas(256) const char kSomewhere[256] = {};
float* vector() { return reinterpret_cast<float*>(const_cast<char*>(kSomewhere)); }
void* image() { return const_cast<char*>(kSomewhere); }
Layer layer() { return {image(), vector(), vector()}; }

class Dims {
 public:
  explicit Dims(const std::map<std::string, int64_t>& values) : values_(values) {}
  int operator()(const char* name) const {
    const auto it = values_.find(name);
    if (it == values_.end()) throw std::invalid_argument(std::string("dims: missing ") + name);
    return static_cast<int>(it->second);
  }

 private:
  const std::map<std::string, int64_t>& values_;
};

int output_size(int size, int taps, int stride, int pad, int dilation) {
  return (size + 2 * pad - dilation * (taps - 1) - 1) / stride + 1;
}

template <class Params>
Params image_params(const Dims& d, DType dtype) {
  Params p;
  p.dtype = dtype;
  p.x = image();
  p.out = image();
  p.n = d("n");
  p.h = d("h");
  p.w = d("w");
  p.c = d("c");
  p.x_pitch = p.c;
  return p;
}

ConvParams conv_params(const Dims& d, DType dtype) {
  auto p = image_params<ConvParams>(d, dtype);
  p.conv = layer();
  p.k = d("k");
  p.r = d("r");
  p.s = d("s");
  p.stride_h = d("stride_h");
  p.stride_w = d("stride_w");
  p.pad_h = d("pad_h");
  p.pad_w = d("pad_w");
  p.dil_h = d("dil_h");
  p.dil_w = d("dil_w");
  p.p = output_size(p.h, p.r, p.stride_h, p.pad_h, p.dil_h);
  p.q = output_size(p.w, p.s, p.stride_w, p.pad_w, p.dil_w);
  p.out_pitch = p.residual_pitch = p.k;
  if (d("residual")) p.residual = image();
  if (d("prologue")) p.in_scale = p.in_shift = vector();
  if (const int channels = d("projection")) {
    p.projection.x = p.projection.weight = image();
    p.projection.scale = vector();
    p.projection.h = p.p;
    p.projection.w = p.q;
    p.projection.c = channels;
    p.projection.x_pitch = channels;
  }
  return p;
}

BottleneckParams bottleneck_params(const Dims& d, DType dtype) {
  auto p = image_params<BottleneckParams>(d, dtype);
  p.conv1 = p.conv2 = p.conv3 = layer();
  if (d("projection")) p.projection = layer();
  p.mid = d("mid");
  p.k = d("out");
  p.stride1 = d("stride1");
  p.stride2 = d("stride2");
  p.dilation = d("dilation");
  p.p = output_size(output_size(p.h, 1, p.stride1, 0, 1), 3, p.stride2, p.dilation, p.dilation);
  p.q = output_size(output_size(p.w, 1, p.stride1, 0, 1), 3, p.stride2, p.dilation, p.dilation);
  p.out_pitch = p.k;
  return p;
}

BasicBlockParams basic_block_params(const Dims& d, DType dtype) {
  auto p = image_params<BasicBlockParams>(d, dtype);
  p.conv1 = p.conv2 = layer();
  if (d("projection")) p.projection = layer();
  p.mid = d("mid");
  p.k = d("out");
  p.stride = d("stride");
  p.dilation = d("dilation");
  p.p = output_size(p.h, 3, p.stride, p.dilation, p.dilation);
  p.q = output_size(p.w, 3, p.stride, p.dilation, p.dilation);
  p.out_pitch = p.k;
  return p;
}

RotatedParams rotated_params(const Dims& d, DType dtype) {
  RotatedParams p;
  p.dtype = dtype;
  p.h1 = p.x = image();
  p.y = p.h1_next = image();
  p.conv2 = p.conv3 = layer();
  if (d("depth") > 1) p.conv1 = layer();
  p.n = d("n");
  p.h = d("h");
  p.w = d("w");
  p.mid = d("mid");
  p.k = d("c");
  p.x_pitch = p.y_pitch = p.k;
  p.h1_pitch = p.h1_next_pitch = p.mid;
  return p;
}

StemParams stem_params(const Dims& d, DType dtype) {
  auto p = image_params<StemParams>(d, dtype);
  p.conv = layer();
  p.k = d("k");
  p.r = d("r");
  p.s = d("s");
  p.stride = d("stride");
  p.pad = d("pad");
  p.pool_kernel = d("pool_kernel");
  p.pool_stride = d("pool_stride");
  p.pool_padding = d("pool_padding");
  p.conv_p = output_size(p.h, p.r, p.stride, p.pad, 1);
  p.conv_q = output_size(p.w, p.s, p.stride, p.pad, 1);
  p.p = output_size(p.conv_p, p.pool_kernel, p.pool_stride, p.pool_padding, 1);
  p.q = output_size(p.conv_q, p.pool_kernel, p.pool_stride, p.pool_padding, 1);
  p.out_pitch = p.k;
  return p;
}

template <class Params>
std::vector<Candidate> best_of_each_algorithm(const Params& params, const Device& device, std::string* why) {
  std::vector<Candidate> found;
  choose(params, device, "", why);
  for (const Kernel<Params>& k : kernels<Params>()) {
    auto same = [&](const Candidate& c) { return c.algorithm == k.algorithm; };
    if (std::any_of(found.begin(), found.end(), same)) continue;
    std::string reason;
    const Kernel<Params>* best = choose(params, device, k.algorithm, &reason);
    if (best) found.push_back({k.algorithm, best->name, best->estimate(params, device)});
  }
  std::stable_sort(found.begin(), found.end(),
                   [](const Candidate& a, const Candidate& b) { return a.microseconds < b.microseconds; });
  return found;
}

}  // namespace

std::string driver_lack() {
  int driver = 0;  // 12040 is 12.4; 0 where there is no driver
  if (cudaDriverGetVersion(&driver) != cudaSuccess) {
    cudaGetLastError();
    return "";
  }
  // Within a major version an older driver runs a newer runtime.
  if (driver == 0 || driver / 1000 >= CUDART_VERSION / 1000) return "";
  const auto text = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  return "its kernels were built with CUDA " + text(CUDART_VERSION) + ", and the NVIDIA driver supports CUDA " +
         text(driver) + " at most: update the driver, or build the package with a toolkit of CUDA " +
         std::to_string(driver / 1000);
}

std::vector<TableRow> kernel_table() {
  std::vector<TableRow> rows;
  append<ConvParams>(rows, "conv");
  append<BottleneckParams>(rows, "bottleneck");
  append<BasicBlockParams>(rows, "basic_block");
  append<RotatedParams>(rows, "bottleneck_chain");
  append<StemParams>(rows, "stem");
  return rows;
}

std::vector<Candidate> candidates(const std::string& op, const std::map<std::string, int64_t>& dims, DType dtype,
                                  const Device& device, std::string* why) {
  const Dims d(dims);
  if (op == "conv") return best_of_each_algorithm(conv_params(d, dtype), device, why);
  if (op == "bottleneck") return best_of_each_algorithm(bottleneck_params(d, dtype), device, why);
  if (op == "basic_block") return best_of_each_algorithm(basic_block_params(d, dtype), device, why);
  if (op == "bottleneck_chain") return best_of_each_algorithm(rotated_params(d, dtype), device, why);
  if (op == "stem") return best_of_each_algorithm(stem_params(d, dtype), device, why);
  throw std::invalid_argument("op: expected conv, bottleneck, basic_block, bottleneck_chain or stem, got " + op);
}

}  // namespace resnet_fused::cuda
