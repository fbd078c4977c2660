// Stems for sm_80 and later: float16.
#include "cuda/sm80/stem_launch.h"

namespace resnet_fused::cuda::sm80 {
const StemInstances<__half> stem_fp16;
}
