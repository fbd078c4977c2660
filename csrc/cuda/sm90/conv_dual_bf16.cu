// A block's last layer and its projection in one kernel; two sums a thread, hence the smaller tiles.
#include "cuda/sm90/conv_launch.h"

namespace resnet_fused::cuda::sm90 {

using Large = ConvTraits<__nv_bfloat16, 128, 64, 8, 2, true, 1, true>;
const Registered<ConvParams> kLarge{conv<Large>("conv90_bf16_128x64_ping_pong_dual", DType::kBf16)};

using Wide = ConvTraits<__nv_bfloat16, 128, 128, 5, 2, false, 1, true>;
const Registered<ConvParams> kWide{conv<Wide>("conv90_bf16_128x128_dual", DType::kBf16)};

using Small = ConvTraits<__nv_bfloat16, 64, 64, 6, 1, false, 1, true>;
const Registered<ConvParams> kSmall{conv<Small>("conv90_bf16_64x64_dual", DType::kBf16)};

}  // namespace resnet_fused::cuda::sm90
