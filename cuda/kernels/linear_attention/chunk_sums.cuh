// Running sums of a number of each token within its chunk: what the other kernels read as vectors
// of 64.
//
// Grid: a block of four warps for a chunk of sixteen heads. Limit: reading x, of which every head's
// numbers lie apart.
#pragma once

#include "kernels/linear_attention/gate_tile.cuh"

namespace tk::linear_attention {

struct ChunkSumsShared {
  WarpSums<1> sums;
};
static_assert(sizeof(ChunkSumsShared) + 1024 <= kGateSharedBytes,
              "linear_attention.h's kGateSharedBytes covers the kernel's shared memory");

__device__ __forceinline__ void chunk_sums(const ChunkSumsParams& params) {
  auto& shared = block::shared_memory<ChunkSumsShared>();
  const GatePlace place = GatePlace::of(params.seqlen, params.num_heads);
  GateTile tile;
  warp::load(
      tile,
      GlobalView<const float>{
          params.x + place.batch * params.x_batch_stride + place.first * params.x_token_stride,
          place.heads, place.tokens, params.x_head_stride, params.x_token_stride},
      place.head, 0);
  const float scale = params.scale, least = params.least;
  // What is below `least` is `least`; what is not a number stays so.
  warp::map(tile, tile, [=](float x) { return (x < least ? least : x) * scale; });
  cumsum_chunk(tile, shared.sums);
  warp::store_pairs(place.by_head(params.sums), tile, place.head, 0);
}

}  // namespace tk::linear_attention
