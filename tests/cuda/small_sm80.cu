// Every kernel of csrc/cuda/sm80 once, at a small size and in one type: what the sanitizers and the planted bugs run.
// A planted bug needs no more than the kernel that it is in: -DSMALL_CONV, -DSMALL_ACTIVATED, -DSMALL_DUAL,
// -DSMALL_BOTTLENECK, -DSMALL_BASIC_BLOCK and -DSMALL_STEM choose.
#include "cuda/sm80/basic_block_launch.h"
#include "cuda/sm80/bottleneck_launch.h"
#include "cuda/sm80/conv_launch.h"
#include "cuda/sm80/stem_launch.h"

namespace resnet_fused::cuda::sm80 {

using Size = GemmTile<__nv_bfloat16, 64, 64, 2, 2, 64, 3>;
#ifdef SMALL_CONV
const Registered<ConvParams> plain{conv<Size>()};
const Registered<ConvParams> split{conv<Size, ConvKind::kPlain, true>()};
#endif
#ifdef SMALL_ACTIVATED
const Registered<ConvParams> activated{conv<Size, ConvKind::kPreActivated>()};
#endif
#ifdef SMALL_DUAL
const Registered<ConvParams> dual{conv<Size, ConvKind::kDual>()};
#endif
#ifdef SMALL_BOTTLENECK
using Mid64 = BottleneckTile<__nv_bfloat16, 64, PixelTile<4, 8, 1>, 64, 2, 2, 3>;
const Registered<BottleneckParams> mid64{bottleneck<Mid64>()};
#endif
#ifdef SMALL_BASIC_BLOCK
using Channels16 = BasicBlockTile<__nv_bfloat16, 16, PixelTile<4, 8, 1>, 32, 2, 1, 3>;
const Registered<BasicBlockParams> channels16{basic_block<Channels16>()};
#endif
#ifdef SMALL_STEM
const Registered<StemParams> rows96{stem<StemTile<__nv_bfloat16, 96, 2, 2>>()};
#endif

}  // namespace resnet_fused::cuda::sm80
