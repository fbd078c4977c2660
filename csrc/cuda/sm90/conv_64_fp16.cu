// Small tiles: few output pixels, as at batch 1; with the depth split where even those are too few.
#include "cuda/sm90/conv_launch.h"

namespace resnet_fused::cuda::sm90 {

using Square = ConvTraits<__half, 64, 64, 6, 1, false>;
const Registered<ConvParams> kSquare{conv<Square>("conv90_fp16_64x64", DType::kF16)};
const Registered<ConvParams> kSquareSplit{conv_split<Square>("conv90_fp16_64x64_split", DType::kF16)};

using Wide = ConvTraits<__half, 64, 128, 6, 1, false>;
const Registered<ConvParams> kWide{conv<Wide>("conv90_fp16_64x128", DType::kF16)};
const Registered<ConvParams> kWideSplit{conv_split<Wide>("conv90_fp16_64x128_split", DType::kF16)};

}  // namespace resnet_fused::cuda::sm90
