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

#include "kernels/linear_attention/linear_attention.h"
#include "tk/tk.cuh"

namespace tk::linear_attention {

// dg of the chunk at `start` of [B, H, padded], of the heads from `head` on.
template <typename Tile>
__device__ __forceinline__ void load_gate_gradients(Tile& sum, const GateParts& parts, int64 start,
                                                    int head, int heads, int padded) {
  const auto load = [&](Tile& tile, const float* array) {
    warp::load_pairs(tile, GlobalView<const float>{array + start, heads, kChunk, padded}, head, 0);
  };
  // All are read at once: there are few warps to hide what that takes.
  Tile other, to_state, through;
  load(sum, parts.as_query);
  load(other, parts.as_key);
  load(to_state, parts.to_state);
  load(through, parts.through);
  warp::sub(sum, sum, other);
  warp::reverse_cols(sum, sum);
  warp::cumsum_cols(sum, sum);
  warp::reverse_cols(sum, sum);

  warp::cumsum_cols(other, to_state);
  warp::sub(other, other, to_state);
  warp::add(sum, sum, other);

  PerRow<Tile::kRows> of_state;
  warp::row_sum(of_state, through);
  warp::add_rows(sum, sum, of_state);
}

__device__ __forceinline__ void gate_gradients(const GateGradientsParams& params) {
  const int chunk = kChunksOfBlock * grid::block_x() + warp::index();
  const int first = chunk * kChunk;
  const int head = kHeadsOfBlock * grid::block_y(), batch = grid::block_z();
  if (first >= params.seqlen) return;

  const int heads = params.num_heads, tokens = min(params.seqlen - first, kChunk);
  const int padded = static_cast<int>(padded_tokens(params.seqlen));
  const int64 start = static_cast<int64>(batch) * heads * padded + first;
  RegTile<float, kHeadsOfBlock, kChunk> sum;
  load_gate_gradients(sum, params.parts, start, head, heads, padded);
  float* dgates = params.dgates + (static_cast<int64>(batch) * params.seqlen + first) * heads;
  warp::store(GlobalView<float>{dgates, heads, tokens, 1, heads}, sum, head, 0);
}

}  // namespace tk::linear_attention
