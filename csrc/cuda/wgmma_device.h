// wgmma of cuda/ptx90.h under nvcc. PTX wants every register of the accumulator spelled out: the macros do the
// spelling.
#pragma once

namespace ptx {

template <int S>
PTX_INLINE uint64_t wg_desc(uint32_t addr) {
  static_assert(S == 32 || S == 64 || S == 128);
  constexpr uint64_t kMode = S == 128 ? 1 : S == 64 ? 2 : 3, kRows8 = 8 * S / 16;
  return static_cast<uint64_t>((addr & 0x3FFFF) >> 4) | (1ull << 16) | (kRows8 << 32) | (kMode << 62);
}
PTX_INLINE uint64_t wg_desc_ns(uint32_t addr, uint32_t lbo, uint32_t sbo) {
  return static_cast<uint64_t>((addr & 0x3FFFF) >> 4) | static_cast<uint64_t>(lbo >> 4) << 16 |
         static_cast<uint64_t>(sbo >> 4) << 32;
}
PTX_INLINE void wg_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PTX_INLINE void wg_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
PTX_INLINE void wg_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// "%0,...": T10(t) is %t0..%t9
#define T10(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define R_4 "%0,%1,%2,%3"
#define R_8 R_4 ",%4,%5,%6,%7"
#define R_10 R_8 ",%8,%9"
#define R_16 R_10 ",%10,%11,%12,%13,%14,%15"
#define R_20 R_10 "," T10(1)
#define R_30 R_20 "," T10(2)
#define R_32 R_30 ",%30,%31"
#define R_40 R_30 "," T10(3)
#define R_48 R_40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define R_50 R_40 "," T10(4)
#define R_52 R_50 ",%50,%51"
#define R_56 R_52 ",%52,%53,%54,%55"
#define R_60 R_50 "," T10(5)
#define R_64 R_60 ",%60,%61,%62,%63"
#define R_70 R_60 "," T10(6)
#define R_72 R_70 ",%70,%71"
#define R_90 R_60 "," T10(6) "," T10(7) "," T10(8)
#define R_96 R_90 ",%90,%91,%92,%93,%94,%95"
#define R_110 R_90 "," T10(9) "," T10(10)
#define R_112 R_110 ",%110,%111"
#define R_120 R_110 "," T10(11)
#define R_128 R_120 ",%120,%121,%122,%123,%124,%125,%126,%127"

// "+f"(d[0]), ...
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define D_4 D4(0)
#define D_8 D_4, D4(4)
#define D_16 D16(0)
#define D_32 D_16, D16(16)
#define D_48 D_32, D16(32)
#define D_52 D_48, D4(48)
#define D_56 D_52, D4(52)
#define D_64 D_48, D16(48)
#define D_72 D_64, D4(64), D4(68)
#define D_96 D_64, D16(64), D16(80)
#define D_112 D_96, D16(96)
#define D_128 D_112, D16(112)

// F = N / 2 registers of d, then the operands: A (four registers or a descriptor), B, and P, whether to accumulate.
#define WGMMA_SS_OF(F, N, K, TYPES, MINOR, A, B, P)                                                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N K TYPES " {" R_##F \
               "}, %" #A ", %" #B ", p, 1, 1" MINOR ";\n}"                                                             \
               : D_##F                                                                                                 \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
#define WGMMA_RS_OF(F, N, K, TYPES, MINOR, A0, A1, A2, A3, B, P)                                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N K TYPES " {" R_##F \
               "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", p, 1, 1" MINOR ";\n}"                               \
               : D_##F                                                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))
// MINOR says which 16-bit operands in shared memory are transposed (none); TF32 has no such flags.
#define WGMMA_SS(F, N, ...)                                            \
  if constexpr (std::is_same_v<T, __nv_bfloat16>)                      \
    WGMMA_SS_OF(F, N, "k16", ".f32.bf16.bf16", ", 0, 0", __VA_ARGS__); \
  else if constexpr (std::is_same_v<T, __half>)                        \
    WGMMA_SS_OF(F, N, "k16", ".f32.f16.f16", ", 0, 0", __VA_ARGS__);   \
  else                                                                 \
    WGMMA_SS_OF(F, N, "k8", ".f32.tf32.tf32", "", __VA_ARGS__)
#define WGMMA_RS(F, N, ...)                                         \
  if constexpr (std::is_same_v<T, __nv_bfloat16>)                   \
    WGMMA_RS_OF(F, N, "k16", ".f32.bf16.bf16", ", 0", __VA_ARGS__); \
  else if constexpr (std::is_same_v<T, __half>)                     \
    WGMMA_RS_OF(F, N, "k16", ".f32.f16.f16", ", 0", __VA_ARGS__);   \
  else                                                              \
    WGMMA_RS_OF(F, N, "k8", ".f32.tf32.tf32", "", __VA_ARGS__)

template <class T, int F>
PTX_INLINE void wgmma(float (&d)[F], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (F == 4) {
    WGMMA_SS(4, 8, 4, 5, 6);
  } else if constexpr (F == 8) {
    WGMMA_SS(8, 16, 8, 9, 10);
  } else if constexpr (F == 16) {
    WGMMA_SS(16, 32, 16, 17, 18);
  } else if constexpr (F == 32) {
    WGMMA_SS(32, 64, 32, 33, 34);
  } else if constexpr (F == 48) {
    WGMMA_SS(48, 96, 48, 49, 50);
  } else if constexpr (F == 52) {
    WGMMA_SS(52, 104, 52, 53, 54);
  } else if constexpr (F == 56) {
    WGMMA_SS(56, 112, 56, 57, 58);
  } else if constexpr (F == 64) {
    WGMMA_SS(64, 128, 64, 65, 66);
  } else if constexpr (F == 72) {
    WGMMA_SS(72, 144, 72, 73, 74);
  } else if constexpr (F == 96) {
    WGMMA_SS(96, 192, 96, 97, 98);
  } else if constexpr (F == 112) {
    WGMMA_SS(112, 224, 112, 113, 114);
  } else if constexpr (F == 128) {
    WGMMA_SS(128, 256, 128, 129, 130);
  } else {
    static_assert(F == 0, "wgmma: no such N");
  }
}
template <class T, int F>
PTX_INLINE void wgmma(float (&d)[F], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  if constexpr (F == 4) {
    WGMMA_RS(4, 8, 4, 5, 6, 7, 8, 9);
  } else if constexpr (F == 8) {
    WGMMA_RS(8, 16, 8, 9, 10, 11, 12, 13);
  } else if constexpr (F == 16) {
    WGMMA_RS(16, 32, 16, 17, 18, 19, 20, 21);
  } else if constexpr (F == 32) {
    WGMMA_RS(32, 64, 32, 33, 34, 35, 36, 37);
  } else if constexpr (F == 48) {
    WGMMA_RS(48, 96, 48, 49, 50, 51, 52, 53);
  } else if constexpr (F == 52) {
    WGMMA_RS(52, 104, 52, 53, 54, 55, 56, 57);
  } else if constexpr (F == 56) {
    WGMMA_RS(56, 112, 56, 57, 58, 59, 60, 61);
  } else if constexpr (F == 64) {
    WGMMA_RS(64, 128, 64, 65, 66, 67, 68, 69);
  } else if constexpr (F == 72) {
    WGMMA_RS(72, 144, 72, 73, 74, 75, 76, 77);
  } else if constexpr (F == 96) {
    WGMMA_RS(96, 192, 96, 97, 98, 99, 100, 101);
  } else if constexpr (F == 112) {
    WGMMA_RS(112, 224, 112, 113, 114, 115, 116, 117);
  } else if constexpr (F == 128) {
    WGMMA_RS(128, 256, 128, 129, 130, 131, 132, 133);
  } else {
    static_assert(F == 0, "wgmma: no such N");
  }
}

#undef T10
#undef R_4
#undef R_8
#undef R_10
#undef R_16
#undef R_20
#undef R_30
#undef R_32
#undef R_40
#undef R_48
#undef R_50
#undef R_52
#undef R_56
#undef R_60
#undef R_64
#undef R_70
#undef R_72
#undef R_90
#undef R_96
#undef R_110
#undef R_112
#undef R_120
#undef R_128
#undef D4
#undef D16
#undef D_4
#undef D_8
#undef D_16
#undef D_32
#undef D_48
#undef D_52
#undef D_56
#undef D_64
#undef D_72
#undef D_96
#undef D_112
#undef D_128
#undef WGMMA_SS_OF
#undef WGMMA_RS_OF
#undef WGMMA_SS
#undef WGMMA_RS

}  // namespace ptx
