// What both layouts share: which part of which state a block has, and the step of a tile.
#pragma once

#include "kernels/state_step/state_step.h"
#include "tk/tk.cuh"

namespace tk::state_step {

struct Place {
  int batch, head, part;

  __device__ __forceinline__ static Place of(const StepParams& params) {
    const int index = grid::block_x();
    const int state = index / params.parts;
    return {state / params.num_heads, state % params.num_heads, index % params.parts};
  }
  __device__ __forceinline__ int64 state(const StepParams& params) const {
    return static_cast<int64>(batch) * params.num_heads + head;
  }
  // A row of [B, heads, size] that this head, or several, read.
  template <typename T>
  __device__ __forceinline__ GlobalVec<const T> shared_row(const StepParams& params,
                                                           const void* array, int heads,
                                                           int size) const {
    const int64 row = static_cast<int64>(batch) * heads + head / (params.num_heads / heads);
    return {static_cast<const T*>(array) + row * size, size};
  }
  __device__ __forceinline__ const float* at(const Gate& gate) const {
    return gate.data + batch * gate.batch_stride + head * gate.head_stride;
  }
  // This head's number, or the one that a missing array stands for.
  __device__ __forceinline__ float value(const Gate& gate, float otherwise) const {
    return gate.data == nullptr ? otherwise : load_scalar(at(gate));
  }
};

// What is left of a number of the state, and what is added to it. Nothing is left with a decay of
// zero, whatever the number is.
__device__ __forceinline__ float stepped(float decay, float x, float added) {
  return decay == 0.0f ? added : math::fma(decay, x, added);
}

// state(r, c) <- decay state(r, c) + rows(r) cols(c).
template <typename State, int kR, int kC>
__device__ __forceinline__ void step_on(State& state, float decay, const PerRow<kR>& rows,
                                        const PerCol<kC>& cols) {
  State added;
  warp::outer(added, rows, cols, [](float x, float y) { return x * y; });
  warp::zip(state, state, added, [decay](float x, float y) { return stepped(decay, x, y); });
}

}  // namespace tk::state_step
