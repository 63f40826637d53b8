// Sums of what step_gradients.cuh found for each head, over rows: in one order.
//
// Grid: a block of four warps for sixteen heads of one part; a warp has every fourth run of 64
// rows. Limit: latency.
#pragma once

#include "kernels/linear_attention/gate_tile.cuh"

namespace tk::linear_attention {

struct HeadSumsShared {
  WarpSums<1> sums;
};
static_assert(sizeof(HeadSumsShared) + 1024 <= kGateSharedBytes,
              "linear_attention.h's kGateSharedBytes covers the kernel's shared memory");

__device__ __forceinline__ void head_sums(const HeadSumsParams& params) {
  auto& shared = block::shared_memory<HeadSumsShared>();
  constexpr int kRun = 64;
  const int heads = params.num_heads, head = kHeadsOfBlock * grid::block_x();
  const int part = grid::block_y(), batch = grid::block_z();
  float* const results = params.sums[part];
  if (results == nullptr) return;
  const float* first =
      params.head_parts + (static_cast<int64>(batch) * params.rows * kHeadParts + part) * heads;
  HeadRows sum;
  warp::zero(sum);
  for (int row = kRun * warp::index(); row < params.rows; row += kGateWarps * kRun) {
    RegTile<float, kHeadsOfBlock, kRun> tile;
    warp::load(tile,
               GlobalView<const float>{first, heads, params.rows, 1, int64{kHeadParts} * heads},
               head, row);
    HeadRows of_run;
    warp::row_sum(of_run, tile);
    warp::add(sum, sum, of_run);
  }
  shared.sums.put(0, sum);
  block::sync();
  if (warp::index() != 0) return;
  shared.sums.add(sum, 0, 1, kGateWarps);
  warp::store(GlobalVec<float>{results + static_cast<int64>(batch) * heads, heads}, sum, head);
}

}  // namespace tk::linear_attention
