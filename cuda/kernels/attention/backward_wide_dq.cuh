// dq of attention where a head dim is beyond 128: the scores once more, a tile of queries at a
// time.
//
//   p = exp(scale q k^T - lse)    ds = p o (dout v^T - delta)    dq = scale ds k
//
// Two products more than a pass that sums dq over key blocks in global memory (backward_wide.cuh
// says why), and no sums outside of registers: the same bits in every run.
// Grid: persistent. A tile is 128 queries of one head; it walks its keys from the last visible
// block to the first (query_walk.cuh). Roles: a producer warp loads q and dout of a tile, and two
// rings of k and v; two consumer warpgroups own 64 queries each and never meet. A consumer issues
// the next block's scores, this block's ds k and the next block's dp, in that order: exp2 runs
// beside the latter two. Budget at D = Dv = 256, 128 x 48, 2 stages: 224 KB of shared memory (q and
// dout 128, k and v 96); of 240 registers a thread, 128 hold dq and 24 each s and dp. dq leaves
// through q's memory. Limit at 256: shared memory, 1.11 times the tensor cores' time (64 keys a
// step, which do not fit, would be even with them); at 192/128 and 128 x 64 both alike.
#pragma once

#include "kernels/attention/attention.h"
#include "kernels/attention/block_map.cuh"
#include "kernels/attention/mask.cuh"
#include "kernels/attention/query_walk.cuh"
#include "kernels/attention/scores.cuh"
#include "tk/tk.cuh"

namespace tk::attention {

template <typename T_, int kHeadDim_, int kHeadDimV_, Mask kMask_, unsigned kFeatures_,
          int kBlockKv_, int kStages_>
struct BackwardWideDqTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;
  static constexpr Mask kMask = kMask_;
  static constexpr unsigned kFeatures = kFeatures_;
  static constexpr int kBlockKv = kBlockKv_;
  static constexpr int kStages = kStages_;
  static_assert(kStages >= 2, "the next block's scores are issued while k is still read");
};

template <typename Traits>
struct BackwardWideDq {
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim, kHeadDimV = Traits::kHeadDimV;
  static constexpr int kBlockKv = Traits::kBlockKv;
  static constexpr unsigned kFeatures = Traits::kFeatures;
  static constexpr int kConsumers = kWideDqBlockQ / 64;
  static constexpr bool kMapped = (kFeatures & kMapFeatures) != 0;
  static constexpr int kProducerRegisters = kMapped ? 40 : 24;
  static constexpr int kConsumerRegisters = kMapped ? 232 : 240;
  using Map = ScoreMap<T, kFeatures>;
  static constexpr bool kFewRegisters = kMapped || Map::kAdds;
  // Whether a bias is added after the scores are masked, which takes fewer registers.
  static constexpr bool kLateBias = Map::kAdds && (Map::kCaps || kMapped);

  // Whether the exponentials have to run beside dq's and dp's products: the compiler puts them
  // after both.
  static constexpr bool kPinWeights = true;

  using QTile = SharedTile<T, 64, kHeadDim>;
  using DoutTile = SharedTile<T, 64, kHeadDimV>;
  using KTile = SharedTile<T, kBlockKv, kHeadDim>;
  using VTile = SharedTile<T, kBlockKv, kHeadDimV>;
  using Ring = Pipeline<Traits::kStages>;
  using RowsRing = Pipeline<1>;
  using Scores = RegTile<float, 16, kBlockKv>;
  using Weights = RegTile<T, 16, kBlockKv>;
  using DqTile = RegTile<float, 16, kHeadDim>;
  using Walk = QueryWalk<BackwardWideDqParams, Traits::kMask, kFeatures, kWideDqBlockQ, kBlockKv,
                         (kHeadDim + kHeadDimV) * static_cast<int>(sizeof(T))>;

  // The key blocks of a tile, from the last that it visits to the first.
  struct CountedKeys {
    int first, at;

    __device__ __forceinline__ CountedKeys(const BackwardWideDqParams&, const QueryTile& tile)
        : first(tile.first_block), at(tile.end_block - 1) {}
    __device__ __forceinline__ bool empty() const { return at + 1 == first; }
    __device__ __forceinline__ bool valid() const { return at >= first; }
    __device__ __forceinline__ int block() const { return at; }
    __device__ __forceinline__ void next() { --at; }
  };
  struct MappedKeys {
    MapRow row;
    BlocksDown<true> blocks;

    __device__ __forceinline__ MappedKeys(const BackwardWideDqParams& params, const QueryTile& tile)
        : row{params.extras.key_map, tile.batch, tile.head, tile.first_query / kWideDqBlockQ} {
      blocks.start(tile.first_block, tile.end_block, row);
    }
    __device__ __forceinline__ bool empty() const { return !valid(); }
    __device__ __forceinline__ bool valid() const { return blocks.valid(); }
    __device__ __forceinline__ int block() const { return blocks.block(); }
    __device__ __forceinline__ void next() { blocks.next(row); }
  };
  using Keys = Select<kMapped, MappedKeys, CountedKeys>;

  struct Shared {
    QTile q_smem[kConsumers];  // at a tile's end, dq on its way out
    DoutTile dout_smem[kConsumers];
    KTile k_smem[Traits::kStages];
    VTile v_smem[Traits::kStages];
    RowsRing rows_ring[kConsumers];
    Ring k_ring, v_ring;
  };
  static_assert(sizeof(Shared) + 1024 <=
                    backward_wide_dq_shared_bytes(kHeadDim, kHeadDimV,
                                                  {0, 0, 0, Traits::kBlockKv, Traits::kStages}),
                "attention.h's backward_wide_dq_shared_bytes covers the kernel's shared memory");

  __device__ __forceinline__ static void init(const BackwardWideDqParams&, Shared& shared) {
    for (int i = 0; i < kConsumers; ++i) shared.rows_ring[i].init(4);
    shared.k_ring.init(4 * kConsumers);
    shared.v_ring.init(4 * kConsumers);
  }

  __device__ __forceinline__ static void load(const BackwardWideDqParams& params, Shared& shared) {
    tma::prefetch(params.q);
    tma::prefetch(params.dout);
    tma::prefetch(params.k);
    tma::prefetch(params.v);
    typename RowsRing::State rows_state;
    typename Ring::State state;
    const int group = params.num_heads / params.num_kv_heads;
    for (Walk walk(params); walk.valid(); walk.next()) {
      const QueryTile tile = walk.tile();
      for (int i = 0; i < kConsumers; ++i) {
        shared.rows_ring[i].acquire(rows_state, QTile::kBytes + DoutTile::kBytes);
        Barrier& full = shared.rows_ring[i].full(rows_state);
        tma::load(shared.q_smem[i], params.q, full, tma::Keep::kBriefly, 0,
                  tile.first_query + 64 * i, tile.head, tile.batch);
        tma::load(shared.dout_smem[i], params.dout, full, tma::Keep::kBriefly, 0,
                  tile.first_query + 64 * i, tile.head, tile.batch);
      }
      rows_state.advance();
      const int kv_head = tile.head / group;
      for (Keys keys(params, tile); keys.valid(); keys.next(), state.advance()) {
        const int first_key = keys.block() * kBlockKv;
        shared.k_ring.acquire(state, KTile::kBytes);
        tma::load(shared.k_smem[state.stage], params.k, shared.k_ring.full(state), tma::Keep::kLong,
                  0, first_key, kv_head, tile.batch);
        shared.v_ring.acquire(state, VTile::kBytes);
        tma::load(shared.v_smem[state.stage], params.v, shared.v_ring.full(state), tma::Keep::kLong,
                  0, first_key, kv_head, tile.batch);
      }
    }
  }

  __device__ __forceinline__ static void compute(const BackwardWideDqParams& params, Shared& shared,
                                                 int consumer) {
    typename RowsRing::State rows_state;
    typename Ring::State k_state, v_state;  // k_state: the first block that still reads its k
    const Map score_map(params.scale, params.extras);
    const QTile& q_smem = shared.q_smem[consumer];
    const DoutTile& dout_smem = shared.dout_smem[consumer];
    for (Walk walk(params); walk.valid(); walk.next()) {
      const QueryTile tile = walk.tile();
      const int first_query = tile.first_query + 64 * consumer;
      const int64 row =
          (static_cast<int64>(tile.batch) * params.num_heads + tile.head) * params.padded_q;
      PerRow<16> lse, delta;
      warpgroup::load(lse, GlobalVec<const float>{params.scaled_lse + row, params.padded_q},
                      first_query, kInfinity);
      warpgroup::load(delta, GlobalVec<const float>{params.delta + row, params.padded_q},
                      first_query, 0.0f);
      DqTile dq_acc;
      warp::zero(dq_acc);
      shared.rows_ring[consumer].wait(rows_state);
      Keys keys(params, tile);
      if (!keys.empty()) {
        Scores s_acc, dp_acc;
        Weights ds;
        // Scores become weights.
        const auto weigh = [&] {
          const int block = keys.block();
          if constexpr (Map::kAdds && !kLateBias) {
            score_map.apply_bias(s_acc, params, tile.batch, tile.head, first_query,
                                 block * kBlockKv);
          } else {
            score_map.apply_cap(s_acc);
          }
          if (tile.template masked<Traits::kMask>(block)) {
            mask_scores<Traits::kMask>(s_acc, first_query, block * kBlockKv,
                                       bounds_of<kFeatures>(params, tile.batch));
          }
          if constexpr (kMapped) {
            if (!keys.blocks.is_whole()) {
              mask_by_arrays<kFeatures>(s_acc, params, tile.batch, tile.head, first_query,
                                        block * kBlockKv);
            }
          }
          if constexpr (kLateBias) {
            score_map.weigh_with_bias(s_acc, params, tile.batch, tile.head, first_query,
                                      block * kBlockKv, lse);
          } else {
            score_map.weigh(s_acc, lse);
          }
        };
        // dp becomes the gradient of the scores.
        const auto differentiate = [&] {
          warp::map_rows(dp_acc, dp_acc, delta, [](float dp, float d) { return dp - d; });
          warp::mul(dp_acc, dp_acc, s_acc);
          warp::convert(ds, dp_acc);
        };
        shared.k_ring.wait(k_state);
        warpgroup::mm_ABt(s_acc, operand<kFewRegisters>(q_smem), shared.k_smem[k_state.stage]);
        warpgroup::mma_commit();
        shared.v_ring.wait(v_state);
        warpgroup::mm_ABt(dp_acc, operand<kFewRegisters>(dout_smem), shared.v_smem[v_state.stage]);
        warpgroup::mma_commit();
        warpgroup::mma_wait<1>(s_acc);
        weigh();
        warpgroup::mma_wait<0>(dp_acc);
        shared.v_ring.release(v_state);
        v_state.advance();
        differentiate();

        for (keys.next(); keys.valid(); keys.next()) {
          typename Ring::State next = k_state;
          next.advance();
          shared.k_ring.wait(next);
          warpgroup::mm_ABt(s_acc, operand<kFewRegisters>(q_smem), shared.k_smem[next.stage]);
          warpgroup::mma_commit();
          warpgroup::mma_AB(dq_acc, ds, shared.k_smem[k_state.stage]);
          warpgroup::mma_commit();
          shared.v_ring.wait(v_state);
          warpgroup::mm_ABt(dp_acc, operand<kFewRegisters>(dout_smem),
                            shared.v_smem[v_state.stage]);
          warpgroup::mma_commit();
          warpgroup::mma_wait<2>(s_acc);
          weigh();
          if constexpr (kPinWeights) warp::pin(s_acc);
          warpgroup::mma_wait<1>(dq_acc, ds);
          shared.k_ring.release(k_state);
          k_state = next;
          warpgroup::mma_wait<0>(dp_acc);
          shared.v_ring.release(v_state);
          v_state.advance();
          differentiate();
        }
        warpgroup::mma_AB(dq_acc, ds, shared.k_smem[k_state.stage]);
        warpgroup::mma_commit();
        warpgroup::mma_wait<0>(dq_acc, ds);
        shared.k_ring.release(k_state);
        k_state.advance();
      }

      if constexpr ((kFeatures & kLengths) != 0) {
        // Queries beyond their length: with a sink, lse alone does not say that they see no key.
        const int end = bounds_of<kFeatures>(params, tile.batch).seqlen_q - first_query;
        if (end < 64) warpgroup::keep_rows_before(dq_acc, end, 0.0f);
      }
      warp::mul(dq_acc, dq_acc, params.scale);
      warpgroup::sync();  // all four warps have read q for the last time
      warpgroup::store(q_smem, dq_acc);
      publish_shared();
      warpgroup::sync();
      if (warpgroup::leader()) {
        tma::store(params.dq, q_smem, 0, first_query, tile.head, tile.batch);
        tma::commit();
        tma::wait_read<0>();
      }
      shared.rows_ring[consumer].release(rows_state);
      rows_state.advance();
    }
  }
};

template <typename Traits>
__device__ __forceinline__ void backward_wide_dq(const BackwardWideDqParams& params) {
  block::run<BackwardWideDq<Traits>>(params);
}

}  // namespace tk::attention
