// Instructions of sm_80 that C++ has no name for, behind one interface with two bodies: inline PTX under nvcc,
// lane-exact execution on the CPU under a host compiler (tests/cuda/ptx_emulated.h). Kernels are written against this
// header only.
//
//   DYN_SMEM(name)                 declares the block's dynamic shared memory, aligned to 1024 bytes
//   smem_addr(p)                   32-bit shared address of a pointer into it; all `addr` below are such
//
//   cp_async<B>(addr, src, valid)  copy B = 4, 8 or 16 bytes from global memory asynchronously; zeros where not `valid`
//   cp_async16(addr, src, valid)   the same for 16 bytes, past L1
//   cp_commit(), cp_wait<N>()      close the group of copies; wait until at most N of this thread's groups are pending
//
//   ldmatrix_x4(r, addr)           four 8x8 matrices of 16-bit words; lane l gives row l % 8 of matrix l / 8
//   ldmatrix_x4_t(r, addr)         the same, each transposed
//   mma<T>(d, a, b0, b1)           d[16x8] += a[16xK] b[Kx8], float32 sums; K = 16 for __nv_bfloat16 and __half; T =
//   float
//                                  is TF32 with K = 8. With g = lane / 4, t = lane % 4:
//                                    d: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)
//                                    16-bit a: rows g, g+8, g, g+8 at columns 2t, 2t, 2t+8, 2t+8, two each; b: rows 2t,
//                                    2t+8 TF32   a: rows g, g+8, g, g+8 at columns  t,  t,  t+4,  t+4;           b:
//                                    rows  t,  t+4
//                                  so the same ldmatrix addresses (in bytes) serve all types
//   to_tf32(bits)                  float32 rounded to TF32 (nearest, ties away); mma itself cuts the lower 13 bits off
//
//   lds32, lds128, sts16, sts32, sts128(addr, ...)   shared memory by address. What the async proxy (TMA, wgmma) reads
//                                  must be written by these, not through pointers: the emulation then checks the fence
//   stg128(p, v)                   16 bytes to global memory in one store; nvcc may split an assignment of a uint4
//   bar_sync(id, n), bar_arrive(id, n)   barrier 1..15 among n threads; 0 is __syncthreads
//
//   relu(v)                        max(v, 0), NaN stays NaN
//   pack<T>(lo, hi)                two floats rounded to T, in 32 bits; pack_relu<T> the same after relu
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifdef __CUDACC__
#include "cuda/ptx_device.h"
#else
#include "ptx_emulated.h"
#endif
