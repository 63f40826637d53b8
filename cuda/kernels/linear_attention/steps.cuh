// What a token's step is, and what the kernels of steps share.
//
//   pre = raw + bias        step = clip(softplus(pre), least, most)        g = rate step
// with softplus where it is asked for: Mamba-2's dt, dt_bias and A.
#pragma once

#include "kernels/linear_attention/gate_tile.cuh"

namespace tk::linear_attention {

// The heads' rates or biases.
__device__ __forceinline__ void load_heads(HeadRows& rows, const float* array, int64 batch_stride,
                                           const GatePlace& place) {
  if (array == nullptr) {
    warp::zero(rows);
  } else {
    warp::load(rows, GlobalVec<const float>{array + place.batch * batch_stride, place.heads},
               place.head, 0.0f);
  }
}

// pre, before limits: NaN stays NaN.
__device__ __forceinline__ float unlimited_step(const Steps& steps, float pre) {
  return steps.softplus ? math::softplus(pre) : pre;
}
__device__ __forceinline__ float limited_step(const Steps& steps, float step) {
  step = step < steps.least ? steps.least : step;
  return step > steps.most ? steps.most : step;
}
// The derivative of the step by pre times `gradient`: none beyond the limits, all of it at them.
__device__ __forceinline__ float through_step(const Steps& steps, float gradient, float pre) {
  const float step = unlimited_step(steps, pre);
  if (step < steps.least || step > steps.most) gradient = 0.0f;
  return steps.softplus ? gradient * math::sigmoid(pre) : gradient;
}

}  // namespace tk::linear_attention
