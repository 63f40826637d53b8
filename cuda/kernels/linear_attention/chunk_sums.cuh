// Running sums of a number of each token within its chunk: what the other kernels read as vectors
// of 64.
//
// Grid: a block of four warps for sixteen heads and four chunks; a warp has one chunk. Limit:
// reading x, of which every head's numbers lie apart.
#pragma once

#include "kernels/linear_attention/linear_attention.h"
#include "tk/tk.cuh"

namespace tk::linear_attention {

__device__ __forceinline__ void chunk_sums(const ChunkSumsParams& params) {
  const int chunk = kChunksOfBlock * grid::block_x() + warp::index();
  const int first = chunk * kChunk;
  const int head = kHeadsOfBlock * grid::block_y(), batch = grid::block_z();
  if (first >= params.seqlen) return;

  const int padded = static_cast<int>(padded_tokens(params.seqlen));
  const int64 results = static_cast<int64>(batch) * params.num_heads * padded + first;
  const int heads = params.num_heads, tokens = params.seqlen - first;
  RegTile<float, kHeadsOfBlock, kChunk> tile;
  warp::load(tile,
             GlobalView<const float>{
                 params.x + batch * params.x_batch_stride + first * params.x_token_stride, heads,
                 tokens, params.x_head_stride, params.x_token_stride},
             head, 0);
  const float scale = params.scale, least = params.least;
  // What is below `least` is `least`; what is not a number stays so.
  warp::map(tile, tile, [=](float x) { return (x < least ? least : x) * scale; });
  warp::cumsum_cols(tile, tile);
  warp::store_pairs(GlobalView<float>{params.sums + results, heads, kChunk, padded}, tile, head, 0);
}

}  // namespace tk::linear_attention
