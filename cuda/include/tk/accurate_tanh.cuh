// tanh to a few units in the last place, where the special-function unit's 2^-11 is too coarse.
#pragma once

#include "tk/backend.cuh"

namespace tk::math {

// Where |x| <= kSmallTanh: an odd polynomial, fitted for the least largest relative error; 3.7e-8
// before rounding, 1.1e-7 with it.
constexpr float kSmallTanh = 0.55f;
__device__ __forceinline__ float small_tanh(float x) {
  const float z = x * x;
  float p = fma(z, 1.643757e-2f, -5.267181e-2f);
  p = fma(z, p, 1.3320725e-1f);
  p = fma(z, p, -3.3332947e-1f);
  return fma(p * z, x, x);
}

// Everywhere: beyond that, 1 - 2 / (exp(2 |x|) + 1) cancels nothing. NaN stays NaN.
__device__ __forceinline__ float accurate_tanh(float x) {
  const float size = abs(x);
  const float large = fma(-2.0f, reciprocal(exp2(size * (2.0f * kLog2E)) + 1.0f), 1.0f);
  return size <= kSmallTanh ? small_tanh(x) : x < 0.0f ? -large : large;
}

}  // namespace tk::math

namespace tk::warp {

// dst = tanh(factor src).
template <typename Dst, typename Src>
__device__ __forceinline__ void accurate_tanh(Dst& dst, const Src& src, float factor,
                                              Location at = {}) {
  map_within(
      dst, src, math::kSmallTanh / math::abs(factor),
      [=](float x) { return math::small_tanh(x * factor); },
      [=](float x) { return math::accurate_tanh(x * factor); }, at);
}

}  // namespace tk::warp
