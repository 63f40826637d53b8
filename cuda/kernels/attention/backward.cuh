// dq, dk and dv of attention, the scores recomputed from q, k and lse.
//
//   p = exp(scale q k^T - lse)    dv = p^T dout    ds = p o (dout v^T - delta)
//   dk = scale ds^T q             dq = scale ds k
//
// FlashAttention-2 (Dao 2023, algorithm 2) with scores transposed, keys as rows, as in
// FlashAttention-3's code: p^T and ds^T then leave the accumulators as the register operands of dv
// and dk, and only ds passes through shared memory, for dq.
// Grid: a tile is kBlockKv keys of one key/value head; it walks the queries of every head of its
// group, so dk and dv need no sum across blocks. dq does: fragments in fp32 are added in global
// memory, in turns where kDeterministic. In turns.cuh's waves, blocks take tiles one by one.
// Roles: warp 0 of the producer deals tiles out and loads k, v and two rings (q with lse, dout with
// delta); the next one or two warps take out dq fragments, and dv and dk at a tile's end, through
// the same memory, so that the next tile's keys arrive meanwhile. Consumer warpgroups own 64 keys
// each, and a part of each dq. A step issues s and dp, exponentiates s beside dp, and issues dv, dq
// and dk; dq leaves beside dk. Budget at D = 128, 64 x 128, 2 stages: 227 KB of shared memory, all
// there is; of 232 registers a thread, 128 hold dk and dv, 32 each s and dp (then dq), and 16 lse.
// Limit: shared-memory bandwidth, 1.15 times the tensor cores' time (m64n64 products read 128 bytes
// a clock), and the chip's power.
#pragma once

#include "kernels/attention/attention.h"
#include "kernels/attention/backward_walk.cuh"
#include "kernels/attention/mask.cuh"
#include "kernels/attention/query_steps.cuh"
#include "kernels/attention/scores.cuh"
#include "kernels/attention/turns.cuh"
#include "tk/tk.cuh"

namespace tk::attention {

template <typename T_, int kHeadDim_, Mask kMask_, unsigned kFeatures_, bool kDeterministic_,
          int kBlockQ_, int kBlockKv_, int kStages_>
struct BackwardTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr Mask kMask = kMask_;
  static constexpr unsigned kFeatures = kFeatures_;
  static constexpr bool kDeterministic = kDeterministic_;
  static constexpr int kBlockQ = kBlockQ_;
  static constexpr int kBlockKv = kBlockKv_;
  static constexpr int kStages = kStages_;
  static constexpr int kConsumers = kBlockKv / 64;
  static constexpr int kDqCols = kHeadDim / 64;  // dq of a step is this many 64 x 64 parts wide
  static_assert(kBlockQ % 64 == 0 && kBlockKv % 64 == 0 && kHeadDim % 64 == 0,
                "tiles are cut into 64 x 64 parts");
  static_assert(kBlockQ / 64 * kDqCols == kConsumers, "each consumer computes one part of dq");
};

template <typename Traits>
struct Backward {
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kBlockQ = Traits::kBlockQ, kBlockKv = Traits::kBlockKv;
  static constexpr unsigned kFeatures = Traits::kFeatures;
  static constexpr int kConsumers = Traits::kConsumers;
  using Map = ScoreMap<T, kFeatures>;
  // Whether registers are left for lse from before the scores' product on.
  static constexpr bool kEarlyLse = kBlockQ == 64 && !Map::kCaps && !Map::kAdds &&
                                    (kHeadDim == 64 || (kFeatures & kMaskArray) == 0);
  // Whether delta then takes lse's registers before dp is waited for: without a mask, it gained
  // nothing.
  static constexpr bool kEarlyDelta = kEarlyLse && Traits::kMask != Mask::kNone;
  // Whether dp's product waits until there are registers: a bias beside a cap, segments or a mask,
  // or of fp32.
  static constexpr bool kLateDp =
      Map::kAdds && kHeadDim == 128 &&
      (Map::kCaps || (kFeatures & (kFloatBias | kSegments | kMaskArray)) != 0);
  static constexpr int kResidentBlocks = backward_resident_blocks(kHeadDim, kBlockKv);
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = kResidentBlocks == 2 ? 216 : 232;
  static_assert(kConsumers <= 2, "three consumers would leave each too few registers");

  using QTile = SharedTile<T, kBlockQ, kHeadDim>;
  using KvTile = SharedTile<T, kBlockKv, kHeadDim>;
  using DsTile = SharedTile<T, kBlockKv, kBlockQ>;
  using QVec = SharedVec<float, kBlockQ>;
  using Ring = Pipeline<Traits::kStages>;
  using KvRing = Pipeline<1>;
  static constexpr int kDqStages = backward_dq_stages(kHeadDim);
  static constexpr int kStorers = Traits::kDeterministic ? kDqStages : 1;
  using DqRing = StorePipeline<kDqStages>;
  using Scores = RegTile<float, 16, kBlockQ>;
  using Weights = RegTile<T, 16, kBlockQ>;
  using DkvTile = RegTile<float, 16, kHeadDim>;
  using DqPart = RegTile<float, 16, 64>;
  using Walk = BackwardWalk<Traits>;
  using QTurns = typename Walk::QTurns;
  using Tile = typename Walk::Tile;

  // What leaves a consumer: its part of dq of a step or, at a tile's end, its rows of dv and dk,
  // one after the other where both do not fit.
  using DkvRows = SharedTile<T, 64, kHeadDim>;
  static constexpr bool kLeaveTogether = 2 * DkvRows::kBytes <= Fragments<64>::kBytes;
  union Leaving {
    Fragments<64> dq;
    DkvRows dkv[kLeaveTogether ? 2 : 1];
  };

  struct Shared {
    KvTile k_smem, v_smem;
    QTile q_smem[Traits::kStages];
    QTile dout_smem[Traits::kStages];
    DsTile ds_smem[2];
    Leaving leaving[kDqStages][kConsumers];
    QVec lse_smem[Traits::kStages];
    QVec delta_smem[Traits::kStages];
    KvRing k_ring, v_ring;
    Ring q_ring, dout_ring;
    DqRing leaving_ring;
    typename Walk::Messages messages;
  };
  static_assert(sizeof(Shared) + 1024 <=
                    backward_shared_bytes(kHeadDim, {kBlockQ, kBlockKv, Traits::kStages}),
                "attention.h's backward_shared_bytes covers the kernel's shared memory");

  enum Rendezvous : int {
    kDsWritten = kFirstKernelBarrier,  // all consumers have written their rows of ds
  };

  // In waves, blocks read q and dout at about the same time: at D = 128 dq's sums, which they would
  // drive out of L2, are to stay there.
  static constexpr tma::Keep kKeepQueries =
      QTurns::kInWaves && kHeadDim == 128 ? tma::Keep::kNormal : tma::Keep::kLong;

  __device__ __forceinline__ static void init(const BackwardParams&, Shared& shared) {
    shared.k_ring.init(4 * kConsumers);
    shared.v_ring.init(4 * kConsumers);
    shared.q_ring.init(4 * kConsumers);
    shared.dout_ring.init(4 * kConsumers);
    shared.leaving_ring.init(4 * kConsumers);
    shared.messages.init(4 * kConsumers + kStorers);
  }

  __device__ __forceinline__ static void load(const BackwardParams& params, Shared& shared) {
    tma::prefetch(params.q);
    tma::prefetch(params.k);
    tma::prefetch(params.v);
    tma::prefetch(params.dout);
    typename KvRing::State kv_state;
    typename Ring::State state;
    int wave_dealt = 0;
    for (Walk walk(params); walk.deal(shared.messages, wave_dealt);) {
      const Tile tile = walk.tile;
      const int first_key = tile.n * kBlockKv;
      // After the first q and dout, for which there is room while the last tile's keys are in use,
      // where the walk leaves registers to tell.
      bool keys_missing = true;
      const auto load_keys = [&] {
        keys_missing = false;
        shared.k_ring.acquire(kv_state, KvTile::kBytes);
        tma::load(shared.k_smem, params.k, shared.k_ring.full(kv_state), tma::Keep::kBriefly, 0,
                  first_key, tile.kv_head, tile.batch);
        shared.v_ring.acquire(kv_state, KvTile::kBytes);
        tma::load(shared.v_smem, params.v, shared.v_ring.full(kv_state), tma::Keep::kBriefly, 0,
                  first_key, tile.kv_head, tile.batch);
      };
      if constexpr (!QTurns::kInWaves) load_keys();
      walk.for_each_step(tile, [&](int head, int m) {
        const int first_query = m * kBlockQ;
        const int row = (tile.batch * params.num_heads + head) * params.padded_q + first_query;
        shared.q_ring.acquire(state, QTile::kBytes + QVec::kBytes);
        Barrier& q_full = shared.q_ring.full(state);
        tma::load(shared.q_smem[state.stage], params.q, q_full, kKeepQueries, 0, first_query, head,
                  tile.batch);
        tma::load(shared.lse_smem[state.stage], params.scaled_lse + row, q_full);
        shared.dout_ring.acquire(state, QTile::kBytes + QVec::kBytes);
        Barrier& dout_full = shared.dout_ring.full(state);
        tma::load(shared.dout_smem[state.stage], params.dout, dout_full, kKeepQueries, 0,
                  first_query, head, tile.batch);
        tma::load(shared.delta_smem[state.stage], params.delta + row, dout_full);
        if (QTurns::kInWaves && keys_missing) load_keys();
        state.advance();
      });
      if (QTurns::kInWaves && keys_missing) load_keys();
      kv_state.advance();
    }
  }

  // dq of every kStorers-th step, from shared memory to its sum. In a fixed order a storer is busy
  // with a step for about as long as the consumers: until its turn, and until the sum is complete.
  __device__ __forceinline__ static void store(const BackwardParams& params, Shared& shared,
                                               int storer) {
    typename DqRing::State state;
    int step = 0;
    const auto advance = [&] {
      if (++step == kStorers) step = 0;
      state.advance();
    };
    for (Walk walk(params); walk.next_of_thread(shared.messages);) {
      const Tile tile = walk.tile;
      walk.for_each_step(tile, [&](int head, int m) {
        if (step == storer) {
          store_step(params, shared, state, walk.turns, tile, head, m);
        }
        advance();
      });
      for (int i = 0; i < (kLeaveTogether ? 1 : 2); ++i) {
        if (step == storer) store_tile(params, shared, state, tile, i);
        advance();
      }
    }
    tma::wait<0>();
  }

  __device__ __forceinline__ static void store_step(const BackwardParams& params, Shared& shared,
                                                    const typename DqRing::State& state,
                                                    const QTurns& turns, const Tile& tile, int head,
                                                    int m) {
    const int row = (tile.batch * params.num_heads + head) * params.padded_q + m * kBlockQ;
    float* dq = params.dq_acc + static_cast<int64>(row) * kHeadDim;
    auto& leaving = shared.leaving[state.stage];
    const MapRow map_row = {params.extras.key_map, tile.batch, head, m};
    const int turn = Traits::kDeterministic ? turns.turn(tile.n, m, map_row) : 1;
    int* counter = params.dq_order + row / 64;
    shared.leaving_ring.wait(state);
    if constexpr (Traits::kDeterministic) take_turn(counter, turn);
    for (int i = 0; i < kConsumers; ++i) {
      float* part = dq + i * Fragments<64>::kValues;
      if (turn == 0) {
        tma::store(part, leaving[i].dq);
      } else {
        tma::add(part, leaving[i].dq);
      }
    }
    tma::commit();
    tma::wait_read<0>();
    shared.leaving_ring.release(state);
    if constexpr (Traits::kDeterministic) {
      tma::wait<0>();
      pass_turn(counter);
    }
  }

  // dv, and dk: both, or with which = 1 dk alone.
  __device__ __forceinline__ static void store_tile(const BackwardParams& params, Shared& shared,
                                                    const typename DqRing::State& state,
                                                    const Tile& tile, int which) {
    shared.leaving_ring.wait(state);
    for (int i = 0; i < kConsumers; ++i) {
      const auto& dkv = shared.leaving[state.stage][i].dkv;
      const int first_key = tile.n * kBlockKv + 64 * i;
      tma::store(which == 0 ? params.dv : params.dk, dkv[0], 0, first_key, tile.kv_head,
                 tile.batch);
      if constexpr (kLeaveTogether) {
        tma::store(params.dk, dkv[1], 0, first_key, tile.kv_head, tile.batch);
      }
    }
    tma::commit();
    tma::wait_read<0>();
    shared.leaving_ring.release(state);
  }

  __device__ __forceinline__ static void compute(const BackwardParams& params, Shared& shared,
                                                 int consumer) {
    typename KvRing::State kv_state;
    typename Ring::State state;
    typename DqRing::State out_state;
    const Map score_map(params.scale, params.extras);
    const auto k_rows = shared.k_smem.template rows<64>(consumer);
    const auto v_rows = shared.v_smem.template rows<64>(consumer);
    const auto k_cols = shared.k_smem.template cols<64>(consumer % Traits::kDqCols);
    int ds_buffer = 0;

    for (Walk walk(params); walk.next(shared.messages);) {
      const Tile tile = walk.tile;
      const int first_key = tile.n * kBlockKv + 64 * consumer;
      const Bounds& bounds = walk.turns.bounds;
      const bool ragged = first_key + 64 > bounds.seqlen_kv;
      Scores s_acc, dp_acc;
      DkvTile dk_acc, dv_acc;
      DqPart dq_acc;
      Weights p, ds;
      // Beside a cap. Widened where registers are few: values take one each until all are there.
      Select<kLateDp, RegTile<float, 16, kBlockQ>, typename Map::template BiasTile<kBlockQ>> bias;
      warp::zero(dk_acc);
      warp::zero(dv_acc);
      shared.k_ring.wait(kv_state);
      shared.v_ring.wait(kv_state);

      QuerySteps<QTurns> steps(walk.turns, params, tile.n, tile.kv_head, tile.batch);
      for (; steps.valid(); steps.next()) {
        const int first_query = steps.q_block() * kBlockQ;

        shared.q_ring.wait(state);
        // Loads from shared memory wait for the products issued before them.
        PerCol<kBlockQ> lse;
        if constexpr (kEarlyLse) warp::load(lse, shared.lse_smem[state.stage]);
        warpgroup::mm_ABt(s_acc, k_rows, shared.q_smem[state.stage]);
        warpgroup::mma_commit();
        const auto issue_dp = [&] {
          shared.dout_ring.wait(state);
          warpgroup::mm_ABt(dp_acc, v_rows, shared.dout_smem[state.stage]);
          warpgroup::mma_commit();
        };
        if constexpr (!kLateDp) issue_dp();

        warpgroup::mma_wait<kLateDp ? 0 : 1>(s_acc);
        score_map.begin_transposed(s_acc, params, tile.batch, steps.head, first_query, first_key);
        bool masked = ragged;
        if constexpr (Traits::kMask != Mask::kNone) {
          masked = masked || first_query + bounds.last_offset < first_key + 63;
        }
        if constexpr (Traits::kMask == Mask::kBand) {
          masked = masked || first_query + kBlockQ - 1 + bounds.first_offset > first_key;
        }
        if constexpr ((kFeatures & kLengths) != 0) {
          masked = masked || first_query + kBlockQ > bounds.seqlen_q;
        }
        if (masked) {
          mask_transposed_scores<Traits::kMask, kFeatures>(s_acc, first_query, first_key, bounds);
        }
        if constexpr (QTurns::kMapped) {
          if (!steps.blocks.is_whole()) {
            mask_transposed_by_arrays<kFeatures>(s_acc, params, tile.batch, steps.head, first_query,
                                                 first_key);
          }
        }
        if constexpr (Map::kCaps) {
          Map::load_transposed_bias(bias, params, tile.batch, steps.head, first_query, first_key);
        }
        if constexpr (kEarlyLse) {
          score_map.weigh(p, s_acc, bias, lse);
        } else {
          score_map.weigh(p, s_acc, bias, shared.lse_smem[state.stage]);
        }
        if constexpr (kLateDp) issue_dp();

        PerCol<kBlockQ> delta;
        if constexpr (kEarlyDelta) warp::load(delta, shared.delta_smem[state.stage]);
        warpgroup::mma_wait<0>(dp_acc);
        const auto subtract = [](float dp, float delta) { return dp - delta; };
        if constexpr (kEarlyDelta) {
          warp::map_cols(dp_acc, dp_acc, delta, subtract);
        } else {
          warp::map_cols(dp_acc, dp_acc, shared.delta_smem[state.stage], subtract);
        }
        warp::mul(dp_acc, dp_acc, s_acc);
        warp::convert(ds, dp_acc);
        auto& ds_smem = shared.ds_smem[ds_buffer];
        ds_buffer ^= 1;
        if constexpr (kLateDp) {
          // The same values through float, which the compiler fits into the registers there are.
          Weights same;
          warp::map(same, ds, [](float x) { return x; });
          warpgroup::store(ds_smem.template rows<64>(consumer), same);
        } else {
          warpgroup::store(ds_smem.template rows<64>(consumer), ds);
        }
        // dv's product runs while ds settles, for which the fence waits.
        warpgroup::mma_AB(dv_acc, p, shared.dout_smem[state.stage]);
        warpgroup::mma_commit();
        publish_shared();
        named_sync(kDsWritten, 128 * kConsumers);
        warpgroup::mm_AtB(dq_acc, ds_smem.template cols<64>(consumer / Traits::kDqCols), k_cols);
        warpgroup::mma_commit();
        warpgroup::mma_AB(dk_acc, ds, shared.q_smem[state.stage]);
        warpgroup::mma_commit();

        warpgroup::mma_wait<2>(dv_acc, p);
        shared.dout_ring.release(state);
        warpgroup::mma_wait<1>(dq_acc);
        shared.leaving_ring.acquire(out_state);
        warpgroup::store(shared.leaving[out_state.stage][consumer].dq, dq_acc);
        shared.leaving_ring.hand_over(out_state);
        out_state.advance();
        warpgroup::mma_wait<0>(dk_acc, ds);
        shared.q_ring.release(state);
        state.advance();
      }

      // The next tile's keys arrive while dv and dk leave.
      shared.k_ring.release(kv_state);
      shared.v_ring.release(kv_state);
      shared.leaving_ring.acquire(out_state);
      warpgroup::store(shared.leaving[out_state.stage][consumer].dkv[0], dv_acc);
      if constexpr (!kLeaveTogether) {
        shared.leaving_ring.hand_over(out_state);
        out_state.advance();
        shared.leaving_ring.acquire(out_state);
      }
      warp::mul(dk_acc, dk_acc, params.scale);
      constexpr int kLast = kLeaveTogether ? 1 : 0;
      warpgroup::store(shared.leaving[out_state.stage][consumer].dkv[kLast], dk_acc);
      shared.leaving_ring.hand_over(out_state);
      out_state.advance();
      kv_state.advance();
    }
  }
};

template <typename Traits>
__device__ __forceinline__ void backward(const BackwardParams& params) {
  block::run<Backward<Traits>>(params);
}

}  // namespace tk::attention
