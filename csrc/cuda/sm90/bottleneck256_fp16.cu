#include "cuda/sm90/bottleneck_streamed_launch.h"

namespace resnet_fused::cuda::sm90 {

const Registered<BottleneckParams> kIdentity{
    streamed_bottleneck<StreamedBottleneckTraits<__half, StreamedBottleneck256>>("bottleneck90_fp16_256_identity",
                                                                                 DType::kF16)};

}  // namespace resnet_fused::cuda::sm90
