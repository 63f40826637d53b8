// dk and dv of attention where a head dim is beyond 128, the scores recomputed from q, k and lse.
//
//   p = exp(scale q k^T - lse)    dv = p^T dout    ds = p o (dout v^T - delta)    dk = scale ds^T q
//
// dq has a kernel of its own (backward_wide_dq.cuh), which computes s and dp again. 64 keys are all
// whose dk and dv fit in registers, and the sum of dq over blocks of 64 keys would move as many
// bytes through shared memory as those two products, and 64 KB a step through L2, in turns.
// Grid: a tile is 64 keys of one key/value head for each block of a cluster; it walks the queries
// of every head of its group, so dk and dv need no sum across blocks.
// Roles: a producer warp loads k, v and two rings (q with lse, dout with delta), of which each
// block of a cluster of two loads one for both. Scores are transposed, keys as rows. Consumer
// warpgroup 0 computes s, p and dv, warpgroup 1 dp, ds and dk, which takes p from shared memory:
// both have D + Dv columns of products a step, and p and ds enter dv and dk as registers. Each
// issues the next step's scores beside this step's sums; nobody waits for ds.
// Budget at D = Dv = 256, 64 x 64, 2 stages: 201 KB of shared memory (k and v 64, q and dout 128,
// p 8); of 240 registers a thread, 128 hold dk or dv and 32 s or dp. Limit there: shared memory,
// 1.06 times the tensor cores' time; without a cluster L2, 1.35 times.
#pragma once

#include "kernels/attention/attention.h"
#include "kernels/attention/mask.cuh"
#include "kernels/attention/query_steps.cuh"
#include "kernels/attention/scores.cuh"
#include "kernels/attention/turns.cuh"
#include "tk/tk.cuh"

namespace tk::attention {

template <typename T_, int kHeadDim_, int kHeadDimV_, Mask kMask_, unsigned kFeatures_,
          int kBlockQ_, int kBlockKv_, int kStages_>
struct BackwardWideTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;
  static constexpr Mask kMask = kMask_;
  static constexpr unsigned kFeatures = kFeatures_;
  static constexpr int kBlockQ = kBlockQ_;
  static constexpr int kBlockKv = kBlockKv_;
  static constexpr int kStages = kStages_;
  static constexpr int kClusterSize = kBlockKv / 64;
  static_assert(kBlockKv == 64 || kBlockKv == 128, "a block has 64 keys, a cluster two blocks");
};

template <typename Traits>
struct BackwardWide {
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim, kHeadDimV = Traits::kHeadDimV;
  static constexpr int kBlockQ = Traits::kBlockQ, kBlockKv = Traits::kBlockKv;
  static constexpr int kClusterSize = Traits::kClusterSize;
  static constexpr unsigned kFeatures = Traits::kFeatures;
  static constexpr int kConsumers = 2;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  // With two stages, q has to be given back before the next step's dp; with more, ds is computed
  // beside dk.
  static constexpr bool kDkFirst = Traits::kStages == 2;

  using Map = ScoreMap<T, kFeatures>;
  static constexpr bool kFewRegisters = Map::kAdds || (kFeatures & kMaskArray) != 0;
  // Whether the exponentials have to run beside dv's product: the compiler puts them after it.
  static constexpr bool kPinWeights = true;

  using QTile = SharedTile<T, kBlockQ, kHeadDim>;
  using DoutTile = SharedTile<T, kBlockQ, kHeadDimV>;
  using KTile = SharedTile<T, 64, kHeadDim>;
  using VTile = SharedTile<T, 64, kHeadDimV>;
  using WeightsTile = SharedTile<T, 64, kBlockQ>;
  using QVec = SharedVec<float, kBlockQ>;
  using Ring = Pipeline<Traits::kStages>;
  using KvRing = Pipeline<1>;
  using Scores = RegTile<float, 16, kBlockQ>;
  using Weights = RegTile<T, 16, kBlockQ>;
  using Steps = Turns<Traits::kMask, kFeatures, kHeadDim, kBlockQ, kBlockKv>;
  // No turns: heads one after another, which takes fewer registers.
  using Queries = Select<Steps::kMapped, MappedSteps, CountedSteps<Steps>>;

  struct Shared {
    KTile k_smem;  // at a tile's end, dk and dv on their way out
    VTile v_smem;
    QTile q_smem[Traits::kStages];
    DoutTile dout_smem[Traits::kStages];
    WeightsTile p_smem;
    QVec lse_smem[Traits::kStages];
    QVec delta_smem[Traits::kStages];
    KvRing kv_ring;
    Ring q_ring, dout_ring;
  };
  static_assert(sizeof(Shared) + 1024 <=
                    backward_wide_shared_bytes(kHeadDim, kHeadDimV,
                                               {kBlockQ, kBlockKv, Traits::kStages, 0, 0}),
                "attention.h's backward_wide_shared_bytes covers the kernel's shared memory");

  enum Rendezvous : int {
    kWeightsShared = kFirstKernelBarrier,  // p is in shared memory
    kWeightsTaken,                         // and has been read
    kKeysRead,                             // both consumers have read k and v for the last time
  };

  struct Tile {
    int n;  // key block of the cluster
    int first_key;
    int kv_head, batch;
  };

  __device__ __forceinline__ static int rank() {
    if constexpr (kClusterSize > 1) return cluster::rank();
    return 0;
  }

  // The walk over tiles, the same for every role.
  struct Walk {
    const BackwardParams& params;
    Steps steps;
    grid::Rounds rounds;

    __device__ __forceinline__ explicit Walk(const BackwardParams& p) : params(p) {
      steps = {p.q_blocks,
               p.kv_blocks,
               p.turn_group,
               {p.seqlen_q, p.seqlen_kv, p.first_offset, p.last_offset}};
      rounds = {grid::block_x() / kClusterSize, grid::blocks_x() / kClusterSize, p.tiles};
    }
    // From here on, steps are those of the tile.
    __device__ __forceinline__ Tile tile() {
      const grid::HeadTile place =
          grid::sequential_tile(rounds.index(), params.kv_blocks, params.num_kv_heads);
      if constexpr ((kFeatures & kLengths) != 0) {
        steps.set_bounds(bounds_of<kFeatures>(params, place.batch));
      }
      return {place.block, place.block * kBlockKv + 64 * rank(), place.head, place.batch};
    }
  };

  __device__ __forceinline__ static void init(const BackwardParams&, Shared& shared) {
    shared.kv_ring.init(4 * kConsumers);
    shared.q_ring.init(4 * kConsumers * kClusterSize);
    shared.dout_ring.init(4 * kConsumers * kClusterSize);
  }

  __device__ __forceinline__ static void load(const BackwardParams& params, Shared& shared) {
    tma::prefetch(params.q);
    tma::prefetch(params.k);
    tma::prefetch(params.v);
    tma::prefetch(params.dout);
    typename KvRing::State kv_state;
    typename Ring::State state;
    const int group = params.num_heads / params.num_kv_heads;
    for (Walk walk(params); walk.rounds.valid(); walk.rounds.next()) {
      const Tile tile = walk.tile();
      shared.kv_ring.acquire(kv_state, KTile::kBytes + VTile::kBytes);
      Barrier& kv_full = shared.kv_ring.full(kv_state);
      tma::load(shared.k_smem, params.k, kv_full, tma::Keep::kBriefly, 0, tile.first_key,
                tile.kv_head, tile.batch);
      tma::load(shared.v_smem, params.v, kv_full, tma::Keep::kBriefly, 0, tile.first_key,
                tile.kv_head, tile.batch);
      kv_state.advance();
      // A block map is of a cluster's keys: both of its blocks, which share what is loaded, visit
      // the same queries.
      if constexpr (Steps::kMapped) {
        for (MappedSteps s(walk.steps, params, tile.n, tile.kv_head, tile.batch); s.valid();
             s.next(), state.advance()) {
          load_step(params, shared, state, s.q_block(), s.head, tile.batch);
        }
      } else {
        const int first = walk.steps.first_q_block(tile.n), steps = walk.steps.steps(tile.n);
        for (int head = tile.kv_head * group; head < (tile.kv_head + 1) * group; ++head) {
          for (int step = 0; step < steps; ++step, state.advance()) {
            load_step(params, shared, state, walk.steps.q_block(first, step), head, tile.batch);
          }
        }
      }
    }
  }

  __device__ __forceinline__ static void load_step(const BackwardParams& params, Shared& shared,
                                                   typename Ring::State& state, int m, int head,
                                                   int batch) {
    const int first_query = m * kBlockQ;
    const int row = (batch * params.num_heads + head) * params.padded_q + first_query;
    shared.q_ring.acquire(state, QTile::kBytes + QVec::kBytes);
    Barrier& q_full = shared.q_ring.full(state);
    load_queries<0>(shared.q_smem[state.stage], params.q, q_full, first_query, head, batch);
    tma::load(shared.lse_smem[state.stage], params.scaled_lse + row, q_full);
    shared.dout_ring.acquire(state, DoutTile::kBytes + QVec::kBytes);
    Barrier& dout_full = shared.dout_ring.full(state);
    load_queries<kClusterSize - 1>(shared.dout_smem[state.stage], params.dout, dout_full,
                                   first_query, head, batch);
    tma::load(shared.delta_smem[state.stage], params.delta + row, dout_full);
  }

  // The same rows for every block of the cluster: block kLoader loads them.
  template <int kLoader, typename Rows>
  __device__ __forceinline__ static void load_queries(const Rows& rows, const TensorMap& map,
                                                      Barrier& full, int first_query, int head,
                                                      int batch) {
    if constexpr (kClusterSize == 1) {
      tma::load(rows, map, full, tma::Keep::kNormal, 0, first_query, head, batch);
    } else if (rank() == kLoader) {
      tma::load_multicast(rows, map, full, tma::Keep::kNormal, (1 << kClusterSize) - 1, 0,
                          first_query, head, batch);
    }
  }

  __device__ __forceinline__ static void release(Ring& ring, const typename Ring::State& state) {
    ring.release(state);
    if constexpr (kClusterSize > 1) ring.release(state, rank() ^ 1);
  }

  __device__ __forceinline__ static void compute(const BackwardParams& params, Shared& shared,
                                                 int consumer) {
    if (consumer == 0) {
      sum_dv(params, shared);
    } else {
      sum_dk(params, shared);
    }
  }

  // Consumer 0: s, p and dv.
  __device__ __forceinline__ static void sum_dv(const BackwardParams& params, Shared& shared) {
    typename KvRing::State kv_state;
    typename Ring::State q_state, dout_state;
    const Map score_map(params.scale, params.extras);
    for (Walk walk(params); walk.rounds.valid(); walk.rounds.next()) {
      const Tile tile = walk.tile();
      RegTile<float, 16, kHeadDimV> dv_acc;
      warp::zero(dv_acc);
      shared.kv_ring.wait(kv_state);
      Queries queries(walk.steps, params, tile.n, tile.kv_head, tile.batch);
      if (queries.valid()) {
        Scores s_acc;
        Weights p;
        Weights slopes;  // with a cap: p times its slope
        typename Map::template BiasTile<kBlockQ> bias;
        const auto issue_scores = [&] {
          shared.q_ring.wait(q_state);
          warpgroup::mm_ABt(s_acc, operand<kFewRegisters>(shared.k_smem),
                            shared.q_smem[q_state.stage]);
          warpgroup::mma_commit();
        };
        // Scores become weights.
        const auto weigh = [&] {
          const Step step = take_step(queries);
          const int first_query = step.q_block * kBlockQ;
          const Bounds& bounds = walk.steps.bounds;
          score_map.begin_transposed(s_acc, params, tile.batch, step.head, first_query,
                                     tile.first_key);
          // Keys beyond the arrays are rows that nobody stores; those beyond a length are not.
          bool masked = (kFeatures & kLengths) != 0 && tile.first_key + 64 > bounds.seqlen_kv;
          if constexpr (Traits::kMask != Mask::kNone) {
            masked = masked || first_query + bounds.last_offset < tile.first_key + 63;
          }
          if constexpr (Traits::kMask == Mask::kBand) {
            masked = masked || first_query + kBlockQ - 1 + bounds.first_offset > tile.first_key;
          }
          if constexpr ((kFeatures & kLengths) != 0) {
            masked = masked || first_query + kBlockQ > bounds.seqlen_q;
          }
          if (masked) {
            mask_transposed_scores<Traits::kMask, kFeatures>(s_acc, first_query, tile.first_key,
                                                             bounds);
          }
          if constexpr (Steps::kMapped) {
            if (!step.is_whole) {
              mask_transposed_by_arrays<kFeatures>(s_acc, params, tile.batch, step.head,
                                                   first_query, tile.first_key);
            }
          }
          if constexpr (Map::kCaps) {
            Map::load_transposed_bias(bias, params, tile.batch, step.head, first_query,
                                      tile.first_key);
          }
          score_map.weigh_apart(slopes, s_acc, bias, shared.lse_smem[q_state.stage]);
          release(shared.q_ring, q_state);
          q_state.advance();
        };
        // What turns dp into ds: p, times whatever slope a map of scores has.
        const auto share_weights = [&] {
          named_sync(kWeightsTaken, 128 * kConsumers);
          if constexpr (Map::kCaps) {
            warpgroup::store(shared.p_smem, slopes);
          } else {
            warpgroup::store(shared.p_smem, p);
          }
          named_arrive(kWeightsShared, 128 * kConsumers);
        };
        const auto issue_sum = [&] {
          shared.dout_ring.wait(dout_state);
          warpgroup::mma_AB(dv_acc, p, shared.dout_smem[dout_state.stage]);
          warpgroup::mma_commit();
        };
        const auto finish_sum = [&] {
          warpgroup::mma_wait<0>(dv_acc, p);
          release(shared.dout_ring, dout_state);
          dout_state.advance();
        };
        issue_scores();
        warpgroup::mma_wait<0>(s_acc);
        weigh();
        warp::convert(p, s_acc);
        while (queries.valid()) {
          share_weights();
          issue_scores();
          issue_sum();
          warpgroup::mma_wait<1>(s_acc);
          weigh();
          if constexpr (kPinWeights) warp::pin(s_acc);
          finish_sum();
          warp::convert(p, s_acc);
        }
        share_weights();
        issue_sum();
        finish_sum();
      }
      finish_tile(params.dv, shared, kv_state, shared.v_smem, dv_acc, tile);
    }
  }

  // Consumer 1: dp, ds and dk.
  __device__ __forceinline__ static void sum_dk(const BackwardParams& params, Shared& shared) {
    typename KvRing::State kv_state;
    typename Ring::State q_state, dout_state;
    named_arrive(kWeightsTaken, 128 * kConsumers);
    for (Walk walk(params); walk.rounds.valid(); walk.rounds.next()) {
      const Tile tile = walk.tile();
      RegTile<float, 16, kHeadDim> dk_acc;
      warp::zero(dk_acc);
      shared.kv_ring.wait(kv_state);
      Queries queries(walk.steps, params, tile.n, tile.kv_head, tile.batch);
      if (queries.valid()) {
        Scores dp_acc;
        Weights ds;
        const auto issue_dp = [&] {
          shared.dout_ring.wait(dout_state);
          warpgroup::mm_ABt(dp_acc, operand<kFewRegisters>(shared.v_smem),
                            shared.dout_smem[dout_state.stage]);
          warpgroup::mma_commit();
        };
        // dp becomes the gradient of the scores.
        const auto differentiate = [&] {
          queries.next();
          warp::map_cols(dp_acc, dp_acc, shared.delta_smem[dout_state.stage],
                         [](float dp, float delta) { return dp - delta; });
          release(shared.dout_ring, dout_state);
          dout_state.advance();
          Weights p;
          named_sync(kWeightsShared, 128 * kConsumers);
          warpgroup::load(p, shared.p_smem);
          named_arrive(kWeightsTaken, 128 * kConsumers);
          warp::mul(dp_acc, dp_acc, p);
        };
        const auto issue_sum = [&] {
          shared.q_ring.wait(q_state);
          warpgroup::mma_AB(dk_acc, ds, shared.q_smem[q_state.stage]);
          warpgroup::mma_commit();
        };
        const auto release_q = [&] {
          release(shared.q_ring, q_state);
          q_state.advance();
        };
        issue_dp();
        warpgroup::mma_wait<0>(dp_acc);
        differentiate();
        warp::convert(ds, dp_acc);
        while (queries.valid()) {
          if constexpr (kDkFirst) {
            issue_sum();
            issue_dp();
            warpgroup::mma_wait<1>(dk_acc, ds);
            release_q();
            warpgroup::mma_wait<0>(dp_acc);
            differentiate();
          } else {
            issue_dp();
            issue_sum();
            warpgroup::mma_wait<1>(dp_acc);
            differentiate();
            warpgroup::mma_wait<0>(dk_acc, ds);
            release_q();
          }
          warp::convert(ds, dp_acc);
        }
        issue_sum();
        warpgroup::mma_wait<0>(dk_acc, ds);
        release_q();
      }
      warp::mul(dk_acc, dk_acc, params.scale);
      finish_tile(params.dk, shared, kv_state, shared.k_smem, dk_acc, tile);
    }
  }

  // Sums leave through the memory of k or v, which then is free for the next tile's.
  template <typename Rows, typename Sums>
  __device__ __forceinline__ static void finish_tile(const TensorMap& map, Shared& shared,
                                                     typename KvRing::State& kv_state,
                                                     const Rows& rows, const Sums& sums,
                                                     const Tile& tile) {
    named_sync(kKeysRead, 128 * kConsumers);
    warpgroup::store(rows, sums);
    publish_shared();
    warpgroup::sync();
    if (warpgroup::leader()) {
      tma::store(map, rows, 0, tile.first_key, tile.kv_head, tile.batch);
      tma::commit();
      tma::wait_read<0>();
    }
    warpgroup::sync();
    shared.kv_ring.release(kv_state);
    kv_state.advance();
  }
};

template <typename Traits>
__device__ __forceinline__ void backward_wide(const BackwardParams& params) {
  block::run<BackwardWide<Traits>>(params);
}

}  // namespace tk::attention
