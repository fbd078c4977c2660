#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace resnet_fused::cpu {
namespace {

#if defined(__x86_64__)
bool amx_permitted() {
#if defined(__linux__)
  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): once per process, before the first tile instruction.
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

// What __builtin_cpu_supports of older compilers does not know.
bool cpuid_bit(unsigned leaf, unsigned subleaf, char reg, int bit) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(leaf, subleaf, &a, &b, &c, &d)) return false;
  const unsigned v = reg == 'a' ? a : reg == 'b' ? b : reg == 'c' ? c : d;
  return (v >> bit) & 1;
}

bool detect(Isa isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpuid_bit(1, 0, 'c', 29);
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && cpuid_bit(7, 1, 'a', 5);
  switch (isa) {
    case Isa::kPortable:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return bf16;
    case Isa::kAmx:
      return bf16 && cpuid_bit(7, 0, 'd', 24) && cpuid_bit(7, 0, 'd', 22) && amx_permitted();
  }
  return false;
}

Isa best() {
  if (isa_runs(Isa::kAmx)) return Isa::kAmx;
  // vdpbf16ps does 2x the FLOPs of FMA on Zen 4 and 5, but half of them on Intel (51 against 107 GFLOP/s a core,
  // Sapphire Rapids): there bfloat16 is computed in float32.
  if (isa_runs(Isa::kAvx512Bf16) && __builtin_cpu_is("amd")) return Isa::kAvx512Bf16;
  if (isa_runs(Isa::kAvx512)) return Isa::kAvx512;
  return isa_runs(Isa::kAvx2) ? Isa::kAvx2 : Isa::kPortable;
}
#else
bool detect(Isa isa) { return isa == Isa::kPortable; }
Isa best() { return Isa::kPortable; }
#endif

bool is_intel() {
#if defined(__x86_64__)
  static const bool intel = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
  return intel;
#else
  return false;
#endif
}

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

const char* isa_name(Isa isa) {
  static const char* const names[kIsaCount] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
  return names[static_cast<int>(isa)];
}

Isa isa_named(const std::string& name) {
  for (int i = 0; i < kIsaCount; ++i)
    if (name == isa_name(static_cast<Isa>(i))) return static_cast<Isa>(i);
  throw std::invalid_argument("isa: expected portable, avx2, avx512, avx512_bf16 or amx, got " + name);
}

bool isa_runs(Isa isa) {
  static const bool runs[kIsaCount] = {detect(Isa::kPortable), detect(Isa::kAvx2), detect(Isa::kAvx512),
                                       detect(Isa::kAvx512Bf16), detect(Isa::kAmx)};
  return runs[static_cast<int>(isa)];
}

const Kernels& kernels_of(Isa isa) {
  if (!isa_runs(isa)) {
    std::string known;
    for (int i = 0; i < kIsaCount; ++i)
      if (isa_runs(static_cast<Isa>(i)))
        known += std::string(known.empty() ? "" : ", ") + isa_name(static_cast<Isa>(i));
    throw std::invalid_argument(std::string("isa: this machine does not run ") + isa_name(isa) + ", only " + known);
  }
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return kernels_avx2();
    case Isa::kAvx512:
      return kernels_avx512();
    case Isa::kAvx512Bf16:
      return kernels_avx512_bf16();
    case Isa::kAmx:
      return kernels_amx();
#endif
    default:
      return kernels_portable();
  }
}

const Kernels& kernels() {
  const Kernels* k = selected.load(std::memory_order_acquire);
  if (!k) {
    const char* wanted = std::getenv("RESNET_FUSED_CPU_ISA");
    k = &kernels_of(wanted && *wanted ? isa_named(wanted) : best());
    selected.store(k, std::memory_order_release);
  }
  return *k;
}

double wide_tile_cost() {
  // Sapphire Rapids: 14 x 32 reaches 0.72 of the FMA peak and 6 x 64 0.83, bound by loads; Zen 4 and 5: 0.97 with
  // 14 x 32.
  return is_intel() ? 0.87 : 1.0;
}

MemoryRates memory_rates() {
  // Sapphire Rapids, two busy threads; Zen 4: 18 to 22, 99 and 105 GB/s, one thread. The last: half of what L2 gives.
  return is_intel() ? MemoryRates{8e9, 20e9, 30e9} : MemoryRates{16e9, 80e9, 60e9};
}

void select_isa(Isa isa) { selected.store(&kernels_of(isa), std::memory_order_release); }

}  // namespace resnet_fused::cpu
