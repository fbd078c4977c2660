// Whole bottlenecks for sm_80 and later: float16.
#include "cuda/sm80/bottleneck_launch.h"

namespace resnet_fused::cuda::sm80 {
const BottleneckInstances16<__half> bottleneck_fp16;
}
