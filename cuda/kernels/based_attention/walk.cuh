// Which piece of the state of which slice of which head a block has: what states.cuh and
// outputs.cuh share.
#pragma once

#include "kernels/based_attention/parts.cuh"
#include "kernels/linear_attention/walk.cuh"

namespace tk::based_attention {

using linear_attention::Segment;

struct Place : linear_attention::Place {
  int piece;

  // Of a head and slice the pieces are neighbours.
  template <typename Params>
  __device__ __forceinline__ static Place of(const Params& params, int pieces) {
    const int slices = ceil_div(params.value_dim, kSlice);
    const int index = grid::block_x() / pieces;
    return {{index / slices, index % slices, grid::block_z()}, grid::block_x() % pieces};
  }
};

// A slice's rows of the state of a segment, [B, H, segments, V, F], as far as they are there, and
// of their columns the piece.
template <typename Traits, typename T, typename Params>
__device__ __forceinline__ GlobalView<T> state_rows(T* states, const Params& params,
                                                    const Place& place, const Segment& segment) {
  constexpr int kColumns = state_columns(Traits::kDim);
  const int first = place.slice * kSlice;
  const int64 state = static_cast<int64>(place.row(params)) * segment.count + segment.index;
  return {
      states + (state * params.value_dim + first) * kColumns + place.piece * Traits::kPieceColumns,
      min(params.value_dim - first, kSlice), Traits::kPieceColumns, kColumns};
}

// Starts from what is there, or from zero.
template <typename Traits, typename State, typename Params>
__device__ __forceinline__ void load_state(State& state, const Params& params, const Place& place,
                                           const Segment& segment) {
  if (params.from == nullptr) {
    warp::zero(state);
  } else {
    warpgroup::load(state, state_rows<Traits>(params.from, params, place, segment), 0, 0);
  }
}
template <typename Traits, typename State, typename Params>
__device__ __forceinline__ void store_state(const State& state, const Params& params,
                                            const Place& place, const Segment& segment) {
  if (params.to != nullptr) {
    warpgroup::store(state_rows<Traits>(params.to, params, place, segment), state, 0, 0);
  }
}

}  // namespace tk::based_attention
