// The gradients of a chunk, from the state before it and the state's gradient after it.
//
// For the heads that share q and k, with s = scale q k^T where a query sees a key, f(s) = 1 + s +
// s^2 / 2, S the state before the chunk and dS its gradient after it:
//   m = scale (dout v^T) * (1 + s)
//   dq = sum over heads of m k + phi'(q) (dout S)
//   dk = sum over heads of m^T q + phi'(k) (v dS)
//   dv = f(s)^T dout + phi(k) dS^T
// where phi' brings gradients of features to those of the values (tk/sm90/products.cuh).
// Grid: a block for each multiprocessor. A tile is a chunk of a group: a block walks the heads of
// the group, and their slices of 64 values, then those of its next tile. Nothing is added in global
// memory.
// Roles: a producer warp loads a ring of q, k, v, dout, S and dS: a step for every slice of every
// head, ahead of the tile that is computed. Consumer 0 has the chunk's tokens as queries: dq;
// consumer 1 as keys: dk, dv.
// Budget for 32 values, 1 stage: 186 KB of shared memory; 48 registers of gradients of features,
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
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;

  using Ring = Pipeline<Traits::kStages>;
  using Square = RegTile<float, 16, 64>;
  using Operand = RegTile<T, 16, 64>;
  using Sum = RegTile<float, 16, KeyTile::kCols>;

  struct Step {
    ValueTile v_smem, dout_smem;
    PieceTile state_smem[kPieces], dstate_smem[kPieces];
    KeyTile q_smem, k_smem;
  };
  struct Shared {
    Step steps[Traits::kStages];
    ValueTile dv_smem;
    KeyTile dq_smem, dk_smem;
    Documents<Traits::kDocuments> documents[Traits::kStages];
    Ring ring;
  };
  static_assert(sizeof(Shared) + 1024 <= gradients_shared_bytes(Traits::kDim, Traits::kStages),
                "based_attention.h's gradients_shared_bytes covers the kernel's shared memory");
  static constexpr int kStepBytes = 2 * ValueTile::kBytes + 2 * kPieces * PieceTile::kBytes +
                                    2 * KeyTile::kBytes + Documents<Traits::kDocuments>::kBytes;

  __device__ __forceinline__ static grid::Rounds tiles_of(const GradientsParams& params) {
    return {grid::block_x(), grid::blocks_x(), params.tiles};
  }

  __device__ __forceinline__ static void init(const GradientsParams&, Shared& shared) {
    shared.ring.init(4 * kConsumers);
  }

  __device__ __forceinline__ static void load(const GradientsParams& params, Shared& shared) {
    typename Ring::State state;
    for (grid::Rounds tiles = tiles_of(params); tiles.valid(); tiles.next()) {
      const GroupSteps steps(params, tiles.index());
      for (int index = 0; index < steps.count(); ++index, state.advance()) {
        load_step(params, shared, steps, index, state);
      }
    }
  }

  __device__ __forceinline__ static void load_step(const GradientsParams& params, Shared& shared,
                                                   const GroupSteps& steps, int index,
                                                   const typename Ring::State& state) {
    shared.ring.acquire(state, kStepBytes);
    Barrier& full = shared.ring.full(state);
    Step& step = shared.steps[state.stage];
    const int token = steps.chunk * kChunk, col = steps.slice(index) * kSlice;
    tma::load(step.q_smem, params.q, full, tma::Keep::kNormal, 0, token, steps.group, steps.batch);
    tma::load(step.k_smem, params.k, full, tma::Keep::kNormal, 0, token, steps.group, steps.batch);
    tma::load(step.v_smem, params.v, full, tma::Keep::kNormal, col, token, steps.head(index),
              steps.batch);
    tma::load(step.dout_smem, params.dout, full, tma::Keep::kNormal, col, token, steps.head(index),
              steps.batch);
    const int matrix = steps.matrix(params, index);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      tma::load(step.state_smem[piece], params.states, full, tma::Keep::kBriefly,
                piece * Traits::kPieceColumns, col, matrix);
      tma::load(step.dstate_smem[piece], params.dstates, full, tma::Keep::kBriefly,
                piece * Traits::kPieceColumns, col, matrix);
    }
    shared.documents[state.stage].load(params.counts, full, steps.batch, steps.chunk,
                                       params.chunks);
  }

  __device__ __forceinline__ static void compute(const GradientsParams& params, Shared& shared,
                                                 int consumer) {
    typename Ring::State state;
    if (consumer == 0) {
      for (grid::Rounds tiles = tiles_of(params); tiles.valid(); tiles.next()) {
        sum_dq(params, shared, GroupSteps(params, tiles.index()), state);
      }
    } else {
      for (grid::Rounds tiles = tiles_of(params); tiles.valid(); tiles.next()) {
        sum_dk(params, shared, GroupSteps(params, tiles.index()), state);
      }
    }
    if (warpgroup::leader()) tma::wait_read<0>();
  }

  // Tokens as queries: rows are those that look, columns those that are seen.
  __device__ __forceinline__ static void sum_dq(const GradientsParams& params, Shared& shared,
                                                const GroupSteps& steps,
                                                typename Ring::State& state) {
    const Taylor taylor{params.scale};
    Square dp;
    Sum dq;
    warp::zero(dq);
    for (int index = 0; index < steps.count(); ++index, state.advance()) {
      const Step& step = shared.steps[state.stage];
      const Documents<Traits::kDocuments>& documents = shared.documents[state.stage];
      shared.ring.wait(state);
      warpgroup::mma_ABt(dp, step.dout_smem, step.v_smem, steps.slice(index) > 0);
      warpgroup::mma_commit();
      Operand dout;
      warpgroup::load(dout, step.dout_smem);
      documents.keep_rows_before(dout);
      fold_features(dq, dp, dout, step.state_smem, step.q_smem, params.factors);
      if (steps.slice(index) + 1 == steps.slices) {
        Square scores, products, seen;
        warpgroup::mm_ABt(scores, step.q_smem, step.k_smem);
        warpgroup::mma_commit();
        warpgroup::mma_wait<0>(scores);
        warp::zip(products, scores, dp,
                  [=](float x, float d) { return d * taylor.slope(x) * taylor.scale; });
        documents.map_seen(seen, products, [](float x) { return x; });
        add_product(dq, seen, step.k_smem);
      }
      shared.ring.release(state);
    }
    if (warpgroup::leader()) tma::wait_read<0>();  // the last tile's has left
    warpgroup::sync();
    store_sum(params.dq, shared.dq_smem, dq, steps);
  }

  // Tokens as keys: rows are those that are seen, columns those that look.
  __device__ __forceinline__ static void sum_dk(const GradientsParams& params, Shared& shared,
                                                const GroupSteps& steps,
                                                typename Ring::State& state) {
    const Taylor taylor{params.scale};
    Square dp;
    Sum dk;
    warp::zero(dk);
    for (int index = 0; index < steps.count(); ++index, state.advance()) {
      const Step& step = shared.steps[state.stage];
      const Documents<Traits::kDocuments>& documents = shared.documents[state.stage];
      shared.ring.wait(state);
      Square dv, scores;
      warpgroup::mm_ABt(scores, step.k_smem, step.q_smem);
      warpgroup::mma_commit();
      typename Traits::Features keys;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        if (piece > 0) warpgroup::mma_wait<0>(dv, keys);
        warpgroup::load_products<Traits::kDim>(keys, step.k_smem, piece * Traits::kPieceColumns);
        warpgroup::mma_ABt(dv, keys, step.dstate_smem[piece], piece > 0);
        warpgroup::mma_commit();
      }
      Operand weights;
      warpgroup::mma_wait<1>(scores);
      documents.map_seen_by(weights, scores, taylor);
      warpgroup::mma_wait<0>(dv, keys);
      documents.keep_rows_after(dv);
      warpgroup::mma_AB(dv, weights, step.dout_smem);
      warpgroup::mma_commit();
      warpgroup::mma_ABt(dp, step.v_smem, step.dout_smem, steps.slice(index) > 0);
      warpgroup::mma_commit();
      Operand v;
      warpgroup::load(v, step.v_smem);
      documents.keep_rows_after(v);
      warpgroup::mma_wait<1>(dv, weights);
      store_dv(params, shared.dv_smem, dv, steps, index);
      fold_features(dk, dp, v, step.dstate_smem, step.k_smem, kKeyFactors);
      if (steps.slice(index) + 1 == steps.slices) {
        Square scores, products, seen;
        warpgroup::mm_ABt(scores, step.k_smem, step.q_smem);
        warpgroup::mma_commit();
        warpgroup::mma_wait<0>(scores);
        warp::zip(products, scores, dp,
                  [=](float x, float d) { return d * taylor.slope(x) * taylor.scale; });
        documents.map_seen_by(seen, products, [](float x) { return x; });
        add_product(dk, seen, step.q_smem);
      }
      shared.ring.release(state);
    }
    // The last tile's dk left before this one's dv came.
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
    }
  }
};

template <typename Traits>
__device__ __forceinline__ void gradients(const GradientsParams& params) {
  block::run<Gradients<Traits>>(params);
}

}  // namespace tk::based_attention
