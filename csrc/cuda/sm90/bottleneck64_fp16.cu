#include "cuda/sm90/bottleneck64_launch.h"

namespace resnet_fused::cuda::sm90 {

const Registered<BottleneckParams> kIdentity{
    bottleneck64<Bottleneck64Traits<__half, false>>("bottleneck90_fp16_64_identity", DType::kF16)};
const Registered<BottleneckParams> kProjection{
    bottleneck64<Bottleneck64Traits<__half, true>>("bottleneck90_fp16_64_projection", DType::kF16)};

}  // namespace resnet_fused::cuda::sm90
