#include "cuda/sm90/rotated_launch.h"

namespace resnet_fused::cuda::sm90 {

const Registered<RotatedParams> kRotated{
    rotated<RotatedTraits<__nv_bfloat16, Rotated64>>("rotated90_bf16_64", DType::kBf16)};

}  // namespace resnet_fused::cuda::sm90
