// Sums of what step_gradients.cuh found for each head, over rows: in one order.
//
// Grid: a block of four warps for sixteen heads of one part; a warp has every fourth run of 64
// rows. Limit: latency.
#pragma once

#include "kernels/linear_attention/steps.cuh"

namespace tk::linear_attention {

__device__ __forceinline__ void head_sums(const HeadSumsParams& params) {
  struct Shared {
    HeadSums<1> sums;
  };
  auto& shared = block::shared_memory<Shared>();
  const int heads = params.num_heads, head = kHeadsOfBlock * grid::block_x();
  const int part = grid::block_y(), batch = grid::block_z();
  float* const results = params.sums[part];
  if (results == nullptr) return;
  const float* first =
      params.head_parts + (static_cast<int64>(batch) * params.rows * kHeadParts + part) * heads;
  HeadRows sums[1];
  warp::zero(sums[0]);
  for (int row = kChunk * warp::index(); row < params.rows; row += 4 * kChunk) {
    GateTile tile;
    warp::load(tile,
               GlobalView<const float>{first, heads, params.rows, 1, int64{kHeadParts} * heads},
               head, row);
    HeadRows sum;
    warp::row_sum(sum, tile);
    warp::add(sums[0], sums[0], sum);
  }
  shared.sums.add_up(sums);
  if (warp::index() != 0) return;
  warp::store(GlobalVec<float>{results + static_cast<int64>(batch) * heads, heads}, sums[0], head);
}

}  // namespace tk::linear_attention
