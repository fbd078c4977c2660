#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cuda/api.h"

namespace resnet_fused::cuda {
namespace {

template <class Params>
std::vector<Kernel<Params>>& table() {
  static std::vector<Kernel<Params>> kernels;  // made by the first registration, whichever file that is in
  return kernels;
}

bool made_for(int arch, const Device& device) { return arch == 90 ? device.arch == 90 : device.arch >= arch; }

template <class Params>
std::string lack(const Kernel<Params>& kernel, const Params& params, const Device& device) {
  if (!made_for(kernel.arch, device))
    return std::string("it is made for sm_") + (kernel.arch == 90 ? "90a" : "80 and later") + ", the device is sm_" +
           std::to_string(device.arch);
  if (kernel.shared_bytes > device.shared_bytes)
    return "it needs " + std::to_string(kernel.shared_bytes) + " bytes of shared memory, a block has " +
           std::to_string(device.shared_bytes);
  if (kernel.dtype != params.dtype) return "it is compiled for another dtype";
  const char* reason = kernel.unsupported(params);
  return reason ? reason : "";
}

template <class Params>
const Kernel<Params>* best(const Params& params, const Device& device, const std::string& wanted, std::string* why) {
  const Kernel<Params>* found = nullptr;
  float least = 0;
  bool told = false;
  *why = wanted.empty() ? "no kernel is compiled for it" : "no kernel is called " + wanted;
  for (const Kernel<Params>& kernel : table<Params>()) {
    if (!wanted.empty() && wanted != kernel.name && wanted != kernel.algorithm) continue;
    // What a kernel of the right type and architecture lacks tells more than that others are of another.
    const bool of_its_kind = kernel.dtype == params.dtype && made_for(kernel.arch, device);
    if (told && !of_its_kind) continue;
    const std::string reason = lack(kernel, params, device);
    if (!reason.empty()) {
      *why = kernel.name + (": " + reason);
      told = true;
      continue;
    }
    const float estimate = kernel.estimate(params, device);
    if (!found || estimate < least) {
      found = &kernel;
      least = estimate;
    }
  }
  return found;
}

template <class Params>
void add(const Kernel<Params>& kernel) {
  auto& all = table<Params>();
  auto before = [](const Kernel<Params>& a, const Kernel<Params>& b) { return std::strcmp(a.name, b.name) < 0; };
  auto at = std::lower_bound(all.begin(), all.end(), kernel, before);
  if (at != all.end() && !before(kernel, *at)) throw std::logic_error(std::string("two kernels named ") + kernel.name);
  all.insert(at, kernel);
}

}  // namespace

#define DEFINE(Params)                                                                                \
  template <>                                                                                         \
  const std::vector<Kernel<Params>>& kernels() {                                                      \
    return table<Params>();                                                                           \
  }                                                                                                   \
  template <>                                                                                         \
  std::string unsupported(const Kernel<Params>& kernel, const Params& params, const Device& device) { \
    return lack(kernel, params, device);                                                              \
  }                                                                                                   \
  template <>                                                                                         \
  const Kernel<Params>* choose(const Params& params, const Device& device, const std::string& wanted, \
                               std::string* why) {                                                    \
    return best(params, device, wanted, why);                                                         \
  }                                                                                                   \
  template <>                                                                                         \
  Registered<Params>::Registered(const Kernel<Params>& kernel) {                                      \
    add(kernel);                                                                                      \
  }
DEFINE(ConvParams)
DEFINE(BottleneckParams)
DEFINE(BasicBlockParams)
DEFINE(RotatedParams)
DEFINE(StemParams)

}  // namespace resnet_fused::cuda
