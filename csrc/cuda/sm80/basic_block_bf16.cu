// Whole basic blocks for sm_80 and later: bfloat16.
#include "cuda/sm80/basic_block_launch.h"

namespace resnet_fused::cuda::sm80 {
const BasicBlockInstances<__nv_bfloat16> basic_block_bf16;
}
