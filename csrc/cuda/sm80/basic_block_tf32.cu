// Whole basic blocks for sm_80 and later: float32 through TF32.
#include "cuda/sm80/basic_block_launch.h"

namespace resnet_fused::cuda::sm80 {
const BasicBlockInstances<float> basic_block_tf32;
}
