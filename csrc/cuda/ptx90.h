// Instructions of sm_90a behind one interface with two bodies, like cuda/ptx.h: mbarrier, TMA, wgmma, clusters. Shared
// addresses are 32 bits; CUtensorMap parameters are `const __grid_constant__`.
//
// mbarrier (8 bytes of shared memory)
//   mbar_init(m, n)            n arrivals complete a phase; then fence_init() and a block (cluster) barrier
//   mbar_arrive(m)             one arrival
//   mbar_arrive_cluster(m)     one at another block's, from mapa: after wgmma's reads, orders no plain loads and stores
//   mbar_expect_tx(m, bytes)   one arrival that also expects bytes of TMA
//   mbar_wait(m, parity)       until the phase of this parity is complete; a fresh barrier has completed parity 1
//
// TMA: dst aligned to 128 bytes, with 128-byte swizzle to 1024; one thread calls
//   tma_load_{2,3,4,5}d(dst, map, m, c0, ...)             a box, its bytes reported to mbarrier m; outside is 0
//   tma_load_multicast_{2,4}d(dst, map, m, mask, c0, ...) to the same offsets of every block of the cluster in mask
//   tma_load_im2col(dst, map, m, c, w, h, n, s, r)        map.pixels pixels from (w, h, n) on, shifted by the tap (s,
//   r) tma_store_{2,3,4,5}d(map, src, c0, ...)               after fence_async() by the writers and a barrier
//   tma_store_commit(), tma_store_wait<N>()               at most N groups of stores still read shared memory
//   tma_prefetch(map)
//   bulk_load(dst, src, bytes, m)                         a dense piece of global memory, multiples of 16 bytes
//   fence_async()              this thread's stores to shared memory become visible to TMA and wgmma
//
// wgmma: 64 x N products by a warpgroup, N = 2 * size of d, a multiple of 8; depth 32 bytes (16 elements, 8 of TF32)
//   wg_desc<S>(addr)                 operand, K-major, rows of S bytes swizzled by S = 128, 64 or 32, 8 rows an atom.
//                                    Steps in K add bytes / 16 to the descriptor
//   wg_desc_ns(addr, lbo, sbo)       not swizzled: 8 rows of 16 bytes packed; the next 16 bytes in K at lbo, the next
//                                    8 rows at sbo
//   wg_fence()                       before the first wgmma of a group
//   wgmma<T>(d, a, b, accumulate)    a: descriptor, or uint32_t[4] in registers, laid out as for mma, 16 rows a warp;
//                                    d of warp w: rows 16w + g and + 8, d[4j..4j+3] as mma's d at column 8j
//   wg_commit(), wg_wait<N>()
//   Registers of a group belong to the hardware until the wait.
//
// Other
//   stmatrix_x4(addr, r0..r3), stmatrix_x4_t   ldmatrix's opposite
//   reg_inc<R>(), reg_dec<R>()                 setmaxnreg by all warps of a warpgroup
//   cluster_rank(), mapa(addr, rank), cluster_arrive(), cluster_wait(), cluster_sync()
//   grid_wait(), grid_launch_dependents()      programmatic dependent launch
#pragma once
#include <cuda.h>

#include "cuda/ptx.h"

#ifdef __CUDACC__
#include "cuda/ptx90_device.h"
#else
#include "ptx90_emulated.h"
#endif
