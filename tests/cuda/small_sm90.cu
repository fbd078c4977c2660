// The kernels of csrc/cuda/sm90 at sizes of use to tests only: rings of so few stages that small images go round them.
// A planted bug needs no more than the kernel that it is in: -DSMALL_SHARED, -DSMALL_PING_PONG, -DSMALL_SPLIT,
// -DSMALL_DUAL, -DSMALL_BOTTLENECK, -DSMALL_STREAMED and -DSMALL_ROTATED choose.
#include "cuda/sm90/bottleneck64_launch.h"
#include "cuda/sm90/bottleneck_streamed_launch.h"
#include "cuda/sm90/conv_launch.h"
#include "cuda/sm90/rotated_launch.h"

namespace resnet_fused::cuda::sm90 {

using Element = __nv_bfloat16;
#ifdef SMALL_SHARED
using Shared = ConvTraits<Element, 128, 64, 2, 2, false>;
const Registered<ConvParams> kShared{conv<Shared>("small90_bf16_shared", DType::kBf16)};
#endif
#ifdef SMALL_PING_PONG
using PingPong = ConvTraits<Element, 128, 64, 3, 2, true, 2>;
const Registered<ConvParams> kPingPong{conv<PingPong>("small90_bf16_ping_pong_x2", DType::kBf16)};
#endif
#ifdef SMALL_SPLIT
using Split = ConvTraits<Element, 64, 64, 2, 1, false>;
const Registered<ConvParams> kSplit{conv_split<Split>("small90_bf16_split", DType::kBf16)};
#endif
#ifdef SMALL_DUAL
using Dual = ConvTraits<Element, 64, 64, 2, 1, false, 1, true>;
const Registered<ConvParams> kDual{conv<Dual>("small90_bf16_dual", DType::kBf16)};
#endif
#ifdef SMALL_BOTTLENECK
using Identity = Bottleneck64Traits<Element, false>;
const Registered<BottleneckParams> kIdentity{bottleneck64<Identity>("small90_bf16_identity", DType::kBf16)};
#endif
#ifdef SMALL_STREAMED
using Streamed = StreamedBottleneckTraits<Element, StreamedBottleneckLayout<128, 256, 6, 1, 4, 2>>;
const Registered<BottleneckParams> kStreamed{streamed_bottleneck<Streamed>("small90_bf16_streamed", DType::kBf16)};
#endif
#ifdef SMALL_ROTATED
using Rotated = RotatedTraits<Element, RotatedLayout<128, 128, 2, 2, 2>>;
const Registered<RotatedParams> kRotated{rotated<Rotated>("small90_bf16_rotated", DType::kBf16)};
#endif

}  // namespace resnet_fused::cuda::sm90
