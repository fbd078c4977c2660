#define RF_TABLE kernels_avx512
#define RF_ISA Isa::kAvx512
#define RF_NAME "avx512"
#include "kernels_impl.h"
