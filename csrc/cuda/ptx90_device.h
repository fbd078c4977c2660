// Bodies of cuda/ptx90.h under nvcc.
#pragma once
#include "cuda/wgmma_device.h"

namespace ptx {

// ---- mbarrier ------------------------------------------------------------------------------------------------------
PTX_INLINE void mbar_init(uint32_t m, uint32_t n) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(m), "r"(n) : "memory");
}
PTX_INLINE void mbar_arrive(uint32_t m) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(m) : "memory");
}
PTX_INLINE void mbar_arrive_cluster(uint32_t m) {
  // With .release.cluster ptxas puts a fence of the whole GPU before it: 58 in a streamed bottleneck.
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(m) : "memory");
}
PTX_INLINE void mbar_expect_tx(uint32_t m, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(m), "r"(bytes) : "memory");
}
PTX_INLINE void mbar_wait(uint32_t m, uint32_t parity) {
  asm volatile("{\n.reg .pred p;\nL%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra L%=;\n}" ::"r"(m),
               "r"(parity)
               : "memory");
}
PTX_INLINE void fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
PTX_INLINE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- TMA -----------------------------------------------------------------------------------------------------------
#define PTX_TMA_LOAD(rank, mode) \
  "cp.async.bulk.tensor." rank ".shared::cluster.global." mode ".mbarrier::complete_tx::bytes"
PTX_INLINE void tma_load_2d(uint32_t dst, const CUtensorMap* map, uint32_t m, int c0, int c1) {
  asm volatile(PTX_TMA_LOAD("2d", "tile") " [%0], [%1, {%3,%4}], [%2];" ::"r"(dst), "l"(map), "r"(m), "r"(c0), "r"(c1)
               : "memory");
}
PTX_INLINE void tma_load_3d(uint32_t dst, const CUtensorMap* map, uint32_t m, int c0, int c1, int c2) {
  asm volatile(PTX_TMA_LOAD("3d", "tile") " [%0], [%1, {%3,%4,%5}], [%2];" ::"r"(dst), "l"(map), "r"(m), "r"(c0),
               "r"(c1), "r"(c2)
               : "memory");
}
PTX_INLINE void tma_load_4d(uint32_t dst, const CUtensorMap* map, uint32_t m, int c0, int c1, int c2, int c3) {
  asm volatile(PTX_TMA_LOAD("4d", "tile") " [%0], [%1, {%3,%4,%5,%6}], [%2];" ::"r"(dst), "l"(map), "r"(m), "r"(c0),
               "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
PTX_INLINE void tma_load_5d(uint32_t dst, const CUtensorMap* map, uint32_t m, int c0, int c1, int c2, int c3, int c4) {
  asm volatile(PTX_TMA_LOAD("5d", "tile") " [%0], [%1, {%3,%4,%5,%6,%7}], [%2];" ::"r"(dst), "l"(map), "r"(m), "r"(c0),
               "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}
PTX_INLINE void tma_load_multicast_2d(uint32_t dst, const CUtensorMap* map, uint32_t m, uint16_t mask, int c0, int c1) {
  asm volatile(PTX_TMA_LOAD("2d", "tile") ".multicast::cluster [%0], [%1, {%3,%4}], [%2], %5;" ::"r"(dst), "l"(map),
               "r"(m), "r"(c0), "r"(c1), "h"(mask)
               : "memory");
}
PTX_INLINE void tma_load_multicast_4d(uint32_t dst, const CUtensorMap* map, uint32_t m, uint16_t mask, int c0, int c1,
                                      int c2, int c3) {
  asm volatile(PTX_TMA_LOAD("4d", "tile") ".multicast::cluster [%0], [%1, {%3,%4,%5,%6}], [%2], %7;" ::"r"(dst),
               "l"(map), "r"(m), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(mask)
               : "memory");
}
PTX_INLINE void tma_load_im2col(uint32_t dst, const CUtensorMap* map, uint32_t m, int c, int w, int h, int n, int s,
                                int r) {
  asm volatile(PTX_TMA_LOAD("4d", "im2col") " [%0], [%1, {%3,%4,%5,%6}], [%2], {%7,%8};" ::"r"(dst), "l"(map), "r"(m),
               "r"(c), "r"(w), "r"(h), "r"(n), "h"(static_cast<unsigned short>(s)), "h"(static_cast<unsigned short>(r))
               : "memory");
}
#undef PTX_TMA_LOAD
#define PTX_TMA_STORE(rank) "cp.async.bulk.tensor." rank ".global.shared::cta.tile.bulk_group"
PTX_INLINE void tma_store_2d(const CUtensorMap* map, uint32_t src, int c0, int c1) {
  asm volatile(PTX_TMA_STORE("2d") " [%0, {%2,%3}], [%1];" ::"l"(map), "r"(src), "r"(c0), "r"(c1) : "memory");
}
PTX_INLINE void tma_store_3d(const CUtensorMap* map, uint32_t src, int c0, int c1, int c2) {
  asm volatile(PTX_TMA_STORE("3d") " [%0, {%2,%3,%4}], [%1];" ::"l"(map), "r"(src), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}
PTX_INLINE void tma_store_4d(const CUtensorMap* map, uint32_t src, int c0, int c1, int c2, int c3) {
  asm volatile(PTX_TMA_STORE("4d") " [%0, {%2,%3,%4,%5}], [%1];" ::"l"(map), "r"(src), "r"(c0), "r"(c1), "r"(c2),
               "r"(c3)
               : "memory");
}
PTX_INLINE void tma_store_5d(const CUtensorMap* map, uint32_t src, int c0, int c1, int c2, int c3, int c4) {
  asm volatile(PTX_TMA_STORE("5d") " [%0, {%2,%3,%4,%5,%6}], [%1];" ::"l"(map), "r"(src), "r"(c0), "r"(c1), "r"(c2),
               "r"(c3), "r"(c4)
               : "memory");
}
#undef PTX_TMA_STORE
PTX_INLINE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N>
PTX_INLINE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
PTX_INLINE void tma_prefetch(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
PTX_INLINE void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t m) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
               "l"(src), "r"(bytes), "r"(m)
               : "memory");
}

// ---- matrices ------------------------------------------------------------------------------------------------------
PTX_INLINE void stmatrix_x4(uint32_t addr, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(addr), "r"(r0), "r"(r1), "r"(r2),
               "r"(r3)
               : "memory");
}
PTX_INLINE void stmatrix_x4_t(uint32_t addr, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(addr), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}
template <int R>
PTX_INLINE void reg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R));
}
template <int R>
PTX_INLINE void reg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R));
}

// ---- clusters and grids --------------------------------------------------------------------------------------------
PTX_INLINE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
PTX_INLINE uint32_t mapa(uint32_t addr, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(addr), "r"(rank));
  return mapped;
}
PTX_INLINE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
PTX_INLINE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
PTX_INLINE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
PTX_INLINE void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
PTX_INLINE void grid_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace ptx
