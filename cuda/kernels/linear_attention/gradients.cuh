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
// makes the state that is not in memory, for both. Consumer 1 has them as keys: dk, dv. dq leaves
// through the tile of k, dk through that of q; storing warps see to that, and only then are a
// place's keys free for others. Budget at K = 128, 2 stages of both: 220 KB of shared memory; a
// thread has 64 registers of dq or dk, 32 of scores, 32 of m, 64 of two products. Limit: memory,
// the states of each chunk most of all, and close behind it the bandwidth of shared memory.
#pragma once

#include "kernels/linear_attention/gates.cuh"
#include "tk/tk.cuh"

namespace tk::linear_attention {

template <typename T_, int kKeyDim_, unsigned kFeatures_, int kStages_, int kKeyStages_>
struct GradientsTraits {
  using T = T_;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr unsigned kFeatures = kFeatures_;
  static constexpr int kStages = kStages_;
  static constexpr int kKeyStages = kKeyStages_;
};

template <typename Traits>
struct Gradients {
  using T = typename Traits::T;
  static constexpr int kKeyDim = Traits::kKeyDim;
  static constexpr unsigned kFeatures = Traits::kFeatures;
  static constexpr int kConsumers = 2;
  static constexpr int kStorers = 3;  // of dv, dq and dk
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kColumns = gradients_columns(kKeyDim), kParts = gradients_parts(kKeyDim);

  using KeyTile = SharedTile<T, kChunk, kKeyDim>;
  using ValueTile = SharedTile<T, kChunk, kSlice>;
  using StateTile = SharedTile<T, kSlice, kKeyDim>;
  using Gates = ChunkGates<kFeatures>;
  using Keys = Pipeline<Traits::kKeyStages>;
  using Ring = Pipeline<Traits::kStages>;
  using DvRing = StorePipeline<1>;
  using Square = RegTile<float, 16, 64>;
  using Operand = RegTile<T, 16, 64>;
  using Sum = RegTile<float, 16, kColumns>;

  struct Step {
    ValueTile v_smem, dout_smem;
    StateTile state_smem, dstate_smem;
    ValueTile
        other_smem;  // of the pair's other chunk: v where it is before, dout where it is after
    Gates gates, other_gates;
    SharedVec<float, kSlice> skip;  // with kSkip
  };
  struct KeyTiles {
    KeyTile q_smem, k_smem;
    KeyTile other_smem;  // of the pair's other chunk: k where it is before, q where it is after

    // On its way from one consumer to the other, when nobody needs the other chunk's keys any more.
    __device__ __forceinline__ auto m_smem() const { return other_smem.template cols<64>(0); }
    // On their way out, when nobody needs what is there: k, and q.
    __device__ __forceinline__ auto dq_smem() const { return k_smem.template cols<kColumns>(0); }
    __device__ __forceinline__ auto dk_smem() const { return q_smem.template cols<kColumns>(0); }
  };
  struct Shared {
    KeyTiles key_tiles[Traits::kKeyStages];
    Step steps[Traits::kStages];
    ValueTile dv_smem;
    Keys keys;
    Ring ring;
    DvRing dv_ring;
    Barrier stepped[Traits::kStages];    // both states of a stage are this chunk's
    Barrier m_full[Traits::kKeyStages];  // and q has been read by consumer 0
    Barrier k_read[Traits::kKeyStages];  // by consumer 1
    Barrier dq_full[Traits::kKeyStages], dk_full[Traits::kKeyStages];
  };
  static_assert(sizeof(Shared) + 1024 <=
                    gradients_shared_bytes(kKeyDim, Traits::kStages, Traits::kKeyStages),
                "linear_attention.h's gradients_shared_bytes covers the kernel's shared memory");
  static constexpr int kStepBytes =
      3 * ValueTile::kBytes + 2 * StateTile::kBytes + 2 * Gates::kBytes +
      ((kFeatures & kSkip) != 0 ? SharedVec<float, kSlice>::kBytes : 0);

  // A part of a group's chunk, and its steps: slices of heads, one head after another.
  struct Place {
    int chunk, group, part, batch;
    int first_head, heads, slices;
    bool is_second, has_other;  // of its pair
    int other;

    // Parts, then chunks are next to each other, which read much that is the same.
    __device__ __forceinline__ Place(const GradientsParams& params, int index) {
      part = index % kParts;
      index /= kParts;
      chunk = index % params.chunks;
      index /= params.chunks;
      group = index % params.num_groups;
      batch = index / params.num_groups;
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
    // Which of all heads' chunks, [B, H, chunks], a head's is.
    __device__ __forceinline__ int64 index(const GradientsParams& params, int head) const {
      return static_cast<int64>(row(params, head)) * params.chunks + chunk;
    }
    // Of parts, the first does what all would do alike.
    __device__ __forceinline__ bool leads() const { return kParts == 1 || part == 0; }
  };

  __device__ __forceinline__ static void init(const GradientsParams&, Shared& shared) {
    shared.keys.init(2);  // those who store dq and dk
    shared.ring.init(4 * kConsumers);
    shared.dv_ring.init(4);
#pragma unroll
    for (int i = 0; i < Traits::kStages; ++i) shared.stepped[i].init(1);
#pragma unroll
    for (int i = 0; i < Traits::kKeyStages; ++i) {
      shared.m_full[i].init(1);
      shared.k_read[i].init(4);
      shared.dq_full[i].init(4);
      shared.dk_full[i].init(4);
    }
  }

  // Calls f with each place of the block, and where it stands among keys.
  template <typename F>
  __device__ __forceinline__ static void walk(const GradientsParams& params, F&& f) {
    typename Keys::State keys;
    for (int index = grid::block_x(); index < params.places; index += grid::blocks_x()) {
      f(Place(params, index), keys);
      keys.advance();
    }
  }

  __device__ __forceinline__ static void load(const GradientsParams& params, Shared& shared) {
    typename Ring::State state;
    walk(params, [&](const Place& place, const typename Keys::State& keys) {
      const int steps = place.heads * place.slices;
      const int keys_turn = steps_before_keys(steps);
      int head = place.first_head, slice = 0;
      for (int step = 0;; ++step, state.advance()) {
        if (step == keys_turn) load_keys(params, shared, place, keys);
        if (step == steps) break;
        load_step(params, shared, place, state, head, slice);
        if (++slice == place.slices) ++head, slice = 0;
      }
    });
  }

  // Of a place's steps, those that there is room for before there is any for its keys.
  __device__ __forceinline__ static int steps_before_keys(int steps) {
    if (Traits::kKeyStages == 1) return min(Traits::kStages, steps);
    return steps > 1 ? 0 : 1;
  }

  // Of a chunk that has no other, tokens beyond the last one take its place, which are zeros.
  __device__ __forceinline__ static void load_keys(const GradientsParams& params, Shared& shared,
                                                   const Place& place,
                                                   const typename Keys::State& keys) {
    shared.keys.acquire(keys, 3 * KeyTile::kBytes);
    Barrier& full = shared.keys.full(keys);
    KeyTiles& tiles = shared.key_tiles[keys.stage];
    const int token = place.chunk * kChunk;
    tma::load(tiles.q_smem, params.q, full, tma::Keep::kNormal, 0, token, place.group, place.batch);
    tma::load(tiles.k_smem, params.k, full, tma::Keep::kNormal, 0, token, place.group, place.batch);
    tma::load(tiles.other_smem, place.is_second ? params.k : params.q, full, tma::Keep::kNormal, 0,
              place.other * kChunk, place.group, place.batch);
  }

  __device__ __forceinline__ static void load_step(const GradientsParams& params, Shared& shared,
                                                   const Place& place,
                                                   const typename Ring::State& state, int head,
                                                   int slice) {
    shared.ring.acquire(state, kStepBytes);
    Barrier& full = shared.ring.full(state);
    Step& step = shared.steps[state.stage];
    const int row = place.row(params, head), column = slice * kSlice;
    const int token = place.chunk * kChunk;
    tma::load(step.v_smem, params.v, full, tma::Keep::kNormal, column, token, head, place.batch);
    tma::load(step.dout_smem, params.dout, full, tma::Keep::kNormal, column, token, head,
              place.batch);
    const int pairs = ceil_div(params.chunks, kPair);
    const int state_row = ((row * pairs + place.chunk / kPair) * place.slices + slice) * kSlice;
    tma::load(step.state_smem, params.states, full, tma::Keep::kNormal, 0, state_row);
    tma::load(step.dstate_smem, params.dstates, full, tma::Keep::kNormal, 0, state_row);
    step.gates.load(params.gates, full, row, place.batch, place.chunk, params.chunks);
    tma::load(step.other_smem, place.is_second ? params.v : params.dout, full, tma::Keep::kNormal,
              column, place.other * kChunk, head, place.batch);
    step.other_gates.load(params.gates, full, row, place.batch,
                          place.has_other ? place.other : place.chunk, params.chunks);
    if constexpr ((kFeatures & kSkip) != 0) {
      tma::load(step.skip, params.skip + (head * place.slices + slice) * kSlice, full);
    }
  }

  __device__ __forceinline__ static void store(const GradientsParams& params, Shared& shared,
                                               int storer) {
    typename DvRing::State state;
    walk(params, [&](const Place& place, const typename Keys::State& keys) {
      if (storer == 0) {
        if (place.leads()) store_dv(params, shared, place, state);
      } else if (storer == 1) {
        store_columns(params.dq, shared, shared.dq_full[keys.stage],
                      shared.key_tiles[keys.stage].dq_smem(), place, keys);
      } else {
        store_columns(params.dk, shared, shared.dk_full[keys.stage],
                      shared.key_tiles[keys.stage].dk_smem(), place, keys);
      }
    });
  }

  __device__ __forceinline__ static void store_dv(const GradientsParams& params, Shared& shared,
                                                  const Place& place,
                                                  typename DvRing::State& state) {
    for (int head = place.first_head; head < place.first_head + place.heads; ++head) {
      for (int slice = 0; slice < place.slices; ++slice, state.advance()) {
        shared.dv_ring.wait(state);
        tma::store(params.dv, shared.dv_smem, slice * kSlice, place.chunk * kChunk, head,
                   place.batch);
        tma::commit();
        tma::wait_read<0>();
        shared.dv_ring.release(state);
      }
    }
  }
  // dq or dk, in whose place the keys of another place may come then.
  template <typename Columns>
  __device__ __forceinline__ static void store_columns(const TensorMap& map, Shared& shared,
                                                       const Barrier& full, const Columns& smem,
                                                       const Place& place,
                                                       const typename Keys::State& keys) {
    full.wait(keys.phase);
    publish_shared();
    tma::store(map, smem, place.part * kColumns, place.chunk * kChunk, place.group, place.batch);
    tma::commit();
    tma::wait_read<0>();
    shared.keys.release_by_thread(keys);
  }

  __device__ __forceinline__ static void compute(const GradientsParams& params, Shared& shared,
                                                 int consumer) {
    typename Ring::State state;
    if (consumer == 0) {
      walk(params, [&](const Place& place, const typename Keys::State& keys) {
        sum_dq(params, shared, place, keys, state);
      });
    } else {
      typename DvRing::State dv_state;
      walk(params, [&](const Place& place, const typename Keys::State& keys) {
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
        step_state(params, tiles, step, place, through);
        if (warpgroup::leader()) shared.stepped[state.stage].arrive();

        Square from_state, dp;
        warpgroup::mm_ABt(from_state, q_smem, step.state_smem);
        warpgroup::mma_commit();
        warpgroup::mm_ABt(dp, step.dout_smem, step.v_smem);
        warpgroup::mma_commit();
        PerRow<16> before;
        step.gates.before(before);
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
        const int64 index = place.index(params, head);
        store_sums(params.as_query, index, as_query);
        store_sums(params.through, index, through);
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
    hand_over(shared.dq_full[keys.stage], tiles.dq_smem(), dq);
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
      PerRow<16> given, kept, to_state, weights;  // sums over slices
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
        if (!place.is_second) shared.stepped[state.stage].wait(state.phase);
        warpgroup::mm_ABt(from_state, k_smem, step.dstate_smem);
        warpgroup::mma_commit();
        warpgroup::mma_wait<1>(dp, v);
        Operand p;
        step.gates.fold_transposed(p, given, kept, dp, scores);
        PerRow<16> after;
        step.gates.after(after);
        warpgroup::mma_wait<0>(from_state);
        fold_dot(to_state, v, from_state, after);
        Square& du = dp;  // whose registers are free
        warp::mul_rows(du, from_state, after);
        warpgroup::mma_AB(du, p, step.dout_smem);
        warpgroup::mma_commit();
        step.gates.load_weights(weights);
        warp::mul(after, after, weights);
        warp::mul_rows(v, v, after);
        warpgroup::mma_AB(dk, v, step.dstate_smem.template cols<kColumns>(place.part));
        warpgroup::mma_commit();
        warpgroup::mma_wait<1>(du, p);
        Square& products = from_state;
        if constexpr ((kFeatures & kSkip) != 0) {
          warpgroup::mm_AtB(products, step.dout_smem, step.v_smem);
          warpgroup::mma_commit();
        }
        warp::mul_rows(du, du, weights);
        if (place.leads()) hand_over_dv(shared, dv_state, step, du);
        warpgroup::mma_wait<0>(dk, v, products);
        if constexpr ((kFeatures & kSkip) != 0) {
          if (place.leads()) store_dskip(params, products, place, head, slice);
        }
        shared.ring.release(state);
      }
      if (place.leads())
        store_key_sums(params, place.index(params, head), given, kept, to_state, weights);
    } while (++head < place.first_head + place.heads);

    warp::sync();
    if (warp::leader()) shared.k_read[keys.stage].arrive();
    shared.m_full[keys.stage].wait(keys.phase);
    warpgroup::mma_AtB(dk, tiles.m_smem(), tiles.q_smem.template cols<kColumns>(place.part));
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(dk);
    hand_over(shared.dk_full[keys.stage], tiles.dk_smem(), dk);
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
  template <typename Columns>
  __device__ __forceinline__ static void hand_over(Barrier& full, const Columns& smem,
                                                   const Sum& sum) {
    warpgroup::sync();
    warpgroup::store(smem, sum);
    warp::sync();
    if (warp::leader()) full.arrive();
  }

  // The pair has its S at its start and its dS at its end: the second chunk's S and the first's dS
  // take the place of those, some columns at a time. And through += total rowsum(S * dS).
  __device__ __forceinline__ static void step_state(const GradientsParams& params,
                                                    const KeyTiles& tiles, const Step& step,
                                                    const Place& place, PerRow<16>& through) {
    Operand values;  // a row for each column of v or dout
    warpgroup::load_transposed(values, step.other_smem);
    if (place.is_second) {
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
#pragma unroll 1  // one piece at a time: both are many registers
    for (int i = 0; i < kKeyDim / 64; ++i) {
      Square piece;
      warpgroup::load(piece, state_smem.template cols<64>(i));
      warp::mul(piece, piece, left);
      warpgroup::mma_AB(piece, values, keys_smem.template cols<64>(i));
      warpgroup::mma_commit();
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

  // A chunk's 64 numbers, of which lanes hold parts, to [B, H, padded].
  __device__ __forceinline__ static void store_sums(float* array, int64 index, PerRow<16>& sums) {
    warp::finish_row_sum(sums);
    warpgroup::store(GlobalVec<float>{array + index * kChunk, kChunk}, sums, 0);
  }

  // What tokens have as keys, of sums that were not weighted yet.
  __device__ __forceinline__ static void store_key_sums(const GradientsParams& params, int64 index,
                                                        PerRow<16>& given, PerRow<16>& kept,
                                                        PerRow<16>& to_state,
                                                        const PerRow<16>& weights) {
    if constexpr ((kFeatures & kWeights) != 0) {
      warp::add(kept, kept, given);
      warp::add(kept, kept, to_state);
      store_sums(params.dweights, index, kept);
    }
    warp::mul(given, given, weights);
    warp::mul(to_state, to_state, weights);
    store_sums(params.as_key, index, given);
    store_sums(params.to_state, index, to_state);
  }

  // w du becomes dv, which leaves.
  __device__ __forceinline__ static void hand_over_dv(Shared& shared, typename DvRing::State& state,
                                                      const Step& step, Square& du) {
    if constexpr ((kFeatures & kSkip) != 0) {
      Operand dout;
      warpgroup::load(dout, step.dout_smem);
      warp::zip_cols(du, du, dout, step.skip, [](float x, float y, float d) { return x + y * d; });
    }
    shared.dv_ring.acquire(state);
    warpgroup::store(warpgroup::afresh(shared.dv_smem), du);
    shared.dv_ring.hand_over(state);
    state.advance();
  }
  // This chunk's part of the gradient of skip, from all products of a column of dout and one of v.
  __device__ __forceinline__ static void store_dskip(const GradientsParams& params,
                                                     const Square& products, const Place& place,
                                                     int head, int slice) {
    PerRow<16> sums;
    warpgroup::diagonal(sums, products);
    const int64 first = (place.index(params, head) * place.slices + slice) * kSlice;
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
