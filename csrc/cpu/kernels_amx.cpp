#define RF_TABLE kernels_amx
#define RF_ISA Isa::kAmx
#define RF_NAME "amx"
#include "kernels_impl.h"
