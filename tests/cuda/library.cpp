// The CUDA kernels in CPU execution as a shared library, which tests/cuda_emulated.py calls through ctypes: the same
// launchers and the same table of kernels as on a GPU.
#include <cstdlib>
#include <cstring>
#include <limits>
#include <sstream>
#include <string>

#include "cuda/api.h"
#include "emulator.h"

namespace {

using namespace resnet_fused::cuda;

std::string message;  // of the last failure

template <class Params>
void describe(std::ostringstream& out, const char* op) {
  for (const Kernel<Params>& k : kernels<Params>())
    out << op << ' ' << k.name << ' ' << k.algorithm << ' ' << k.arch << ' ' << static_cast<int>(k.dtype) << ' '
        << k.tile_m << ' ' << k.tile_n << ' ' << k.tile_k << ' ' << k.stages << ' ' << k.threads << ' '
        << k.shared_bytes << '\n';
}

const char* run(const std::function<void()>& body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

template <class Params>
const Kernel<Params>& pick(const Params& params, const Device& device, const char* wanted) {
  std::string why;
  const Kernel<Params>* kernel = choose(params, device, wanted, &why);
  if (!kernel) throw std::runtime_error(why);
  return *kernel;
}

// The workspace is filled with NaN and has its exact size.
template <class Params>
const char* launch(const Params* params, const Device* device, const char* wanted) {
  return run([&] {
    const Kernel<Params>& kernel = pick(*params, *device, wanted);
    const int64_t bytes = kernel.workspace_bytes(*params, *device);
    void* workspace = nullptr;
    if (bytes && posix_memalign(&workspace, 256, static_cast<size_t>(bytes))) throw std::bad_alloc();
    const std::unique_ptr<void, void (*)(void*)> owner(workspace, std::free);
    if (workspace) std::memset(workspace, 0xff, static_cast<size_t>(bytes));
    kernel.launch(*params, *device, workspace, nullptr);
  });
}

// The name of the kernel that would run, in `name`.
template <class Params>
const char* name_chosen(const Params* params, const Device* device, const char* wanted, char* name, size_t size) {
  return run([&] { std::snprintf(name, size, "%s", pick(*params, *device, wanted).name); });
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// One line a kernel: op name algorithm arch dtype tile_m tile_n tile_k stages threads shared_bytes.
EXPORT const char* emulated_kernels() {
  static const std::string lines = [] {
    std::ostringstream out;
    describe<ConvParams>(out, "conv");
    describe<BottleneckParams>(out, "bottleneck");
    describe<BasicBlockParams>(out, "basic_block");
    describe<RotatedParams>(out, "bottleneck_chain");
    describe<StemParams>(out, "stem");
    return out.str();
  }();
  return lines.c_str();
}

EXPORT const char* emulated_options(const char* order, const char* async, uint64_t seed, int threads) {
  return run([&] { emu::options() = {emu::order_named(order), emu::async_named(async), seed, threads}; });
}

#define OP(name, Params)                                                                                      \
  EXPORT size_t emulated_##name##_size() { return sizeof(Params); }                                           \
  EXPORT const char* emulated_##name(const Params* params, const Device* device, const char* wanted) {        \
    return launch(params, device, wanted);                                                                    \
  }                                                                                                           \
  EXPORT const char* emulated_##name##_choice(const Params* params, const Device* device, const char* wanted, \
                                              char* out, size_t size) {                                       \
    return name_chosen(params, device, wanted, out, size);                                                    \
  }
OP(conv, ConvParams)
OP(bottleneck, BottleneckParams)
OP(basic_block, BasicBlockParams)
OP(bottleneck_chain, RotatedParams)
OP(stem, StemParams)
