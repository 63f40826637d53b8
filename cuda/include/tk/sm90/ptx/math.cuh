// The special-function unit's approximations, and what is built on them.
#pragma once

#include "tk/base.cuh"

namespace tk::ptx {

// Relative error 2^-22; exp2(-inf) = 0.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The natural logarithm, to an ulp: slower, for what is done once a row.
__device__ __forceinline__ float log(float x) { return logf(x); }
// One rounding, and never taken apart or put together otherwise.
__device__ __forceinline__ float fma(float x, float y, float z) { return __fmaf_rn(x, y, z); }
__device__ __forceinline__ float mul(float x, float y) { return __fmul_rn(x, y); }
// Of the bits of x: the number of the highest and of the lowest, where there is one; how many.
__device__ __forceinline__ int highest_bit(uint32 x) { return 31 - __clz(static_cast<int>(x)); }
__device__ __forceinline__ int lowest_bit(uint32 x) { return __ffs(static_cast<int>(x)) - 1; }
__device__ __forceinline__ int count_bits(uint32 x) { return __popc(x); }
// The upper word's bits follow on the lower one's; the word that starts at bit `by` < 32 of both.
__device__ __forceinline__ uint32 funnel_shift_right(uint32 low, uint32 high, int by) {
  return __funnelshift_r(low, high, static_cast<uint32>(by));
}
// A number if either is one.
__device__ __forceinline__ float max(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ float min(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ float abs(float x) { return fabsf(x); }
// NaN if either is.
__device__ __forceinline__ float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

}  // namespace tk::ptx
