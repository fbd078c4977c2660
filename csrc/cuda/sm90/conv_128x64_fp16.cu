// 128x64 tiles in ping-pong: layers of 64 output channels.
#include "cuda/sm90/conv_launch.h"

namespace resnet_fused::cuda::sm90 {

using T = ConvTraits<__half, 128, 64, 8, 2, true>;
const Registered<ConvParams> kConv{conv<T>("conv90_fp16_128x64_ping_pong", DType::kF16)};

}  // namespace resnet_fused::cuda::sm90
