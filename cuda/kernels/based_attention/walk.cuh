// Which piece of the state of which slice of which head a block has, which chunks, and what state
// it starts from: what states.cuh and outputs.cuh share.
#pragma once

#include "kernels/based_attention/parts.cuh"
#include "kernels/linear_attention/walk.cuh"

namespace tk::based_attention {

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

// The block's segment. They are numbered as they are walked: in reverse, from the last on.
struct Segment {
  int order, count;
  int first, end;  // chunks

  template <typename Params>
  __device__ __forceinline__ static Segment of(const Params& params, bool reverse = false) {
    const int order = grid::block_y();
    const int count = ceil_div(params.chunks, params.chunks_of_segment);
    const int first = (reverse ? count - 1 - order : order) * params.chunks_of_segment;
    return {order, count, first, min(first + params.chunks_of_segment, params.chunks)};
  }
  // Whether none is walked after it.
  template <typename Params>
  __device__ __forceinline__ bool is_last(const Params& params, bool reverse = false) const {
    return reverse ? first == 0 : end == params.chunks;
  }
};

// A slice's rows of the state of a head, [B, H, V, F], as far as they are there, and of their
// columns the piece.
template <typename Traits, typename T, typename Params>
__device__ __forceinline__ GlobalView<T> state_rows(T* states, const Params& params,
                                                    const Place& place) {
  constexpr int kColumns = state_columns(Traits::kDim);
  const int first = place.slice * kSlice;
  return {states + (static_cast<int64>(place.row(params)) * params.value_dim + first) * kColumns +
              place.piece * Traits::kPieceColumns,
          min(params.value_dim - first, kSlice), Traits::kPieceColumns, kColumns};
}

// What a segment adds to a piece, [B, H, slices, pieces, segments - 1, 64, piece's columns], in
// fragments.
template <typename Traits, typename T, typename Params>
__device__ __forceinline__ T* added_by(T* added, const Params& params, const Place& place,
                                       const Segment& segment, int order) {
  const int slices = ceil_div(params.value_dim, kSlice);
  const int64 piece =
      (static_cast<int64>(place.row(params)) * slices + place.slice) * Traits::kPieces +
      place.piece;
  return added + (piece * (segment.count - 1) + order) * (kSlice * Traits::kPieceColumns);
}

// Starts from the sum of what is there and of what the segments before have added, since a document
// began; or from zero.
template <typename Traits, typename State, typename Params>
__device__ __forceinline__ void load_state(State& state, const Params& params, const Place& place,
                                           const Segment& segment) {
  int first = -1;  // the first segment that counts; before the first there is `from`
  if (Traits::kDocuments && params.since != nullptr) {
    first = load_scalar(params.since + place.batch * segment.count + segment.order);
  }
  // Of no rows where there is nothing: a branch on it leaves the compiler too few registers.
  auto from = state_rows<Traits>(params.from, params, place);
  if (params.from == nullptr || first >= 0) from.rows = 0;
  warpgroup::load(state, from, 0, 0);
  if (params.added == nullptr) return;
  for (int order = max(first, 0); order < segment.order; ++order) {
    State part;
    warpgroup::load_fragments(part, added_by<Traits>(params.added, params, place, segment, order));
    warp::add(state, state, part);
  }
}
template <typename Traits, typename State, typename Params>
__device__ __forceinline__ void store_state(const State& state, const Params& params,
                                            const Place& place) {
  if (params.to != nullptr) {
    warpgroup::store(state_rows<Traits>(params.to, params, place), state, 0, 0);
  }
}

// The sums that normalize (normalizer.cuh), of the segment's start; or null for zeros.
template <typename Params>
__device__ __forceinline__ const float* segment_sums(const Params& params, const Place& place,
                                                     const Segment& segment) {
  if (params.sums == nullptr) return nullptr;
  return params.sums +
         (static_cast<int64>(place.row(params)) * segment.count + segment.order) * kSums;
}

}  // namespace tk::based_attention
