// Stems for sm_80 and later: bfloat16.
#include "cuda/sm80/stem_launch.h"

namespace resnet_fused::cuda::sm80 {
const StemInstances<__nv_bfloat16> stem_bf16;
}
