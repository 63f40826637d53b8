// The gradients of a chunk, from the state before it and the state's gradient after it.
//
// For the heads that share q and k, with s = scale q k^T where a query sees a key, f(s) = 1 + s +
// s^2 / 2, S the state before the chunk and dS its gradient after it:
//   m = scale (dout v^T) * (1 + s)
//   dq = sum over heads of m k + phi'(q) (dout S)
//   dk = sum over heads of m^T q + phi'(k) (v dS)
//   dv = f(s)^T dout + phi(k) dS^T
// where phi' brings gradients of features to those of the values (tk/sm90/products.cuh).
// Grid: chunks, groups, batch: a block walks the heads of its group, and their slices of 64 values.
// Nothing is added in global memory.
// Roles: a producer warp loads q and k, then a ring of v, dout, S and dS: a step for every slice of
// every head. Consumer 0 has the chunk's tokens as queries: dq; consumer 1 as keys: dk, dv.
// Budget for 16 values, 2 stages: 132 KB of shared memory; 80 registers of gradients of features,
// 32 of dp a thread. Limit: memory, reading 4 F bytes of states for every column of 64 tokens'
// values.
#pragma once

#include "kernels/based_attention/parts.cuh"

namespace tk::based_attention {

template <typename Traits>
struct Gradients {
  using T = typename Traits::T;
  using KeyTile = typename Traits::KeyTile;
  using ValueTile = typename Traits::ValueTile;
  using PieceTile = typename Traits::PieceTile;
  static constexpr int kPieces = Traits::kPieces;
  static constexpr int kConsumers = 2;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  using Ring = Pipeline<Traits::kStages>;
  using Square = RegTile<float, 16, 64>;
  using Operand = RegTile<T, 16, 64>;
  using Sum = RegTile<float, 16, KeyTile::kCols>;

  struct Step {
    ValueTile v_smem, dout_smem;
    PieceTile state_smem[kPieces], dstate_smem[kPieces];
  };
  struct Shared {
    KeyTile q_smem, k_smem;
    Step steps[Traits::kStages];
    ValueTile dv_smem;
    KeyTile dq_smem, dk_smem;
    Documents<Traits::kDocuments> documents;
    Barrier keys_full;
    Ring ring;
  };
  static_assert(sizeof(Shared) + 1024 <= gradients_shared_bytes(Traits::kDim, Traits::kStages),
                "based_attention.h's gradients_shared_bytes covers the kernel's shared memory");
  static constexpr int kStepBytes = 2 * ValueTile::kBytes + 2 * kPieces * PieceTile::kBytes;

  __device__ __forceinline__ static void init(const GradientsParams&, Shared& shared) {
    shared.keys_full.init(1);
    shared.ring.init(4 * kConsumers);
  }

  __device__ __forceinline__ static void load(const GradientsParams& params, Shared& shared) {
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
      tma::load(step.dout_smem, params.dout, full, tma::Keep::kBriefly, steps.slice(index) * kSlice,
                token, steps.head(index), steps.batch);
      const int row = steps.slice(index) * kSlice, matrix = steps.matrix(params, index);
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        tma::load(step.state_smem[piece], params.states, full, tma::Keep::kBriefly,
                  piece * Traits::kPieceColumns, row, matrix);
        tma::load(step.dstate_smem[piece], params.dstates, full, tma::Keep::kBriefly,
                  piece * Traits::kPieceColumns, row, matrix);
      }
    }
  }

  __device__ __forceinline__ static void compute(const GradientsParams& params, Shared& shared,
                                                 int consumer) {
    if (consumer == 0) {
      sum_dq(params, shared);
    } else {
      sum_dk(params, shared);
    }
  }

  // Tokens as queries: rows are those that look, columns those that are seen.
  __device__ __forceinline__ static void sum_dq(const GradientsParams& params, Shared& shared) {
    const GroupSteps steps(params);
    const Taylor taylor{params.scale};
    Square dp;
    Sum dq;
    warp::zero(dq);
    shared.keys_full.wait(0);
    typename Ring::State state;
    for (int index = 0; index < steps.count(); ++index, state.advance()) {
      const Step& step = shared.steps[state.stage];
      shared.ring.wait(state);
      warpgroup::mma_ABt(dp, step.dout_smem, step.v_smem, steps.slice(index) > 0);
      warpgroup::mma_commit();
      Operand dout;
      warpgroup::load(dout, step.dout_smem);
      shared.documents.keep_rows_before(dout);
      fold_features(dq, dp, dout, step.state_smem, shared.q_smem, params.factors);
      shared.ring.release(state);
      if (steps.slice(index) + 1 < steps.slices) continue;
      Square scores, products, seen;
      warpgroup::mm_ABt(scores, shared.q_smem, shared.k_smem);
      warpgroup::mma_commit();
      warpgroup::mma_wait<0>(scores);
      warp::zip(products, scores, dp,
                [=](float x, float d) { return d * taylor.slope(x) * taylor.scale; });
      shared.documents.map_seen(seen, products, [](float x) { return x; });
      add_product(dq, seen, shared.k_smem);
    }
    store_sum(params.dq, shared.dq_smem, dq, steps);
  }

  // Tokens as keys: rows are those that are seen, columns those that look.
  __device__ __forceinline__ static void sum_dk(const GradientsParams& params, Shared& shared) {
    const GroupSteps steps(params);
    const Taylor taylor{params.scale};
    Square dp;
    Sum dk;
    warp::zero(dk);
    shared.keys_full.wait(0);
    typename Ring::State state;
    for (int index = 0; index < steps.count(); ++index, state.advance()) {
      const Step& step = shared.steps[state.stage];
      shared.ring.wait(state);
      Square dv;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        typename Traits::Features keys;
        warpgroup::load_products<Traits::kDim>(keys, shared.k_smem, piece * Traits::kPieceColumns);
        warpgroup::mma_ABt(dv, keys, step.dstate_smem[piece], piece > 0);
        warpgroup::mma_commit();
        warpgroup::mma_wait<0>(dv, keys);
      }
      shared.documents.keep_rows_after(dv);
      Operand weights;
      {
        Square scores;
        warpgroup::mm_ABt(scores, shared.k_smem, shared.q_smem);
        warpgroup::mma_commit();
        warpgroup::mma_wait<0>(scores);
        shared.documents.map_seen_by(weights, scores, taylor);
      }
      warpgroup::mma_AB(dv, weights, step.dout_smem);
      warpgroup::mma_commit();
      warpgroup::mma_wait<0>(dv, weights);
      store_dv(params, shared.dv_smem, dv, steps, index);

      warpgroup::mma_ABt(dp, step.v_smem, step.dout_smem, steps.slice(index) > 0);
      warpgroup::mma_commit();
      Operand v;
      warpgroup::load(v, step.v_smem);
      shared.documents.keep_rows_after(v);
      fold_features(dk, dp, v, step.dstate_smem, shared.k_smem, kKeyFactors);
      shared.ring.release(state);
      if (steps.slice(index) + 1 < steps.slices) continue;
      Square scores, products, seen;
      warpgroup::mm_ABt(scores, shared.k_smem, shared.q_smem);
      warpgroup::mma_commit();
      warpgroup::mma_wait<0>(scores);
      warp::zip(products, scores, dp,
                [=](float x, float d) { return d * taylor.slope(x) * taylor.scale; });
      shared.documents.map_seen_by(seen, products, [](float x) { return x; });
      add_product(dk, seen, shared.q_smem);
    }
    store_sum(params.dk, shared.dk_smem, dk, steps);
  }

  // sum += what the gradients of features, values state, are of the values in `smem`. Waits for all
  // products, that of dp too.
  __device__ __forceinline__ static void fold_features(Sum& sum, Square& dp, Operand& values,
                                                       const PieceTile (&state_smem)[kPieces],
                                                       const KeyTile& smem,
                                                       const ProductFactors& factors) {
#pragma unroll 1  // one piece at a time: all of them at once are more registers than there are
    for (int piece = 0; piece < kPieces; ++piece) {
      RegTile<float, 16, Traits::kPieceColumns> dfeatures;
      warpgroup::mm_AB(dfeatures, values, state_smem[piece]);
      warpgroup::mma_commit();
      warpgroup::mma_wait<0>(dp, dfeatures, values);
#pragma unroll
      for (int known = 0; known < kPieces; ++known) {
        if (known != piece) continue;
        warpgroup::fold_products<Traits::kDim>(sum, dfeatures, smem, known * Traits::kPieceColumns,
                                               factors);
      }
    }
  }

  // sum += factors smem
  __device__ __forceinline__ static void add_product(Sum& sum, const Square& factors,
                                                     const KeyTile& smem) {
    Operand operand;
    Sum product;
    warp::convert(operand, factors);
    warpgroup::mm_AB(product, operand, smem);
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(product, operand);
    warp::add(sum, sum, product);
  }

  __device__ __forceinline__ static void store_dv(const GradientsParams& params,
                                                  const ValueTile& dv_smem, const Square& dv,
                                                  const GroupSteps& steps, int index) {
    if (warpgroup::leader()) tma::wait_read<0>();  // the last slice has left
    warpgroup::sync();
    warpgroup::store(dv_smem, dv);
    publish_shared();
    warpgroup::sync();
    if (warpgroup::leader()) {
      tma::store(params.dv, dv_smem, steps.slice(index) * kSlice, steps.chunk * kChunk,
                 steps.head(index), steps.batch);
      tma::commit();
    }
  }

  __device__ __forceinline__ static void store_sum(const TensorMap& map, const KeyTile& smem,
                                                   const Sum& sum, const GroupSteps& steps) {
    warpgroup::store(smem, sum);
    publish_shared();
    warpgroup::sync();
    if (warpgroup::leader()) {
      tma::store(map, smem, 0, steps.chunk * kChunk, steps.group, steps.batch);
      tma::commit();
      tma::wait_read<0>();
    }
  }
};

template <typename Traits>
__device__ __forceinline__ void gradients(const GradientsParams& params) {
  block::run<Gradients<Traits>>(params);
}

}  // namespace tk::based_attention
