// 128x128 tiles in ping-pong: the general choice.
#include "cuda/sm90/conv_launch.h"

namespace resnet_fused::cuda::sm90 {

using T = ConvTraits<__nv_bfloat16, 128, 128, 5, 2, true>;
const Registered<ConvParams> kConv{conv<T>("conv90_bf16_128x128_ping_pong", DType::kBf16)};

using Multicast = ConvTraits<__nv_bfloat16, 128, 128, 5, 2, true, 2>;
const Registered<ConvParams> kMulticast{conv<Multicast>("conv90_bf16_128x128_ping_pong_x2", DType::kBf16)};

}  // namespace resnet_fused::cuda::sm90
