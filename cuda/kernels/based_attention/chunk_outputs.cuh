// out of a chunk, from the state before it: Based attention's forward pass where the state is too
// large for a warpgroup's registers.
//
//   out = tril(f(scale q k^T)) v + phi(scale q) S^T
//
// as in outputs.cuh, with S as states.cuh stored it.
// Grid: chunks, groups, batch. A block walks the heads of its group, and their slices of 64 values.
// Roles: a producer warp loads q and k, then a ring of v and S: a step for every slice of every
// head; a consumer warpgroup forms the features of q piece by piece as an operand in registers.
// Budget for 32 values, 1 stage: 101 KB of shared memory; 24 registers of features, 32 of out, 16
// of weights a thread. Limit: memory, reading 2 F bytes of states for every column of 64 tokens'
// values.
#pragma once

#include "kernels/based_attention/parts.cuh"

namespace tk::based_attention {

template <typename Traits>
struct ChunkOutputs {
  using T = typename Traits::T;
  using KeyTile = typename Traits::KeyTile;
  using ValueTile = typename Traits::ValueTile;
  using PieceTile = typename Traits::PieceTile;
  static constexpr int kPieces = Traits::kPieces;
  static constexpr int kConsumers = 1;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 232;

  using Ring = Pipeline<Traits::kStages>;

  struct Step {
    ValueTile v_smem;
    PieceTile state_smem[kPieces];
  };
  struct Shared {
    KeyTile q_smem, k_smem;
    Step steps[Traits::kStages];
    ValueTile out_smem;
    Documents<Traits::kDocuments> documents;
    Barrier keys_full;
    Ring ring;
  };
  static_assert(sizeof(Shared) + 1024 <= chunk_outputs_shared_bytes(Traits::kDim, Traits::kStages),
                "based_attention.h's chunk_outputs_shared_bytes covers the kernel's shared memory");
  static constexpr int kStepBytes = ValueTile::kBytes + kPieces * PieceTile::kBytes;

  __device__ __forceinline__ static void init(const ChunkOutputsParams&, Shared& shared) {
    shared.keys_full.init(1);
    shared.ring.init(4 * kConsumers);
  }

  __device__ __forceinline__ static void load(const ChunkOutputsParams& params, Shared& shared) {
    const GroupSteps steps(params);
    const int token = steps.chunk * kChunk;
    shared.keys_full.expect(2 * KeyTile::kBytes + Documents<Traits::kDocuments>::kBytes);
    tma::load(shared.q_smem, params.q, shared.keys_full, tma::Keep::kBriefly, 0, token, steps.group,
              steps.batch);
    tma::load(shared.k_smem, params.k, shared.keys_full, tma::Keep::kBriefly, 0, token, steps.group,
              steps.batch);
    shared.documents.load(params.counts, shared.keys_full, steps.batch, steps.chunk, params.chunks);
    typename Ring::State state;
    for (int index = 0; index < steps.count(); ++index, state.advance()) {
      shared.ring.acquire(state, kStepBytes);
      Barrier& full = shared.ring.full(state);
      Step& step = shared.steps[state.stage];
      tma::load(step.v_smem, params.v, full, tma::Keep::kBriefly, steps.slice(index) * kSlice,
                token, steps.head(index), steps.batch);
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        tma::load(step.state_smem[piece], params.states, full, tma::Keep::kBriefly,
                  piece * Traits::kPieceColumns, steps.slice(index) * kSlice,
                  steps.matrix(params, index));
      }
    }
  }

  __device__ __forceinline__ static void compute(const ChunkOutputsParams& params, Shared& shared,
                                                 int) {
    const GroupSteps steps(params);
    RegTile<T, 16, kChunk> weights;
    shared.keys_full.wait(0);
    {
      RegTile<float, 16, kChunk> scores;
      warpgroup::mm_ABt(scores, shared.q_smem, shared.k_smem);
      warpgroup::mma_commit();
      warpgroup::mma_wait<0>(scores);
      shared.documents.map_seen(weights, scores, Taylor{params.scale});
    }
    typename Ring::State state;
    for (int index = 0; index < steps.count(); ++index, state.advance()) {
      const Step& step = shared.steps[state.stage];
      RegTile<float, 16, kSlice> out;
      shared.ring.wait(state);
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        typename Traits::Features queries;
        warpgroup::load_products<Traits::kDim>(queries, shared.q_smem,
                                               piece * Traits::kPieceColumns, params.factors);
        warpgroup::mma_ABt(out, queries, step.state_smem[piece], piece > 0);
        warpgroup::mma_commit();
        warpgroup::mma_wait<0>(out, queries);
      }
      shared.documents.keep_rows_before(out);
      warpgroup::mma_AB(out, weights, step.v_smem);
      warpgroup::mma_commit();
      warpgroup::mma_wait<0>(out, weights);
      shared.ring.release(state);
      if (warpgroup::leader()) tma::wait_read<0>();  // the last slice has left
      warpgroup::sync();
      warpgroup::store(shared.out_smem, out);
      publish_shared();
      warpgroup::sync();
      if (warpgroup::leader()) {
        tma::store(params.out, shared.out_smem, steps.slice(index) * kSlice, steps.chunk * kChunk,
                   steps.head(index), steps.batch);
        tma::commit();
      }
    }
    if (warpgroup::leader()) tma::wait_read<0>();
  }
};

template <typename Traits>
__device__ __forceinline__ void chunk_outputs(const ChunkOutputsParams& params) {
  block::run<ChunkOutputs<Traits>>(params);
}

}  // namespace tk::based_attention
