// The gradients of the logarithms of decays.
//
// The decay of token t lies on the way of whatever goes from a token, or the state, before it to a
// token, or the state, at or after it. In a chunk:
//   dg[t] = sum over i >= t of (as_query[i] - as_key[i]) + sum over j < t of to_state[j]
//         + sum of through
// where as_query is what a token receives from those before it and the state, as_key what it gives
// to those after it (pairs of which neither is before t cancel), to_state what it gives to the
// state after the chunk, and through what goes from state to state, in 64 parts. No sum is a
// difference of sums that run over the whole sequence. Grid: as chunk_sums.cuh. Limit: memory.
#pragma once

#include "kernels/linear_attention/gate_tile.cuh"

namespace tk::linear_attention {

// What warps tell each other, of their tokens: the sums of as_query - as_key, of to_state and of
// through.
using GateGradientSums = WarpSums<3>;

// dg of the warp's tokens. For all threads of a block.
__device__ __forceinline__ void load_gate_gradients(GateTile& sum, const GateParts& parts,
                                                    const GatePlace& place,
                                                    GateGradientSums& sums) {
  const auto load = [&](GateTile& tile, const float* array) {
    warp::load_pairs(tile, place.by_head(array), place.head, 0);
  };
  GateTile other, to_state, through;
  load(sum, parts.as_query);
  load(other, parts.as_key);
  load(to_state, parts.to_state);
  load(through, parts.through);
  HeadRows rows;
  warp::sub(sum, sum, other);
  warp::row_sum(rows, sum);
  sums.put(0, rows);
  warp::row_sum(rows, to_state);
  sums.put(1, rows);
  warp::row_sum(rows, through);
  sums.put(2, rows);

  warp::reverse_cols(sum, sum);
  warp::cumsum_cols(sum, sum);
  warp::reverse_cols(sum, sum);
  warp::cumsum_cols(other, to_state);
  warp::sub(other, other, to_state);
  warp::add(sum, sum, other);

  block::sync();
  warp::zero(rows);
  sums.add(rows, 0, warp::index() + 1, kGateWarps);
  sums.add(rows, 1, 0, warp::index());
  sums.add(rows, 2, 0, kGateWarps);
  warp::add_rows(sum, sum, rows);
}

struct GateGradientsShared {
  GateGradientSums sums;
};
static_assert(sizeof(GateGradientsShared) + 1024 <= kGateSharedBytes,
              "linear_attention.h's kGateSharedBytes covers the kernel's shared memory");

__device__ __forceinline__ void gate_gradients(const GateGradientsParams& params) {
  auto& shared = block::shared_memory<GateGradientsShared>();
  const GatePlace place = GatePlace::of(params.seqlen, params.num_heads);
  GateTile sum;
  load_gate_gradients(sum, params.parts, place, shared.sums);
  warp::store(place.by_token(params.dgates, params.seqlen), sum, place.head, 0);
}

}  // namespace tk::linear_attention
