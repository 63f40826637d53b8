// Which slice of which head a consumer has, and which chunks: what kernels share that walk through
// a sequence.
#pragma once

#include "kernels/linear_attention/linear_attention.h"
#include "tk/tk.cuh"

namespace tk::linear_attention {

// A consumer's place. Slices are numbered through all heads; those of a block share their keys.
struct Place {
  int head, slice, batch;

  template <typename Params>
  __device__ __forceinline__ static Place of(const Params& params, int consumers, int consumer) {
    const int slices = ceil_div(params.value_dim, kSlice);
    const int index = grid::block_x() * consumers + consumer;
    return {index / slices, index % slices, grid::block_z()};
  }
  // The head of q and k.
  template <typename Params>
  __device__ __forceinline__ int group(const Params& params) const {
    return head / (params.num_heads / params.num_groups);
  }
  template <typename Params>
  __device__ __forceinline__ int row(const Params& params) const {
    return batch * params.num_heads + head;
  }
};

// The block's segment of the sequence.
struct Segment {
  int index, count;
  int first, end;  // chunks

  template <typename Params>
  __device__ __forceinline__ static Segment of(const Params& params) {
    return at(params, grid::block_y());
  }
  template <typename Params>
  __device__ __forceinline__ static Segment at(const Params& params, int index) {
    const int first = index * params.chunks_of_segment;
    return {index, ceil_div(params.chunks, params.chunks_of_segment), first,
            min(first + params.chunks_of_segment, params.chunks)};
  }
};

// A slice's rows of the state of a segment, [B, H, segments, V, K], as far as they are there.
template <typename T, typename Params>
__device__ __forceinline__ GlobalView<T> state_rows(T* states, const Params& params,
                                                    const Place& place, const Segment& segment) {
  const int first = place.slice * kSlice;
  const int64 state = static_cast<int64>(place.row(params)) * segment.count + segment.index;
  return {states + (state * params.value_dim + first) * params.key_dim,
          min(params.value_dim - first, kSlice), params.key_dim, params.key_dim};
}

// Starts from what is there, or from zero. A state may be a part of the columns.
template <typename State, typename Params>
__device__ __forceinline__ void load_state(State& state, const Params& params, const Place& place,
                                           const Segment& segment, int first_col = 0) {
  if (params.from == nullptr) {
    warp::zero(state);
  } else {
    warpgroup::load(state, state_rows(params.from, params, place, segment), 0, first_col);
  }
}
template <typename State, typename Params>
__device__ __forceinline__ void store_state(const State& state, const Params& params,
                                            const Place& place, const Segment& segment,
                                            int first_col = 0) {
  if (params.to != nullptr) {
    warpgroup::store(state_rows(params.to, params, place, segment), state, 0, first_col);
  }
}

}  // namespace tk::linear_attention
