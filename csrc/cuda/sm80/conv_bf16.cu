// Convolutions for sm_80 and later: bfloat16.
#include "cuda/sm80/conv_launch.h"

namespace resnet_fused::cuda::sm80 {
const ConvInstances<__nv_bfloat16> conv_bf16;
}
