// Convolutions for sm_80 and later: float32 through TF32.
#include "cuda/sm80/conv_launch.h"

namespace resnet_fused::cuda::sm80 {
const ConvInstances<float> conv_tf32;
}
