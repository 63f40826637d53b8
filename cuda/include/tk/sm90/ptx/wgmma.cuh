// wgmma: a warpgroup multiplies a 64 x 16 tile of A by a 16 x N tile of B into fp32 registers.
//
// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions". One table of N gives every shape,
// for both 16-bit types and for A in shared memory (ss) or in registers (rs).
#pragma once

#include "tk/base.cuh"

namespace tk::ptx {

// Orders register writes before the wgmmas that follow. Once before the first of a batch.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of a register that a wgmma reads or writes across this point.
__device__ __forceinline__ void hold(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void hold(uint32& x) { asm volatile("" : "+r"(x)::"memory"); }

// How an operand lies in shared memory: where it starts, and the byte strides between groups of
// eight rows (stride_bytes) and between panels (leading_bytes).
__device__ __forceinline__ uint64 matrix_descriptor(uint32 address, uint32 leading_bytes,
                                                    uint32 stride_bytes, int swizzle) {
  const uint64 mode = swizzle == 128 ? 1 : swizzle == 64 ? 2 : 3;
  return static_cast<uint64>((address & 0x3FFFF) >> 4) |
         static_cast<uint64>((leading_bytes & 0x3FFFF) >> 4) << 16 |
         static_cast<uint64>((stride_bytes & 0x3FFFF) >> 4) << 32 | mode << 62;
}

// The descriptor of an operand that lies so many bytes further on. Addresses of shared memory have
// 18 bits, as the field has without its lowest four: nothing is carried out of it.
__device__ __forceinline__ uint64 moved_descriptor(uint64 descriptor, uint32 bytes) {
  return (descriptor & 0xFFFFFFFF00000000u) |
         static_cast<uint64>(static_cast<uint32>(descriptor) + (bytes >> 4));
}

// Register lists of an accumulator, eight values at a time.
// clang-format off
#define TK_F8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
  "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define TK_F_16 TK_F8(0)
#define TK_F_32 TK_F_16, TK_F8(8)
#define TK_F_48 TK_F_32, TK_F8(16)
#define TK_F_64 TK_F_48, TK_F8(24)
#define TK_F_80 TK_F_64, TK_F8(32)
#define TK_F_96 TK_F_80, TK_F8(40)
#define TK_F_112 TK_F_96, TK_F8(48)
#define TK_F_128 TK_F_112, TK_F8(56)
#define TK_F_144 TK_F_128, TK_F8(64)
#define TK_F_160 TK_F_144, TK_F8(72)
#define TK_F_176 TK_F_160, TK_F8(80)
#define TK_F_192 TK_F_176, TK_F8(88)
#define TK_F_208 TK_F_192, TK_F8(96)
#define TK_F_224 TK_F_208, TK_F8(104)
#define TK_F_240 TK_F_224, TK_F8(112)
#define TK_F_256 TK_F_240, TK_F8(120)
#define TK_S_16 "%0,%1,%2,%3,%4,%5,%6,%7"
#define TK_S_32 TK_S_16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define TK_S_48 TK_S_32 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define TK_S_64 TK_S_48 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define TK_S_80 TK_S_64 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define TK_S_96 TK_S_80 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define TK_S_112 TK_S_96 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define TK_S_128 TK_S_112 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define TK_S_144 TK_S_128 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define TK_S_160 TK_S_144 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define TK_S_176 TK_S_160 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define TK_S_192 TK_S_176 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define TK_S_208 TK_S_192 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define TK_S_224 TK_S_208 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define TK_S_240 TK_S_224 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define TK_S_256 TK_S_240 ",%120,%121,%122,%123,%124,%125,%126,%127"

// N, then the numbers of the operands that follow the accumulator's N / 2 registers.
#define TK_WGMMA_SHAPES(X) \
  X(16, 8, 9, 10, 11, 12, 13, 14) \
  X(32, 16, 17, 18, 19, 20, 21, 22) \
  X(48, 24, 25, 26, 27, 28, 29, 30) \
  X(64, 32, 33, 34, 35, 36, 37, 38) \
  X(80, 40, 41, 42, 43, 44, 45, 46) \
  X(96, 48, 49, 50, 51, 52, 53, 54) \
  X(112, 56, 57, 58, 59, 60, 61, 62) \
  X(128, 64, 65, 66, 67, 68, 69, 70) \
  X(144, 72, 73, 74, 75, 76, 77, 78) \
  X(160, 80, 81, 82, 83, 84, 85, 86) \
  X(176, 88, 89, 90, 91, 92, 93, 94) \
  X(192, 96, 97, 98, 99, 100, 101, 102) \
  X(208, 104, 105, 106, 107, 108, 109, 110) \
  X(224, 112, 113, 114, 115, 116, 117, 118) \
  X(240, 120, 121, 122, 123, 124, 125, 126) \
  X(256, 128, 129, 130, 131, 132, 133, 134)
// clang-format on

template <int kN>
struct Wgmma;

#define TK_WGMMA_SS(n, type, a, b, scale, ta, tb)                                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #scale                                   \
               ", 0;\n"                                                                      \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" TK_S_##n \
               "}, "                                                                         \
               "%" #a ", %" #b ", p, 1, 1, %" #ta ", %" #tb ";\n}"                           \
               : TK_F_##n                                                                    \
               : "l"(a_desc), "l"(b_desc), "r"(accumulate), "n"(kTransposeA), "n"(kTransposeB))

#define TK_WGMMA_RS(n, type, a0, a1, a2, a3, b, scale, tb)                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #scale                                   \
               ", 0;\n"                                                                      \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" TK_S_##n \
               "}, "                                                                         \
               "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p, 1, 1, %" #tb ";\n}"    \
               : TK_F_##n                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc), "r"(accumulate),   \
                 "n"(kTransposeB))

#define TK_WGMMA_SHAPE(n, i0, i1, i2, i3, i4, i5, i6)                                          \
  template <>                                                                                  \
  struct Wgmma<n> {                                                                            \
    template <typename T, int kTransposeA, int kTransposeB>                                    \
    static __device__ __forceinline__ void ss(float (&d)[n / 2], uint64 a_desc, uint64 b_desc, \
                                              int accumulate) {                                \
      if constexpr (kSame<T, bf16>) {                                                          \
        TK_WGMMA_SS(n, "bf16", i0, i1, i2, i3, i4);                                            \
      } else {                                                                                 \
        TK_WGMMA_SS(n, "f16", i0, i1, i2, i3, i4);                                             \
      }                                                                                        \
    }                                                                                          \
    template <typename T, int kTransposeB>                                                     \
    static __device__ __forceinline__ void rs(float (&d)[n / 2], const uint32 (&a)[4],         \
                                              uint64 b_desc, int accumulate) {                 \
      if constexpr (kSame<T, bf16>) {                                                          \
        TK_WGMMA_RS(n, "bf16", i0, i1, i2, i3, i4, i5, i6);                                    \
      } else {                                                                                 \
        TK_WGMMA_RS(n, "f16", i0, i1, i2, i3, i4, i5, i6);                                     \
      }                                                                                        \
    }                                                                                          \
  };

TK_WGMMA_SHAPES(TK_WGMMA_SHAPE)

#undef TK_WGMMA_SHAPE
#undef TK_WGMMA_RS
#undef TK_WGMMA_SS
#undef TK_WGMMA_SHAPES

}  // namespace tk::ptx
