// dq from its fp32 sums: scaled, rounded and brought from fragment order to rows.
//
// Grid: a block of one warpgroup for 64 queries of one head. Limit: reading the sums.
#pragma once

#include "kernels/attention/attention.h"
#include "tk/tk.cuh"

namespace tk::attention {

template <typename T, int kHeadDim>
__device__ __forceinline__ void backward_finish(const BackwardFinishParams& params) {
  struct Shared {
    SharedTile<T, 64, kHeadDim> dq_smem;
  };
  static_assert(sizeof(Shared) + 1024 <= backward_finish_shared_bytes(kHeadDim),
                "attention.h's backward_finish_shared_bytes covers the kernel's shared memory");
  Shared& shared = block::shared_memory<Shared>();
  const int first_query = 64 * grid::block_x(), head = grid::block_y(), batch = grid::block_z();
  const int64 head_row = static_cast<int64>(batch) * params.num_heads + head;
  const float* sums =
      params.dq_acc + (head_row * padded_queries(params.seqlen_q) + first_query) * kHeadDim;
#pragma unroll
  for (int part = 0; part < kHeadDim / 64; ++part) {
    RegTile<float, 16, 64> dq;
    warpgroup::load_fragments(dq, sums + part * Fragments<64>::kValues);
    warp::mul(dq, dq, params.scale);
    warpgroup::store(shared.dq_smem.template cols<64>(part), dq);
  }
  publish_shared();
  warpgroup::sync();
  if (warpgroup::leader()) {
    tma::store(params.dq, shared.dq_smem, 0, first_query, head, batch);
    tma::commit();
    tma::wait_read<0>();
  }
}

}  // namespace tk::attention
