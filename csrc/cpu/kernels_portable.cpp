#define RF_TABLE kernels_portable
#define RF_ISA Isa::kPortable
#define RF_NAME "portable"
#include "kernels_impl.h"
