#define RF_TABLE kernels_avx512_bf16
#define RF_ISA Isa::kAvx512Bf16
#define RF_NAME "avx512_bf16"
#include "kernels_impl.h"
