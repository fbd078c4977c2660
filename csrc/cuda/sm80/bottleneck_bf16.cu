// Whole bottlenecks for sm_80 and later: bfloat16.
#include "cuda/sm80/bottleneck_launch.h"

namespace resnet_fused::cuda::sm80 {
const BottleneckInstances16<__nv_bfloat16> bottleneck_bf16;
}
