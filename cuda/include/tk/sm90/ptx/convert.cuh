// Conversions between fp32 and the 16-bit formats, two at a time, to nearest even.
#pragma once

#include "tk/base.cuh"

namespace tk::ptx {

// The first value goes to the low half.
template <typename T>
__device__ __forceinline__ uint32 pack(float low, float high) {
  static_assert(kIsHalf<T>, "pack makes pairs of bf16 or fp16");
  uint32 pair;
  if constexpr (kSame<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

template <typename T>
__device__ __forceinline__ void unpack(uint32 pair, float& low, float& high) {
  static_assert(kIsHalf<T>, "unpack takes pairs of bf16 or fp16");
  if constexpr (kSame<T, bf16>) {
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xffff0000u);
  } else {
    asm("{\n"
        ".reg .b16 l, h;\n"
        "mov.b32 {l, h}, %2;\n"
        "cvt.f32.f16 %0, l;\n"
        "cvt.f32.f16 %1, h;\n"
        "}"
        : "=f"(low), "=f"(high)
        : "r"(pair));
  }
}

// The pair of one and zero.
template <typename T>
constexpr uint32 kOnePair = kSame<T, bf16> ? 0x3f80u : 0x3c00u;
// The same where two rows of a product's operand hold it: as a number that the compiler knows, it
// would be one register for both, which products cannot read.
template <typename T>
__device__ __forceinline__ uint32 one_pair_register() {
  uint32 pair;
  asm volatile("mov.b32 %0, %1;" : "=r"(pair) : "n"(kOnePair<T>));
  return pair;
}

// Two products, each rounded once.
template <typename T>
__device__ __forceinline__ uint32 multiply_pairs(uint32 x, uint32 y) {
  static_assert(kIsHalf<T>, "multiply_pairs takes pairs of bf16 or fp16");
  uint32 pair;
  if constexpr (kSame<T, bf16>) {
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(x), "r"(y));
  } else {
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(x), "r"(y));
  }
  return pair;
}
// The second value of one pair and the first of the next.
__device__ __forceinline__ uint32 middle_pair(uint32 x, uint32 next) {
  return __byte_perm(x, next, 0x5432);
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (kSame<T, float>) {
    return x;
  } else {
    return T{static_cast<uint16>(pack<T>(x, 0.0f) & 0xffffu)};
  }
}
template <typename T>
__device__ __forceinline__ float to_float(T x) {
  if constexpr (kSame<T, float>) {
    return x;
  } else {
    float low, high;
    unpack<T>(x.bits, low, high);
    return low;
  }
}

}  // namespace tk::ptx
