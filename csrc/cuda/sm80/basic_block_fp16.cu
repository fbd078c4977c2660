// Whole basic blocks for sm_80 and later: float16.
#include "cuda/sm80/basic_block_launch.h"

namespace resnet_fused::cuda::sm80 {
const BasicBlockInstances<__half> basic_block_fp16;
}
