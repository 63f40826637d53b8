// The gradients of a chunk, from the state before it and the state's gradient after it.
//
// Of every pair of chunks the first finds its S and the second its dS in memory; the other one
// comes from the chunk beside it, by a step of the recurrence. For the heads that share q and k,
// with gates D, before, after, total (gates.cuh), w the weights of tokens, S the state before the
// chunk and dS its gradient after it:
//   dp = dout v^T, m = dp * D w,  p = scale q k^T * D
//   dq = sum over heads of scale m k + diag(scale before) dout S
//   dk = sum over heads of scale m^T q + diag(w after) v dS
//   du = p^T dout + diag(after) k dS^T,  dv = w du + skip * dout,  dw = rowsum(v * du)
// and what the gradients of gates are made of (gate_gradients.cuh), with p without its diagonal,
// which no gate reaches:
//   as_query = rowsum(m * p + diag(scale before) dout * (q S^T)),  as_key = colsum(m * p)
//   to_state = rowsum(diag(w after) v * (k dS^T)),  through = total rowsum(S * dS)
// (Dao and Gu 2024, section 6, differentiated; sums over heads as in Mamba-2's own backward pass.)
// Grid: chunks, groups (times parts, which cut dq's and dk's columns), batch. Nothing is added in
// global memory.
// Roles: a producer warp loads q and k, then a ring of v, dout, S, dS and gates: a step for every
// slice of every head. Consumer 0 has the chunk's tokens as queries: dq; consumer 1 as keys: dk,
// dv. Budget at K = 128, 2 stages: 173 KB of shared memory; 64 registers of dq or dk, 32 each of
// scores, dp and a product with the state a thread. Limit: memory, the states of each chunk most of
// all.
#pragma once

#include "kernels/linear_attention/gates.cuh"
#include "tk/tk.cuh"

namespace tk::linear_attention {

template <typename T_, int kKeyDim_, unsigned kFeatures_, int kStages_>
struct GradientsTraits {
  using T = T_;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr unsigned kFeatures = kFeatures_;
  static constexpr int kStages = kStages_;
};

template <typename Traits>
struct Gradients {
  using T = typename Traits::T;
  static constexpr int kKeyDim = Traits::kKeyDim;
  static constexpr unsigned kFeatures = Traits::kFeatures;
  static constexpr int kConsumers = 2;
  static constexpr int kProducerRegisters = kKeyDim > 128 ? 40 : 24;
  static constexpr int kConsumerRegisters = kKeyDim > 128 ? 232 : 240;
  static constexpr int kColumns = gradients_columns(kKeyDim), kParts = gradients_parts(kKeyDim);

  using KeyTile = SharedTile<T, kChunk, kKeyDim>;
  using ValueTile = SharedTile<T, kChunk, kSlice>;
  using StateTile = SharedTile<T, kSlice, kKeyDim>;
  using ColumnsTile = SharedTile<T, kChunk, kColumns>;
  using Gates = ChunkGates<kFeatures>;
  using Ring = Pipeline<Traits::kStages>;
  using Square = RegTile<float, 16, 64>;
  using Operand = RegTile<T, 16, 64>;
  using Sum = RegTile<float, 16, kColumns>;
  using Part = RegTile<float, 16, 64>;  // of a state

  struct Step {
    ValueTile v_smem, dout_smem;
    StateTile state_smem, dstate_smem;
    ValueTile
        other_smem;  // of the pair's other chunk: v where it is before, dout where it is after
    Gates gates, other_gates;
    SharedVec<float, kSlice> skip;  // with kSkip
  };
  struct Shared {
    KeyTile q_smem, k_smem;
    KeyTile other_smem;  // of the pair's other chunk: k where it is before, q where it is after
    Step steps[Traits::kStages];
    ValueTile dv_smem;
    ColumnsTile dq_smem, dk_smem;
    Barrier keys_full;
    Ring ring;
  };
  static_assert(sizeof(Shared) + 1024 <= gradients_shared_bytes(kKeyDim, Traits::kStages),
                "linear_attention.h's gradients_shared_bytes covers the kernel's shared memory");
  static constexpr int kStepBytes =
      2 * ValueTile::kBytes + 2 * StateTile::kBytes + Gates::kBytes +
      ((kFeatures & kSkip) != 0 ? SharedVec<float, kSlice>::kBytes : 0);
  static constexpr int kOtherBytes = ValueTile::kBytes + Gates::kBytes;

  // What a block has, and its steps: slices of heads, one head after another.
  struct Place {
    int chunk, group, part, batch;
    int first_head, heads, slices;
    bool is_second, has_other;  // of its pair
    int other;

    __device__ __forceinline__ explicit Place(const GradientsParams& params) {
      chunk = grid::block_x();
      group = grid::block_y() / kParts;
      part = grid::block_y() % kParts;
      batch = grid::block_z();
      heads = params.group_heads;
      first_head = group * heads;
      slices = ceil_div(params.value_dim, kSlice);
      is_second = chunk % kPair == 1;
      other = is_second ? chunk - 1 : chunk + 1;
      has_other = other < params.chunks;
    }
    __device__ __forceinline__ int row(const GradientsParams& params, int head) const {
      return batch * params.num_heads + head;
    }
    // Where a head's 64 numbers of the chunk lie in [B, H, padded].
    __device__ __forceinline__ GlobalVec<float> tokens(const GradientsParams& params, float* array,
                                                       int head) const {
      const int64 first = (static_cast<int64>(row(params, head)) * params.chunks + chunk) * kChunk;
      return {array + first, kChunk};
    }
    // Whether a head is of the group, that before it being: a bound would take a register.
    __device__ __forceinline__ static bool has_next(const GradientsParams& params, int head) {
      return head % params.group_heads != 0;
    }
    // Of parts, the first does what all would do alike.
    __device__ __forceinline__ bool leads() const { return kParts == 1 || part == 0; }
  };

  __device__ __forceinline__ static void init(const GradientsParams&, Shared& shared) {
    shared.keys_full.init(1);
    shared.ring.init(4 * kConsumers);
  }

  __device__ __forceinline__ static void load(const GradientsParams& params, Shared& shared) {
    const Place place(params);
    const int token = place.chunk * kChunk, other_token = place.other * kChunk;
    const TensorMap& other_keys = place.is_second ? params.k : params.q;
    const TensorMap& other_values = place.is_second ? params.v : params.dout;
    shared.keys_full.expect((place.has_other ? 3 : 2) * KeyTile::kBytes);
    tma::load(shared.q_smem, params.q, shared.keys_full, tma::Keep::kNormal, 0, token, place.group,
              place.batch);
    tma::load(shared.k_smem, params.k, shared.keys_full, tma::Keep::kNormal, 0, token, place.group,
              place.batch);
    if (place.has_other) {
      tma::load(shared.other_smem, other_keys, shared.keys_full, tma::Keep::kNormal, 0, other_token,
                place.group, place.batch);
    }
    const int pairs = ceil_div(params.chunks, kPair);
    typename Ring::State state;
    for (int head = place.first_head; head < place.first_head + place.heads; ++head) {
      const int row = place.row(params, head);
      for (int slice = 0; slice < place.slices; ++slice, state.advance()) {
        shared.ring.acquire(state, kStepBytes + (place.has_other ? kOtherBytes : 0));
        Barrier& full = shared.ring.full(state);
        Step& step = shared.steps[state.stage];
        const int column = slice * kSlice;
        tma::load(step.v_smem, params.v, full, tma::Keep::kNormal, column, token, head,
                  place.batch);
        tma::load(step.dout_smem, params.dout, full, tma::Keep::kNormal, column, token, head,
                  place.batch);
        const int state_row = ((row * pairs + place.chunk / kPair) * place.slices + slice) * kSlice;
        tma::load(step.state_smem, params.states, full, tma::Keep::kNormal, 0, state_row);
        tma::load(step.dstate_smem, params.dstates, full, tma::Keep::kNormal, 0, state_row);
        step.gates.load(params.gates, full, row, place.batch, place.chunk, params.chunks);
        if (place.has_other) {
          tma::load(step.other_smem, other_values, full, tma::Keep::kNormal, column, other_token,
                    head, place.batch);
          step.other_gates.load(params.gates, full, row, place.batch, place.other, params.chunks);
        }
        if constexpr ((kFeatures & kSkip) != 0) {
          tma::load(step.skip, params.skip + (head * place.slices + slice) * kSlice, full);
        }
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
    const Place place(params);
    Square dp, other;  // other: a product with the state, then scores
    Sum dq;
    warp::zero(dq);
    shared.keys_full.wait(0);
    typename Ring::State state;
    int head = place.first_head;
    do {
      PerRow<16> as_query, through;
      warp::zero(as_query);
      warp::zero(through);
      for (int slice = 0; slice < place.slices; ++slice, state.advance()) {
        const Step& step = shared.steps[state.stage];
        const Gates& gates = step.gates;
        const auto q_smem = warpgroup::afresh(shared.q_smem);
        const auto k_smem = warpgroup::afresh(shared.k_smem);
        shared.ring.wait(state);
        if (place.is_second) {
          step_parts(step.state_smem, shared.other_smem, [&](Part& state, const auto& k_smem) {
            step_on(state, step.other_gates, k_smem, step.other_smem);
          });
        }
        warpgroup::mma_ABt(dp, step.dout_smem, step.v_smem, slice > 0);
        warpgroup::mma_commit();
        warpgroup::mm_ABt(other, q_smem, step.state_smem);
        warpgroup::mma_commit();
        PerRow<16> before;
        gates.before(before);
        warp::mul(before, before, params.scale);
        Operand left;
        warpgroup::load(left, step.dout_smem);
        warp::mul_rows(left, left, before);
        warpgroup::mma_AB(dq, left, step.state_smem.template cols<kColumns>(place.part));
        warpgroup::mma_commit();
        warpgroup::mma_wait<0>(dp, other, dq, left);
        if (place.leads()) {
          Operand dout;
          warpgroup::load(dout, step.dout_smem);
          fold_dot(as_query, dout, other, before);
          if (place.is_second) fold_through(through, step);
        }
        if (slice + 1 == place.slices) {
          warpgroup::mm_ABt(other, q_smem, k_smem);
          warpgroup::mma_commit();
          warp::mul(through, through, gates.total());
          warp::mul(dp, dp, params.scale);
          Operand m;
          gates.apply(m, dp);
          warpgroup::mma_wait<0>(other);
          fold_off_diagonal<true>(as_query, m, other);
          warpgroup::mma_AB(dq, m, k_smem.template cols<kColumns>(place.part));
          warpgroup::mma_commit();
          warpgroup::mma_wait<0>(dq, m);
        }
        shared.ring.release(state);
      }
      if (place.leads()) {
        warp::finish_row_sum(as_query);
        warpgroup::store(place.tokens(params, params.as_query, head), as_query, 0);
        if (place.is_second) store_through(params, place, through, head);
      }
    } while (place.has_next(params, ++head));
    store_columns(params.dq, shared.dq_smem, dq, place);
  }

  // Tokens as keys: rows are those that are seen, columns those that look.
  __device__ __forceinline__ static void sum_dk(const GradientsParams& params, Shared& shared) {
    const Place place(params);
    Square dp;
    Sum dk;
    warp::zero(dk);
    shared.keys_full.wait(0);
    typename Ring::State state;
    int head = place.first_head;
    do {
      PerRow<16> as_key, to_state, dweights, through;
      warp::zero(through);
      warp::zero(as_key);
      warp::zero(to_state);
      warp::zero(dweights);
      for (int slice = 0; slice < place.slices; ++slice, state.advance()) {
        const Step& step = shared.steps[state.stage];
        const Gates& gates = step.gates;
        const auto q_smem = warpgroup::afresh(shared.q_smem);
        const auto k_smem = warpgroup::afresh(shared.k_smem);
        shared.ring.wait(state);
        if (!place.is_second && place.has_other) {
          step_parts(step.dstate_smem, shared.other_smem, [&](Part& dstate, const auto& q_smem) {
            step_back(dstate, step.other_gates, q_smem, step.other_smem, params.scale);
          });
        }
        Operand p;
        {
          Square scores;
          warpgroup::mm_ABt(scores, k_smem, q_smem);
          warpgroup::mma_commit();
          warpgroup::mma_wait<0>(scores);
          warp::mul(scores, scores, params.scale);
          gates.apply_transposed(p, scores);
        }
        Square du;
        warpgroup::mm_ABt(du, k_smem, step.dstate_smem);
        warpgroup::mma_commit();
        warpgroup::mma_ABt(dp, step.v_smem, step.dout_smem, slice > 0);
        warpgroup::mma_commit();
        PerRow<16> left_after;
        gates.after(left_after);
        gates.weigh(left_after);
        warpgroup::mma_wait<1>(du);
        Operand left;
        warpgroup::load(left, step.v_smem);
        fold_dot(to_state, left, du, left_after);
        warp::mul_rows(left, left, left_after);
        gates.after(left_after);
        warp::mul_rows(du, du, left_after);
        warpgroup::mma_AB(du, p, step.dout_smem);
        warpgroup::mma_commit();
        warpgroup::mma_AB(dk, left, step.dstate_smem.template cols<kColumns>(place.part));
        warpgroup::mma_commit();
        warpgroup::mma_wait<0>(dp, du, p, dk, left);
        if (place.leads()) {
          finish_values(params, shared, step, dweights, du, place, head, slice);
          if (!place.is_second) fold_through(through, step);
        }
        if (slice + 1 == place.slices) {
          warp::mul(through, through, gates.total());
          Square scores;
          warpgroup::mm_ABt(scores, k_smem, q_smem);
          warpgroup::mma_commit();
          gates.weigh_rows(dp);
          warp::mul(dp, dp, params.scale);
          Operand m;
          gates.apply_transposed(m, dp);
          warpgroup::mma_wait<0>(scores);
          fold_off_diagonal<false>(as_key, m, scores);
          warpgroup::mma_AB(dk, m, q_smem.template cols<kColumns>(place.part));
          warpgroup::mma_commit();
          warpgroup::mma_wait<0>(dk, m);
        }
        shared.ring.release(state);
      }
      if (place.leads()) {
        warp::finish_row_sum(as_key);
        warp::finish_row_sum(to_state);
        warpgroup::store(place.tokens(params, params.as_key, head), as_key, 0);
        warpgroup::store(place.tokens(params, params.to_state, head), to_state, 0);
        if (!place.is_second) store_through(params, place, through, head);
        if constexpr ((kFeatures & kWeights) != 0) {
          warp::finish_row_sum(dweights);
          warpgroup::store(place.tokens(params, params.dweights, head), dweights, 0);
        }
      }
    } while (place.has_next(params, ++head));
    store_columns(params.dk, shared.dk_smem, dk, place);
  }

  // du becomes dv, which leaves; and dw, and this chunk's part of the gradient of skip.
  __device__ __forceinline__ static void finish_values(const GradientsParams& params,
                                                       Shared& shared, const Step& step,
                                                       PerRow<16>& dweights, Square& du,
                                                       const Place& place, int head, int slice) {
    if constexpr ((kFeatures & kWeights) != 0) {
      Operand v;
      warpgroup::load(v, step.v_smem);
      warp::fold_row_dot(dweights, v, du);
      step.gates.weigh_rows(du);
    }
    if constexpr ((kFeatures & kSkip) != 0) {
      Operand dout;
      warpgroup::load(dout, step.dout_smem);
      warp::zip_cols(du, du, dout, step.skip, [](float x, float y, float d) { return x + y * d; });
    }
    if (warpgroup::leader()) tma::wait_read<0>();  // the last slice has left
    warpgroup::sync();
    warpgroup::store(shared.dv_smem, du);
    publish_shared();
    warpgroup::sync();
    if (warpgroup::leader()) {
      tma::store(params.dv, shared.dv_smem, slice * kSlice, place.chunk * kChunk, head,
                 place.batch);
      tma::commit();
    }
    if constexpr ((kFeatures & kSkip) != 0) store_dskip(params, step, place, head, slice);
  }

  // The sum over the chunk's tokens of dout * v, a row for each column of both.
  __device__ __forceinline__ static void store_dskip(const GradientsParams& params,
                                                     const Step& step, const Place& place, int head,
                                                     int slice) {
    Operand v, dout;
    warpgroup::load_transposed(v, step.v_smem);
    warpgroup::load_transposed(dout, step.dout_smem);
    PerRow<16> sums;
    warp::zero(sums);
    warp::fold_row_dot(sums, v, dout);
    warp::finish_row_sum(sums);
    const int64 chunk = static_cast<int64>(place.row(params, head)) * params.chunks + place.chunk;
    warpgroup::store(
        GlobalVec<float>{params.dskip + (chunk * place.slices + slice) * kSlice, kSlice}, sums, 0);
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
  template <bool kLower>
  __device__ __forceinline__ static void fold_off_diagonal(PerRow<16>& sums, const Operand& a,
                                                           const Square& b) {
    Square product;
    warp::mul(product, a, b);
    if constexpr (kLower) {
      warpgroup::keep_lower(product, -1, 0.0f);
    } else {
      warpgroup::keep_upper(product, 1, 0.0f);
    }
    warp::fold_row_sum(sums, product);
  }
  // A state that is stepped takes the place of the one that was loaded; some columns at a time.
  template <typename F>
  __device__ __forceinline__ static void step_parts(const StateTile& state_smem,
                                                    const KeyTile& other_smem, F&& step) {
    const auto smem = warpgroup::afresh(state_smem);
    const auto keys_smem = warpgroup::afresh(other_smem);
#pragma unroll 1  // as in fold_through
    for (int i = 0; i < kKeyDim / Part::kCols; ++i) {
      Part part;
      warpgroup::load(part, smem.template cols<Part::kCols>(i));
      step(part, keys_smem.template cols<Part::kCols>(i));
      warpgroup::store(smem.template cols<Part::kCols>(i), part);
    }
    publish_shared();
    warpgroup::sync();
  }

  // sums += rowsum(S * dS), a row for each column of the slice: by the consumer that has both, as
  // the other one's stays as it was loaded.
  __device__ __forceinline__ static void fold_through(PerRow<16>& sums, const Step& step) {
#pragma unroll 1  // one piece at a time: both are many registers
    for (int piece = 0; piece < kKeyDim / 64; ++piece) {
      Operand state, dstate;
      warpgroup::load(state, step.state_smem.template cols<64>(piece));
      warpgroup::load(dstate, step.dstate_smem.template cols<64>(piece));
      warp::fold_row_dot(sums, state, dstate);
    }
  }

  __device__ __forceinline__ static void store_through(const GradientsParams& params,
                                                       const Place& place, PerRow<16>& through,
                                                       int head) {
    warp::finish_row_sum(through);
    warpgroup::store(place.tokens(params, params.through, head), through, 0);
  }

  __device__ __forceinline__ static void store_columns(const TensorMap& map,
                                                       const ColumnsTile& smem, const Sum& sum,
                                                       const Place& place) {
    warpgroup::store(smem, sum);
    publish_shared();
    warpgroup::sync();
    if (warpgroup::leader()) {
      tma::store(map, smem, place.part * kColumns, place.chunk * kChunk, place.group, place.batch);
      tma::commit();
      tma::wait_read<0>();
    }
  }
};

template <typename Traits>
__device__ __forceinline__ void gradients(const GradientsParams& params) {
  block::run<Gradients<Traits>>(params);
}

}  // namespace tk::linear_attention
