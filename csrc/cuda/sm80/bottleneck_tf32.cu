// Whole bottlenecks for sm_80 and later: float32 through TF32.
#include "cuda/sm80/bottleneck_launch.h"

namespace resnet_fused::cuda::sm80 {
const BottleneckInstances<float> bottleneck_tf32;
}
