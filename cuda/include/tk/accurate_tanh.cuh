// tanh to a few units in the last place, where the special-function unit's 2^-11 is too coarse.
#pragma once

#include "tk/backend.cuh"

namespace tk::math {

// Where |x| <= kSmallTanh: an odd polynomial, fitted for the least largest relative error; 3.7e-8
// before rounding, 1.1e-7 with it.
constexpr float kSmallTanh = 0.55f;
constexpr float kTanhOf3 = -3.3332947e-1f, kTanhOf5 = 1.3320725e-1f, kTanhOf7 = -5.267181e-2f,
                kTanhOf9 = 1.643757e-2f;
__device__ __forceinline__ float small_tanh(float x) {
  const float z = x * x;
  float p = fma(z, kTanhOf9, kTanhOf7);
  p = fma(z, p, kTanhOf5);
  p = fma(z, p, kTanhOf3);
  return fma(p * z, x, x);
}

// The same as a factor: of factor tanh(gain x), which is x times this, where |x| <= limit. The gain
// and the factor are in the coefficients, which costs two operations less. Where a float does not
// hold these, limit is below zero.
struct SmallTanhFactor {
  float of_1, of_3, of_5, of_7, of_9;
  float limit;

  __device__ __forceinline__ SmallTanhFactor(float gain, float factor) {
    const float z = gain * gain;
    of_1 = factor * gain;
    of_3 = kTanhOf3 * of_1 * z;
    of_5 = kTanhOf5 * of_1 * (z * z);
    of_7 = kTanhOf7 * of_1 * (z * z * z);
    of_9 = kTanhOf9 * of_1 * (z * z * (z * z));
    const auto holds = [](float x) { return abs(x) > 1e-30f && abs(x) < 1e30f; };
    limit = holds(of_1) && holds(of_9) && holds(gain) ? kSmallTanh / abs(gain) : -1.0f;
  }
  __device__ __forceinline__ float factor_of(float x) const {
    const float z = x * x;
    float p = fma(z, of_9, of_7);
    p = fma(z, p, of_5);
    p = fma(z, p, of_3);
    return fma(z, p, of_1);
  }
};

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
