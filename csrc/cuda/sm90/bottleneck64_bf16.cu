#include "cuda/sm90/bottleneck64_launch.h"

namespace resnet_fused::cuda::sm90 {

const Registered<BottleneckParams> kIdentity{
    bottleneck64<Bottleneck64Traits<__nv_bfloat16, false>>("bottleneck90_bf16_64_identity", DType::kBf16)};
const Registered<BottleneckParams> kProjection{
    bottleneck64<Bottleneck64Traits<__nv_bfloat16, true>>("bottleneck90_bf16_64_projection", DType::kBf16)};

}  // namespace resnet_fused::cuda::sm90
