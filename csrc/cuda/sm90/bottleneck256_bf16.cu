#include "cuda/sm90/bottleneck_streamed_launch.h"

namespace resnet_fused::cuda::sm90 {

const Registered<BottleneckParams> kIdentity{
    streamed_bottleneck<StreamedBottleneckTraits<__nv_bfloat16, StreamedBottleneck256>>(
        "bottleneck90_bf16_256_identity", DType::kBf16)};

}  // namespace resnet_fused::cuda::sm90
