// tanh to a few units in the last place, where the special-function unit's 2^-11 is too coarse.
#pragma once

#include "tk/backend.cuh"

namespace tk::math {

// Odd polynomial over even polynomial, of degree 4 in x^2: fitted for the least largest relative
// error up to 9.1, where tanh rounds to 1; 2.3e-8 before rounding, 3.2e-7 with it. Every
// coefficient is positive, so that nothing cancels. NaN stays NaN.
__device__ __forceinline__ float accurate_tanh(float x) {
  const float y = min_nan(max_nan(x, -9.1f), 9.1f);
  const float z = y * y;
  float p = fma(z, 1.31774590e-8f, 2.04811866e-5f);
  p = fma(z, p, 3.48781339e-3f);
  p = fma(z, p, 1.33744781e-1f);
  p = fma(z, p, 9.99999977e-1f);
  float q = fma(z, 7.70403306e-7f, 3.27292229e-4f);
  q = fma(z, q, 2.58474003e-2f);
  q = fma(z, q, 4.67077919e-1f);
  q = fma(z, q, 1.0f);
  return y * p * reciprocal(q);
}

// The same where |x| <= kSmallTanh, at a third of the instructions: an odd polynomial, fitted in
// the same way; 3.2e-8 before rounding, 1.1e-7 with it.
constexpr float kSmallTanh = 0.75f;
__device__ __forceinline__ float small_tanh(float x) {
  const float z = x * x;
  float p = fma(z, -4.76949e-3f, 1.966491e-2f);
  p = fma(z, p, -5.339026e-2f);
  p = fma(z, p, 1.3326521e-1f);
  p = fma(z, p, -3.3333068e-1f);
  return fma(p * z, x, x);
}

}  // namespace tk::math

namespace tk::warp {

// dst = tanh(factor src).
template <typename Dst, typename Src>
__device__ __forceinline__ void accurate_tanh(Dst& dst, const Src& src, float factor,
                                              Location at = {}) {
  map_either(
      dst, src, [=](float x) { return !(math::abs(x * factor) > math::kSmallTanh); },
      [=](float x) { return math::small_tanh(x * factor); },
      [=](float x) { return math::accurate_tanh(x * factor); }, at);
}

}  // namespace tk::warp
