// Stems for sm_80 and later: float32 through TF32.
#include "cuda/sm80/stem_launch.h"

namespace resnet_fused::cuda::sm80 {
const StemInstances<float> stem_tf32;
}
