// Convolutions for sm_80 and later: float16.
#include "cuda/sm80/conv_launch.h"

namespace resnet_fused::cuda::sm80 {
const ConvInstances<__half> conv_fp16;
}
