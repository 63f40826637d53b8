// softplus(x) = log(1 + exp(x)) and its derivative, exact where the special-function unit's
// logarithm is not: of 1 + exp(x) it would lose what a small exp(x) is.
#pragma once

#include "tk/backend.cuh"

namespace tk::math {
namespace detail_softplus {

// log(1 + x) for x in [0, 1], as 2 atanh(x / (2 + x)) by a polynomial fitted for the least largest
// relative error: 5e-9 before rounding.
__device__ __forceinline__ float small_log1p(float x) {
  const float s = x * reciprocal(2.0f + x), z = s * s;
  float p = fma(z, 0.14005994f, 0.14000902f);
  p = fma(z, p, 0.20010764f);
  p = fma(z, p, 0.33333208f);
  return 2.0f * fma(s * z, p, s);
}

}  // namespace detail_softplus

// Nothing overflows; NaN stays NaN.
__device__ __forceinline__ float softplus(float x) {
  const float rest = detail_softplus::small_log1p(exp2(abs(x) * -kLog2E));
  return x > 0.0f ? x + rest : rest;
}
// Its derivative, 1 / (1 + exp(-x)).
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + exp2(x * -kLog2E)); }

}  // namespace tk::math
