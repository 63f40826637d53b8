// What the backward pass needs of each query: delta = rowsum(out * dout) - dlse, and lse, in base 2
// where no bias comes to scores.
//
// The cotangent of lse enters here alone: d lse / d s is the softmax itself, so it shifts delta.
// Grid: a block of one warpgroup for 64 queries of one head. Limit: reading out and dout.
#pragma once

#include "kernels/attention/attention.h"
#include "tk/tk.cuh"

namespace tk::attention {

template <typename T, int kHeadDimV>
__device__ __forceinline__ void backward_prepare(const BackwardPrepareParams& params) {
  using Tile = SharedTile<T, 64, kHeadDimV>;
  struct Shared {
    Tile out_smem, dout_smem;
    Barrier full;
  };
  static_assert(sizeof(Shared) + 1024 <= backward_prepare_shared_bytes(kHeadDimV),
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
  if (params.zeroed_columns > 0) {
    RegTile<float, 16, 64> nothing;
    warp::zero(nothing);
    float* sums = params.dq_acc + (head_row * padded + first_query) * params.zeroed_columns;
    for (int part = 0; part < params.zeroed_columns / 64; ++part) {
      warpgroup::store_fragments(sums + part * Fragments<64>::kValues, nothing);
    }
  }
  if (warpgroup::leader()) reset_turns(params.dq_order + head_row * (padded / 64) + block);
  if (warpgroup::leader() && params.next_tile != nullptr && head_row == 0 && block == 0) {
    reset_turns(params.next_tile);
  }

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

  PerRow<16> delta, scaled_lse;
  warp::fill(delta, 0.0f);
  shared.full.wait(0);
#pragma unroll 1  // few registers, many blocks: it is loads that take the time
  for (int part = 0; part < kHeadDimV / 64; ++part) {
    RegTile<float, 16, 64> out, dout;
    warpgroup::load(out, shared.out_smem.template cols<64>(part));
    warpgroup::load(dout, shared.dout_smem.template cols<64>(part));
    warp::mul(out, out, dout);
    warp::fold_row_sum(delta, out);
  }
  warp::finish_row_sum(delta);
  warp::zip(delta, delta, dlse, [](float sum, float d) { return sum - d; });
  warp::zip(delta, delta, lse, [](float x, float l) { return l == -kInfinity ? 0.0f : x; });
  const float factor = params.lse_factor;
  warp::map(scaled_lse, lse, [=](float l) { return l == -kInfinity ? kInfinity : l * factor; });
  const int size = static_cast<int>(padded);
  warpgroup::store(GlobalVec<float>{params.delta + head_row * padded, size}, delta, first_query);
  warpgroup::store(GlobalVec<float>{params.scaled_lse + head_row * padded, size}, scaled_lse,
                   first_query);
}

}  // namespace tk::attention
