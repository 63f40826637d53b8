// dbias, the gradient of a bias: the sum of ds = p o (dout v^T - delta) over all scores that share
// it.
//
// Scores are computed again, as in backward.cuh, by a pass of its own: a tile of the gradient stays
// in registers while everything that shares it goes by, so that nothing is added in global memory
// and a shared bias needs no array of scores. A call whose bias has no use for a gradient does not
// make this pass. Sums have one order, whatever `deterministic` says.
// Grid: persistent. A tile is 128 queries and 64 keys of one bias head; it walks the batch elements
// and heads that share the bias, and where queries or keys share it, their blocks.
// Roles: a producer warp loads q, dout, k and v of each step; two consumers own 64 queries each.
// Budget at D = 128: 2 stages of 96 KB; 32 registers each for s, dp, the sum and a bias of fp32.
// Limit: L2, 2.7 bytes of operands for each score at D = 128, 1.3 times the tensor cores' time.
#pragma once

#include "kernels/attention/attention.h"
#include "kernels/attention/mask.cuh"
#include "kernels/attention/scores.cuh"
#include "tk/tk.cuh"

namespace tk::attention {

template <typename T_, int kHeadDim_, int kHeadDimV_, Mask kMask_, unsigned kFeatures_>
struct BackwardBiasTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr Mask kMask = kMask_;
  static constexpr unsigned kFeatures = kFeatures_;
  static_assert((kFeatures & kBias) != 0, "only a bias has a gradient");
};

template <typename Traits>
struct BackwardBias {
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim, kHeadDimV = Traits::kHeadDimV;
  static constexpr int kBlockQ = kBiasBlockQ, kBlockKv = kBiasBlockKv;
  static constexpr unsigned kFeatures = Traits::kFeatures;
  static constexpr int kStages = backward_bias_stages(kHeadDim, kHeadDimV);
  static constexpr int kConsumers = kBlockQ / 64;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

  using QTile = SharedTile<T, 64, kHeadDim>;
  using DoutTile = SharedTile<T, 64, kHeadDimV>;
  using KTile = SharedTile<T, kBlockKv, kHeadDim>;
  using VTile = SharedTile<T, kBlockKv, kHeadDimV>;
  using Ring = Pipeline<kStages>;
  using Scores = RegTile<float, 16, kBlockKv>;
  using Map = ScoreMap<T, kFeatures>;

  struct Shared {
    QTile q_smem[kStages][kConsumers];
    DoutTile dout_smem[kStages][kConsumers];
    KTile k_smem[kStages];
    VTile v_smem[kStages];
    Ring ring;
  };
  static_assert(sizeof(Shared) + 1024 <= backward_bias_shared_bytes(kHeadDim, kHeadDimV),
                "attention.h's backward_bias_shared_bytes covers the kernel's shared memory");
  static constexpr int kStageBytes =
      kConsumers * (QTile::kBytes + DoutTile::kBytes) + KTile::kBytes + VTile::kBytes;

  // A block of the gradient: the indices from first to end that it is the sum over.
  struct Range {
    int first, end;
    __device__ __forceinline__ static Range of(bool all, int index, int count) {
      return all ? Range{0, count} : Range{index, index + 1};
    }
  };
  struct Tile {
    int batch, head, q_block, kv_block;  // of the gradient
    Range batches, heads, q_blocks, kv_blocks;
  };

  // The walk over tiles, the same for every role.
  struct Walk {
    const BackwardBiasParams& params;
    int q_blocks, kv_blocks;  // of the gradient
    grid::Rounds rounds;

    __device__ __forceinline__ explicit Walk(const BackwardBiasParams& p) : params(p) {
      q_blocks = p.shares_queries ? 1 : ceil_div(p.seqlen_q, kBlockQ);
      kv_blocks = p.shares_keys ? 1 : ceil_div(p.seqlen_kv, kBlockKv);
      rounds = {grid::block_x(), grid::blocks_x(),
                q_blocks * kv_blocks * p.bias_heads * p.bias_batches};
    }
    __device__ __forceinline__ Tile tile() const {
      const auto place =
          grid::sequential_tile(rounds.index() / kv_blocks, q_blocks, params.bias_heads);
      Tile tile = {place.batch, place.head, place.block, rounds.index() % kv_blocks};
      tile.batches = Range::of(params.bias_batches == 1, tile.batch, params.batch);
      tile.heads = Range::of(params.bias_heads == 1, tile.head, params.num_heads);
      tile.q_blocks =
          Range::of(params.shares_queries, tile.q_block, ceil_div(params.seqlen_q, kBlockQ));
      tile.kv_blocks =
          Range::of(params.shares_keys, tile.kv_block, ceil_div(params.seqlen_kv, kBlockKv));
      return tile;
    }
  };

  // Calls f(batch, head, first_query, first_key, bounds, whole) for what a tile is the sum over, as
  // far as any key is seen; whole: all of them are by all queries.
  template <typename F>
  __device__ __forceinline__ static void for_each_step(const BackwardBiasParams& params,
                                                       const Tile& tile, F&& f) {
    for (int batch = tile.batches.first; batch < tile.batches.end; ++batch) {
      const Bounds bounds = bounds_of<kFeatures>(params, batch);
      for (int head = tile.heads.first; head < tile.heads.end; ++head) {
        for (int m = tile.q_blocks.first; m < tile.q_blocks.end; ++m) {
          const int first_query = m * kBlockQ;
          if (first_query >= bounds.seqlen_q) break;
          const VisibleKeys keys = visible_keys<Traits::kMask>(first_query, kBlockQ, bounds);
          for (int n = tile.kv_blocks.first; n < tile.kv_blocks.end; ++n) {
            const int first_key = n * kBlockKv;
            if (first_key >= keys.end || first_key + kBlockKv <= keys.begin) continue;
            const bool whole = first_query + kBlockQ <= bounds.seqlen_q &&
                               first_key >= keys.all_begin && first_key + kBlockKv <= keys.all_end;
            f(batch, head, first_query, first_key, bounds, whole);
          }
        }
      }
    }
  }

  __device__ __forceinline__ static void init(const BackwardBiasParams&, Shared& shared) {
    shared.ring.init(4 * kConsumers);
  }

  __device__ __forceinline__ static void load(const BackwardBiasParams& params, Shared& shared) {
    tma::prefetch(params.q);
    tma::prefetch(params.k);
    tma::prefetch(params.v);
    tma::prefetch(params.dout);
    typename Ring::State state;
    const int group = params.num_heads / params.num_kv_heads;
    for (Walk walk(params); walk.rounds.valid(); walk.rounds.next()) {
      for_each_step(params, walk.tile(),
                    [&](int batch, int head, int first_query, int first_key, const Bounds&, bool) {
                      shared.ring.acquire(state, kStageBytes);
                      Barrier& full = shared.ring.full(state);
                      for (int i = 0; i < kConsumers; ++i) {
                        tma::load(shared.q_smem[state.stage][i], params.q, full, tma::Keep::kLong,
                                  0, first_query + 64 * i, head, batch);
                        tma::load(shared.dout_smem[state.stage][i], params.dout, full,
                                  tma::Keep::kLong, 0, first_query + 64 * i, head, batch);
                      }
                      tma::load(shared.k_smem[state.stage], params.k, full, tma::Keep::kLong, 0,
                                first_key, head / group, batch);
                      tma::load(shared.v_smem[state.stage], params.v, full, tma::Keep::kLong, 0,
                                first_key, head / group, batch);
                      state.advance();
                    });
    }
  }

  __device__ __forceinline__ static void compute(const BackwardBiasParams& params, Shared& shared,
                                                 int consumer) {
    typename Ring::State state;
    const Map score_map(params.scale, params.extras);
    const float unit_log2 = score_map.unit * kLog2E;
    for (Walk walk(params); walk.rounds.valid(); walk.rounds.next()) {
      const Tile tile = walk.tile();
      Scores sum, s_acc, dp_acc;
      warp::zero(sum);
      for_each_step(
          params, tile,
          [&](int batch, int head, int first_query, int first_key, const Bounds& bounds,
              bool whole) {
            first_query += 64 * consumer;
            shared.ring.wait(state);
            warpgroup::mm_ABt(s_acc, shared.q_smem[state.stage][consumer],
                              shared.k_smem[state.stage]);
            warpgroup::mma_commit();
            warpgroup::mm_ABt(dp_acc, shared.dout_smem[state.stage][consumer],
                              shared.v_smem[state.stage]);
            warpgroup::mma_commit();

            const auto rows_of = [&](const float* values) {
              const int64 row = static_cast<int64>(batch) * params.num_heads + head;
              return GlobalVec<const float>{values + row * params.padded_q, params.padded_q};
            };
            PerRow<16> lse, delta;
            warpgroup::load(lse, rows_of(params.scaled_lse), first_query, 0.0f);
            warpgroup::load(delta, rows_of(params.delta), first_query, 0.0f);

            warpgroup::mma_wait<1>(s_acc);
            score_map.apply_bias(s_acc, params, batch, head, first_query, first_key);
            if (!whole) {
              mask_scores<Traits::kMask>(s_acc, first_query, first_key, bounds);
              if constexpr ((kFeatures & kLengths) != 0) {
                warpgroup::keep_rows_before(s_acc, bounds.seqlen_q - first_query, -kInfinity);
              }
            }
            if constexpr ((kFeatures & (kSegments | kMaskArray)) != 0) {
              mask_by_arrays<kFeatures>(s_acc, params, batch, head, first_query, first_key);
            }
            warp::map_rows(s_acc, s_acc, lse,
                           [=](float s, float l) { return Map::power(s, unit_log2, l); });
            warpgroup::mma_wait<0>(dp_acc);
            shared.ring.release(state);
            state.advance();
            warp::map_rows(dp_acc, dp_acc, delta, [](float dp, float d) { return dp - d; });
            warp::mul(dp_acc, dp_acc, s_acc);
            warp::add(sum, sum, dp_acc);
          });
      if (params.float_result) {
        store<float>(params, tile, sum, consumer);
      } else {
        store<typename Map::BiasElement>(params, tile, sum, consumer);
      }
    }
  }

  template <typename Element>
  __device__ __forceinline__ static void store(const BackwardBiasParams& params, const Tile& tile,
                                               const Scores& sum, int consumer) {
    const int rows = params.shares_queries ? kBlockQ : params.seqlen_q;
    const int cols = params.shares_keys ? kBlockKv : params.seqlen_kv;
    const int64 matrix = static_cast<int64>(tile.batch) * params.bias_heads + tile.head;
    const GlobalView<Element> dbias{static_cast<Element*>(params.dbias) + matrix * rows * cols,
                                    rows, cols, cols};
    warpgroup::store(dbias, sum, tile.q_block * kBlockQ + 64 * consumer, tile.kv_block * kBlockKv);
  }
};

template <typename Traits>
__device__ __forceinline__ void backward_bias(const BackwardBiasParams& params) {
  block::run<BackwardBias<Traits>>(params);
}

}  // namespace tk::attention
