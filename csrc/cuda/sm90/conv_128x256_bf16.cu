// 128x256 tiles shared by both groups: the fewest bytes per product, for deep sums.
#include "cuda/sm90/conv_launch.h"

namespace resnet_fused::cuda::sm90 {

using T = ConvTraits<__nv_bfloat16, 128, 256, 3, 2, false>;
const Registered<ConvParams> kConv{conv<T>("conv90_bf16_128x256", DType::kBf16)};

using Multicast = ConvTraits<__nv_bfloat16, 128, 256, 3, 2, false, 2>;
const Registered<ConvParams> kMulticast{conv<Multicast>("conv90_bf16_128x256_x2", DType::kBf16)};

}  // namespace resnet_fused::cuda::sm90
