// A ring of shared-memory stages between a TMA producer and wgmma consumers, and who may touch which stage when.
#pragma once
#include "cuda/sm90/common.h"

namespace resnet_fused::cuda::sm90 {

/// Registers of a thread after setmaxnreg. Blocks of three warpgroups start with 168 (65536 / 384, in steps of 8); what
/// the producer's 128 threads give back is what the consumers get: 56 + 2 * 224 = 3 * 168.
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;

/// The q-th use of a ring of kStages stages: `stage()` is where it lives, `phase()` the parity of its full barrier.
template <int kStages>
struct RingPosition {
  uint32_t use = 0;

  __device__ uint32_t stage() const { return use % kStages; }
  __device__ uint32_t phase() const { return use / kStages & 1; }
};

/// Barriers of a ring, at `base` in shared memory: `full[s]` completes when a stage's bytes have landed, `empty[s]`
/// when every consumer has let go of them. A fresh mbarrier counts as "the phase before has completed", so producers
/// wait for phase() ^ 1.
template <int kStages>
struct Ring {
  static constexpr int kBytes = 16 * kStages;
  using Position = RingPosition<kStages>;
  uint32_t base;

  __device__ uint32_t full(uint32_t stage) const { return base + 8 * stage; }
  __device__ uint32_t empty(uint32_t stage) const { return base + 8 * kStages + 8 * stage; }

  /// By one thread, before a barrier of the whole block (of the cluster, if consumers of another block release stages
  /// here).
  __device__ void init(int releases_per_stage) const {
    for (int s = 0; s < kStages; s++) {
      ptx::mbar_init(full(s), 1);
      ptx::mbar_init(empty(s), releases_per_stage);
    }
  }

  /// Producer: waits until the stage is free, then announces `bytes` of copies to full(stage), which the caller issues.
  __device__ void acquire(Position p, uint32_t bytes) const {
    ptx::mbar_wait(empty(p.stage()), p.phase() ^ 1);
    ptx::mbar_expect_tx(full(p.stage()), bytes);
  }

  __device__ void wait_full(Position p) const { ptx::mbar_wait(full(p.stage()), p.phase()); }

  /// Consumer: one arrival per warp, after all of its lanes are done with the stage; in a cluster, one at each block,
  /// as each writes into this one's stage.
  template <int kCluster = 1>
  __device__ void release(uint32_t stage) const {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    if constexpr (kCluster == 1) {
      if (lane == 0) ptx::mbar_arrive(empty(stage));
    } else {
      if (lane < kCluster) ptx::mbar_arrive_cluster(ptx::mapa(empty(stage), lane));
    }
  }
};

/// Lets two consumer groups that share one ring take turns. Groups use disjoint stages of the ring; a parity tells one
/// use of a stage from the next only as long as no waiter is two uses behind, so a group starts its stages after the
/// other group has seen all of its own. Count `it` the tiles of the block: group it % 2 computes tile `it`.
struct Turns {
  static constexpr int kBytes = 16;
  uint32_t base;

  __device__ void init(int arrivals) const {
    ptx::mbar_init(base, arrivals);
    ptx::mbar_init(base + 8, arrivals);
  }
  __device__ void wait(int it) const {
    if (it > 0) ptx::mbar_wait(base + 8 * (it & 1), (it - 1) / 2 & 1);
  }
  /// By every warp of the group that has tile `it`, when it has seen its last stage full.
  __device__ void pass_on(int it) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbar_arrive(base + 8 * (~it & 1));
  }
};

}  // namespace resnet_fused::cuda::sm90
