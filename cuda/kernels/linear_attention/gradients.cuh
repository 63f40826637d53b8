// The gradients of a chunk, from the state before it and the state's gradient after it.
//
// Of every pair of chunks the first finds its S and the second its dS in memory; the other one
// comes from the chunk beside it, by a step of the recurrence. For the heads that share q and k,
// with gates D, before, after, total (gates.cuh), w the weights of tokens, S the state before the
// chunk and dS its gradient after it:
//   dp = dout v^T, p = scale q k^T * D, and their product W = p * dp
//   dq = scale m k + sum over heads of diag(scale before) dout S, m = sum over heads of dp * D w
//   dk = scale m^T q + sum over heads of diag(w after) v dS
//   du = p^T dout + diag(after) k dS^T,  dv = w du + skip * dout
//   dw = colsum(W) + rowsum(v * diag(after) k dS^T),  dskip = diagonal(dout^T v)
// and what the gradients of gates are made of (gate_gradients.cuh), with W without its diagonal,
// which no gate reaches:
//   as_query = rowsum(W w) + rowsum(diag(scale before) dout * (q S^T)),  as_key = w colsum(W)
//   to_state = rowsum(diag(w after) v * (k dS^T)),  through = total rowsum(S * dS)
// (Dao and Gu 2024, section 6, differentiated; sums over heads before products with k and q as in
// Mamba-2's own backward pass.)
// Grid: a block for each multiprocessor; each walks every so many of all places: chunks of groups,
// times parts, which cut dq's and dk's columns. Nothing is added in global memory. Roles: a
// producer warp loads a ring of keys, which are a place's, and one of v, dout, S, dS and gates: a
// step for every slice of every head. Consumer 0 has the chunk's tokens as queries: dq, m; and
// makes the state that is not in memory, for both, of values whose factors a warp beside the
// producer has found meanwhile. Consumer 1 has them as keys: dk, dv. dq leaves through the tile of
// k, dk through that of q; storing warps see to that, and only then are a place's keys free for
// others. Budget at K = 128, 2 stages of both: 220 KB of shared memory; a
// thread has 64 registers of dq or dk, 32 of scores, 32 of m, 64 of two products. Limit: memory,
// the states of each chunk most of all, and close behind it the bandwidth of shared memory.
#pragma once

#include "kernels/linear_attention/gradients_copies.cuh"
#include "tk/tk.cuh"

namespace tk::linear_attention {

template <typename Traits>
struct Gradients : GradientsCopies<Traits> {
  using Copies = GradientsCopies<Traits>;
  using T = typename Traits::T;
  static constexpr int kKeyDim = Traits::kKeyDim;
  static constexpr unsigned kFeatures = Traits::kFeatures;
  static constexpr int kColumns = Copies::kColumns;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  // Which sum's addresses are made when it is stored, so that no register of consumer 1 is spilled:
  // found by trying.
  static constexpr bool kHasSkip = (kFeatures & kSkip) != 0,
                        kHasCounts = (kFeatures & kCounts) != 0;
  static constexpr bool kDvAfresh = kHasCounts && kHasSkip;
  static constexpr bool kDkAfresh = kHasCounts != kHasSkip && (kHasCounts || kSame<T, fp16>);

  using typename Copies::DvRing;
  using typename Copies::Keys;
  using typename Copies::KeyTile;
  using typename Copies::KeyTiles;
  using typename Copies::Place;
  using typename Copies::Ring;
  using typename Copies::Shared;
  using typename Copies::Step;
  using Square = RegTile<float, 16, 64>;
  using Operand = RegTile<T, 16, 64>;
  using Sum = RegTile<float, 16, kColumns>;

  __device__ __forceinline__ static void compute(const GradientsParams& params, Shared& shared,
                                                 int consumer) {
    typename Ring::State state;
    if (consumer == 0) {
      Copies::walk(params, [&](const Place& place, const typename Keys::State& keys) {
        sum_dq(params, shared, place, keys, state);
      });
    } else {
      typename DvRing::State dv_state;
      Copies::walk(params, [&](const Place& place, const typename Keys::State& keys) {
        sum_dk(params, shared, place, keys, state, dv_state);
      });
    }
  }

  // Tokens as queries: rows are those that look, columns those that are seen.
  __device__ __forceinline__ static void sum_dq(const GradientsParams& params, Shared& shared,
                                                const Place& place,
                                                const typename Keys::State& keys,
                                                typename Ring::State& state) {
    const KeyTiles& tiles = shared.key_tiles[keys.stage];
    Sum dq;
    Square m, scores;
    warp::zero(dq);
    warp::zero(m);
    shared.keys.wait(keys);
    multiply_keys(scores, tiles.q_smem, tiles.k_smem, params.scale);
    int head = place.first_head;
    do {
      PerRow<16> as_query, through;
      warp::zero(as_query);
      warp::zero(through);
      for (int slice = 0; slice < place.slices; ++slice, state.advance()) {
        const Step& step = shared.steps[state.stage];
        const auto q_smem = warpgroup::afresh(tiles.q_smem);
        shared.ring.wait(state);
        PerRow<16> before;
        step.gates.before(before);
        if constexpr (Copies::kFactorsAhead) shared.factors_full[state.stage].wait(state.phase);
        step_state(params, tiles, step, place, through);
        if (warpgroup::leader()) shared.stepped[state.stage].arrive();

        Square from_state, dp;
        warpgroup::mm_ABt(from_state, q_smem, step.state_smem);
        warpgroup::mma_commit();
        warpgroup::mm_ABt(dp, step.dout_smem, step.v_smem);
        warpgroup::mma_commit();
        warp::mul(before, before, params.scale);
        Operand dout;
        warpgroup::load(dout, step.dout_smem);
        warpgroup::mma_wait<1>(from_state);
        fold_dot(as_query, dout, from_state, before);
        warp::mul_rows(dout, dout, before);
        warpgroup::mma_AB(dq, dout, step.state_smem.template cols<kColumns>(place.part));
        warpgroup::mma_commit();
        warpgroup::mma_wait<1>(dp);
        step.gates.fold_scores(m, as_query, dp, scores);
        warpgroup::mma_wait<0>(dq, dout);
        shared.ring.release(state);
      }
      if (place.leads()) {
        const int index = place.index(params, head);
        warpgroup::store_row_sums(chunk_of(params.as_query, index), as_query,
                                  chunk_of(params.through, index), through);
      }
    } while (++head < place.first_head + place.heads);

    Operand scaled;
    warp::mul(scaled, m, params.scale);
    warpgroup::store(tiles.m_smem(), scaled);
    publish_shared();
    warpgroup::sync();
    if (warpgroup::leader()) shared.m_full[keys.stage].arrive();
    warpgroup::mma_AB(dq, scaled, tiles.k_smem.template cols<kColumns>(place.part));
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(dq, scaled);
    shared.k_read[keys.stage].wait(keys.phase);
    hand_over<false>(shared.dq_full[keys.stage], tiles.dq_smem(), dq);
  }

  // Tokens as keys: rows are those that are seen, columns those that look.
  __device__ __forceinline__ static void sum_dk(const GradientsParams& params, Shared& shared,
                                                const Place& place,
                                                const typename Keys::State& keys,
                                                typename Ring::State& state,
                                                typename DvRing::State& dv_state) {
    const KeyTiles& tiles = shared.key_tiles[keys.stage];
    Sum dk;
    Square scores;
    warp::zero(dk);
    shared.keys.wait(keys);
    multiply_keys(scores, tiles.k_smem, tiles.q_smem, params.scale);
    int head = place.first_head;
    do {
      PerRow<16> given, kept, to_state;  // sums over slices
      warp::zero(given);
      warp::zero(kept);
      warp::zero(to_state);
      for (int slice = 0; slice < place.slices; ++slice, state.advance()) {
        const Step& step = shared.steps[state.stage];
        const auto k_smem = warpgroup::afresh(tiles.k_smem);
        shared.ring.wait(state);
        Operand v;
        warpgroup::load(v, step.v_smem);
        Square dp, from_state;
        warpgroup::mm_ABt(dp, v, step.dout_smem);
        warpgroup::mma_commit();
        PerRow<16> after, weights;
        step.gates.after(after);
        step.gates.load_weights(weights);
        if (!place.is_second) shared.stepped[state.stage].wait(state.phase);
        warpgroup::mm_ABt(from_state, k_smem, step.dstate_smem);
        warpgroup::mma_commit();
        warpgroup::mma_wait<1>(dp, v);
        Operand p;
        step.gates.fold_transposed(p, given, kept, dp, scores);
        warpgroup::mma_wait<0>(from_state);
        fold_dot(to_state, v, from_state, after);
        Square& du = dp;  // whose registers are free
        warp::mul_rows(du, from_state, after);
        warpgroup::mma_AB(du, p, step.dout_smem);
        warpgroup::mma_commit();
        warp::mul(after, after, weights);
        warp::mul_rows(v, v, after);
        warpgroup::mma_AB(dk, v, step.dstate_smem.template cols<kColumns>(place.part));
        warpgroup::mma_commit();
        warpgroup::mma_wait<1>(du, p);
        Square& products = from_state;
        if constexpr (kHasSkip) {
          warpgroup::mm_AtB(products, step.dout_smem, step.v_smem);
          warpgroup::mma_commit();
        }
        warp::mul_rows(du, du, weights);
        if (place.leads()) {
          hand_over_dv(shared, dv_state, step, du);
          if (slice + 1 == place.slices) {
            store_key_sums(params, place.index(params, head), given, kept, to_state, weights);
          }
        }
        warpgroup::mma_wait<0>(dk, v, products);
        if constexpr (kHasSkip) {
          if (place.leads()) store_dskip(params, products, place, head, slice);
        }
        shared.ring.release(state);
      }
    } while (++head < place.first_head + place.heads);

    warp::sync();
    if (warp::leader()) shared.k_read[keys.stage].arrive();
    shared.m_full[keys.stage].wait(keys.phase);
    warpgroup::mma_AtB(dk, tiles.m_smem(), tiles.q_smem.template cols<kColumns>(place.part));
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(dk);
    hand_over<kDkAfresh>(shared.dk_full[keys.stage], tiles.dk_smem(), dk);
  }

  // scale a b^T, which all heads have in common.
  __device__ __forceinline__ static void multiply_keys(Square& scores, const KeyTile& a,
                                                       const KeyTile& b, float scale) {
    warpgroup::mm_ABt(scores, a, b);
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(scores);
    warp::mul(scores, scores, scale);
  }
  // A sum of columns to who stores it, in the place of what this warpgroup was the last to read.
  template <bool kAfresh, typename Columns>
  __device__ __forceinline__ static void hand_over(Barrier& full, const Columns& smem,
                                                   const Sum& sum) {
    warpgroup::sync();
    store_sum<kAfresh>(smem, sum);
    warp::sync();
    if (warp::leader()) full.arrive();
  }

  template <bool kAfresh, typename Smem, typename Tile>
  __device__ __forceinline__ static void store_sum(const Smem& smem, const Tile& tile) {
    if constexpr (kAfresh) {
      warpgroup::store_afresh(warpgroup::afresh(smem), tile);
    } else {
      warpgroup::store(warpgroup::afresh(smem), tile);
    }
  }

  // The pair has its S at its start and its dS at its end: the second chunk's S and the first's dS
  // take the place of those, some columns at a time. And through += total rowsum(S * dS).
  __device__ __forceinline__ static void step_state(const GradientsParams& params,
                                                    const KeyTiles& tiles, const Step& step,
                                                    const Place& place, PerRow<16>& through) {
    Operand values;  // a row for each column of v or dout
    warpgroup::load_transposed(values, step.other_smem);
    if constexpr (Copies::kFactorsAhead) {
      warp::map_cols(values, values, step.factors, [](float x, float y) { return x * y; });
    } else if (place.is_second) {
      step.other_gates.scale_cols_after(values);
    } else {
      step.other_gates.scale_cols_before(values, params.scale);
    }
    const float left = place.has_other ? step.other_gates.total() : 1.0f;
    const auto state_smem = warpgroup::afresh(place.is_second ? step.state_smem : step.dstate_smem);
    const auto fixed_smem = warpgroup::afresh(place.is_second ? step.dstate_smem : step.state_smem);
    const auto keys_smem = warpgroup::afresh(tiles.other_smem);
    PerRow<16> dot, total;
    warp::zero(dot);
    warp::fill(total, step.gates.total());
    // A piece's numbers are loaded beside the product of the piece before: without documents, with
    // which that was no quicker.
    constexpr bool kLoadsAhead = Copies::kFactorsAhead;
    Operand next;
    if constexpr (kLoadsAhead) warpgroup::load(next, state_smem.template cols<64>(0));
#pragma unroll 1  // one piece at a time: both are many registers
    for (int i = 0; i < kKeyDim / 64; ++i) {
      Square piece;
      if constexpr (kLoadsAhead) {
        warp::mul(piece, next, left);
      } else {
        warpgroup::load(piece, state_smem.template cols<64>(i));
        warp::mul(piece, piece, left);
      }
      warpgroup::mma_AB(piece, values, keys_smem.template cols<64>(i));
      warpgroup::mma_commit();
      if (kLoadsAhead && i + 1 < kKeyDim / 64) {
        warpgroup::load(next, state_smem.template cols<64>(i + 1));
      }
      Operand fixed;
      warpgroup::load(fixed, fixed_smem.template cols<64>(i));
      warpgroup::mma_wait<0>(piece, values);
      warp::fold_row_dot(dot, piece, fixed);
      warpgroup::store(state_smem.template cols<64>(i), piece);
    }
    warp::mul(dot, dot, total);
    warp::add(through, through, dot);
    publish_shared();
    warpgroup::sync();
  }

  // A chunk's 64 numbers of [B, H, padded].
  __device__ __forceinline__ static GlobalVec<float> chunk_of(float* array, int index) {
    return {array + index * kChunk, kChunk};
  }

  // What tokens have as keys, of sums that were not weighted yet.
  __device__ __forceinline__ static void store_key_sums(const GradientsParams& params, int index,
                                                        PerRow<16>& given, PerRow<16>& kept,
                                                        PerRow<16>& to_state,
                                                        const PerRow<16>& weights) {
    if constexpr ((kFeatures & kWeights) != 0) {
      warp::add(kept, kept, given);
      warp::add(kept, kept, to_state);
      warpgroup::store_row_sums(chunk_of(params.dweights, index), kept);
    }
    warp::mul(given, given, weights);
    warp::mul(to_state, to_state, weights);
    warpgroup::store_row_sums(chunk_of(params.as_key, index), given,
                              chunk_of(params.to_state, index), to_state);
  }

  // w du becomes dv, which leaves.
  __device__ __forceinline__ static void hand_over_dv(Shared& shared, typename DvRing::State& state,
                                                      const Step& step, Square& du) {
    if constexpr (kHasSkip) {
      Operand dout;
      warpgroup::load(dout, step.dout_smem);
      warp::zip_cols(du, du, dout, step.skip, [](float x, float y, float d) { return x + y * d; });
    }
    shared.dv_ring.acquire(state);
    store_sum<kDvAfresh>(shared.dv_smem, du);
    shared.dv_ring.hand_over(state);
    state.advance();
  }
  // This chunk's part of the gradient of skip, from all products of a column of dout and one of v.
  __device__ __forceinline__ static void store_dskip(const GradientsParams& params,
                                                     const Square& products, const Place& place,
                                                     int head, int slice) {
    PerRow<16> sums;
    warpgroup::diagonal(sums, products);
    const int first = (place.index(params, head) * place.slices + slice) * kSlice;
    warpgroup::store(GlobalVec<float>{params.dskip + first, kSlice}, sums, 0);
  }

  // sums += rowsum(a * b) * factors
  template <typename A, typename B>
  __device__ __forceinline__ static void fold_dot(PerRow<16>& sums, const A& a, const B& b,
                                                  const PerRow<16>& factors) {
    PerRow<16> dot;
    warp::zero(dot);
    warp::fold_row_dot(dot, a, b);
    warp::mul(dot, dot, factors);
    warp::add(sums, sums, dot);
  }
};

template <typename Traits>
__device__ __forceinline__ void gradients(const GradientsParams& params) {
  block::run<Gradients<Traits>>(params);
}

}  // namespace tk::linear_attention
