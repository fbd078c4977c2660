#include "cuda/sm90/rotated_launch.h"

namespace resnet_fused::cuda::sm90 {

const Registered<RotatedParams> kRotated{rotated<RotatedTraits<__half, Rotated64>>("rotated90_fp16_64", DType::kF16)};

}  // namespace resnet_fused::cuda::sm90
