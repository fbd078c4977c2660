#define RF_TABLE kernels_avx2
#define RF_ISA Isa::kAvx2
#define RF_NAME "avx2"
#include "kernels_impl.h"
