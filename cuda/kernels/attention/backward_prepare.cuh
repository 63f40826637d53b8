// What the backward pass needs of each query: delta = rowsum(out * dout) - dlse, and lse in base 2.
//
// The cotangent of lse enters here alone: d lse / d s is the softmax itself, so it shifts delta.
// Grid: a block of one warpgroup for 64 queries of one head. Limit: reading out and dout.
#pragma once

#include "kernels/attention/attention.h"
#include "tk/tk.cuh"

namespace tk::attention {

template <typename T, int kHeadDim>
__device__ __forceinline__ void backward_prepare(const BackwardPrepareParams& params) {
  using Tile = SharedTile<T, 64, kHeadDim>;
  struct Shared {
    Tile out_smem, dout_smem;
    Barrier full;
  };
  static_assert(sizeof(Shared) + 1024 <= backward_prepare_shared_bytes(kHeadDim),
                "attention.h's backward_prepare_shared_bytes covers the kernel's shared memory");
  Shared& shared = block::shared_memory<Shared>();
  const int block = grid::block_x(), head = grid::block_y(), batch = grid::block_z();
  const int first_query = 64 * block;
  if (warpgroup::leader()) {
    shared.full.init(1);
    publish_barriers();
    shared.full.expect(2 * Tile::kBytes);
    tma::load(shared.out_smem, params.out, shared.full, tma::Keep::kBriefly, 0, first_query, head,
              batch);
    tma::load(shared.dout_smem, params.dout, shared.full, tma::Keep::kNormal, 0, first_query, head,
              batch);
  }
  block::sync();

  const int64 padded = padded_queries(params.seqlen_q);
  const int64 head_row = static_cast<int64>(batch) * params.num_heads + head;
  if (params.zero_dq) {
    RegTile<float, 16, 64> nothing;
    warp::zero(nothing);
    for (int part = 0; part < kHeadDim / 64; ++part) {
      warpgroup::store_fragments(params.dq_acc + (head_row * padded + first_query) * kHeadDim +
                                     part * Fragments<64>::kValues,
                                 nothing);
    }
  }
  if (warpgroup::leader()) reset_turns(params.dq_order + head_row * (padded / 64) + block);

  const int64 first = static_cast<int64>(batch) * params.seqlen_q * params.num_heads + head;
  PerRow<16> lse, dlse;
  warpgroup::load(lse,
                  GlobalVec<const float>{params.lse + first, params.seqlen_q, params.num_heads},
                  first_query, -kInfinity);
  warp::fill(dlse, 0.0f);
  if (params.dlse != nullptr) {
    warpgroup::load(dlse,
                    GlobalVec<const float>{params.dlse + first, params.seqlen_q, params.num_heads},
                    first_query, 0.0f);
  }

  RegTile<float, 16, kHeadDim> out, dout;
  shared.full.wait(0);
  warpgroup::load(out, shared.out_smem);
  warpgroup::load(dout, shared.dout_smem);
  warp::mul(out, out, dout);
  PerRow<16> delta, lse_log2;
  warp::row_sum(delta, out);
  warp::zip(delta, delta, dlse, [](float sum, float d) { return sum - d; });
  warp::zip(delta, delta, lse, [](float x, float l) { return l == -kInfinity ? 0.0f : x; });
  warp::map(lse_log2, lse, [](float l) { return l == -kInfinity ? kInfinity : l * kLog2E; });
  const int size = static_cast<int>(padded);
  warpgroup::store(GlobalVec<float>{params.delta + head_row * padded, size}, delta, first_query);
  warpgroup::store(GlobalVec<float>{params.lse_log2 + head_row * padded, size}, lse_log2,
                   first_query);
}

}  // namespace tk::attention
