// Which instruction sets this build has and this machine runs.
#pragma once
#include <string>

#include "kernels.h"

namespace resnet_fused::cpu {

RF_EXPORT const char* isa_name(Isa isa);
// Compiled in, offered by the processor and allowed by the operating system (AMX needs its permission).
RF_EXPORT bool isa_runs(Isa isa);
// By name; throws std::invalid_argument on any other.
RF_EXPORT Isa isa_named(const std::string& name);
// The table in use: the one that RESNET_FUSED_CPU_ISA names or the best that runs, until select_isa() says otherwise.
RF_EXPORT const Kernels& kernels();
RF_EXPORT const Kernels& kernels_of(Isa isa);
RF_EXPORT void select_isa(Isa isa);
// Time of the wide tile per row and column, relative to the tall one's.
double wide_tile_cost();

// Bytes/s of one thread, for the cost model: out of memory, out of L3, and of what is written and read again in L2.
struct MemoryRates {
  double memory, shared_cache, own_cache;
};
MemoryRates memory_rates();

}  // namespace resnet_fused::cpu
