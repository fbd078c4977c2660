// Which instruction sets this build has and this machine runs.
#pragma once
#include "kernels.h"

namespace resnet_fused::cpu {

RF_EXPORT const char* isa_name(Isa isa);
// Compiled in, offered by the processor and allowed by the operating system (AMX needs its permission).
RF_EXPORT bool isa_runs(Isa isa);
// The table in use: the best that runs, until select_isa() or RESNET_FUSED_CPU_ISA says otherwise.
RF_EXPORT const Kernels& kernels();
RF_EXPORT const Kernels& kernels_of(Isa isa);
RF_EXPORT void select_isa(Isa isa);
// Time of the wide tile per row and column, relative to the tall one's.
double wide_tile_cost();

}  // namespace resnet_fused::cpu
