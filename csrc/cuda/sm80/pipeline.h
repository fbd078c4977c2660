// The ring of shared-memory stages that cp.async fills while the warps multiply: the only place with its barriers.
#pragma once
#include "cuda/sm80/element.h"

namespace resnet_fused::cuda::sm80 {

// For every step: load(stage, step) starts this thread's copies, kStages - 1 steps ahead; landed(stage, step) runs
// once this thread's own copies are there, compute(stage, step) once every thread's are. All three see the steps in
// order. Afterwards no copy is in flight, but other warps may still be in their last compute.
template <int kStages, class Load, class Landed, class Compute>
__device__ void pipeline(int steps, Load load, Landed landed, Compute compute) {
  static_assert(kStages >= 2);
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step, step);
    ptx::cp_commit();
  }
  int stage = 0, free_stage = kStages - 1;
  for (int step = 0; step < steps; ++step) {
    ptx::cp_wait<kStages - 2>();
    landed(stage, step);
    __syncthreads();  // the step's data are there; and nobody reads the stage of the step before any more
    if (step + kStages - 1 < steps) load(free_stage, step + kStages - 1);
    ptx::cp_commit();  // even if empty: a step is one group, so that the wait above counts steps
    compute(stage, step);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    free_stage = free_stage + 1 == kStages ? 0 : free_stage + 1;
  }
}

template <int kStages, class Load, class Compute>
__device__ void pipeline(int steps, Load load, Compute compute) {
  pipeline<kStages>(steps, load, [](int, int) {}, compute);
}

}  // namespace resnet_fused::cuda::sm80
