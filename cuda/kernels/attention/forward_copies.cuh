// What forward.cuh has in shared memory, and how it comes there: rings of q, of keys, of values and
// of a bias's tiles, the numbers of the tile at hand, and marks of tiles that are walked once more.
#pragma once

#include "kernels/attention/attention.h"
#include "kernels/attention/forward_walk.cuh"
#include "kernels/attention/scores.cuh"
#include "tk/tk.cuh"

namespace tk::attention {

template <typename T_, int kHeadDim_, int kHeadDimV_, Mask kMask_, unsigned kFeatures_,
          int kBlockQ_, int kBlockKv_, int kStages_>
struct ForwardTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;    // of q and k
  static constexpr int kHeadDimV = kHeadDimV_;  // of v and out
  static constexpr Mask kMask = kMask_;
  static constexpr unsigned kFeatures = kFeatures_;
  static constexpr int kBlockQ = kBlockQ_;
  static constexpr int kBlockKv = kBlockKv_;
  static constexpr int kStages = kStages_;
  static constexpr int kConsumers = kBlockQ / 64;
  static_assert(kBlockQ % 64 == 0 && kConsumers >= 1 && kConsumers <= 3,
                "a consumer warpgroup owns 64 queries, and there are at most three");
};

template <typename Traits>
struct ForwardCopies {
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim, kHeadDimV = Traits::kHeadDimV;
  static constexpr int kBlockQ = Traits::kBlockQ, kBlockKv = Traits::kBlockKv;
  static constexpr unsigned kFeatures = Traits::kFeatures;
  static constexpr int kConsumers = Traits::kConsumers;

  using Walk = ForwardWalk<Traits>;
  using Tile = typename Walk::Tile;
  static constexpr bool kMasked = Walk::kMasked, kMapped = Walk::kMapped;
  static constexpr bool kWalksUp = Walk::kWalksUp;
  // Whether blocks that all queries see are weighed by the maximum of those before, so that some
  // tiles may be walked once more.
  static constexpr bool kKeepsMax = kFeatures == 0 || kFeatures == kSoftCap;

  using QTile = SharedTile<T, 64, kHeadDim>;
  using KTile = SharedTile<T, kBlockKv, kHeadDim>;
  using VTile = SharedTile<T, kBlockKv, kHeadDimV>;
  using OutTile = SharedTile<T, 64, kHeadDimV>;
  using Ring = Pipeline<Traits::kStages>;
  using Map = ScoreMap<T, Traits::kFeatures>;
  static constexpr int kQStages =
      forward_q_stages(kHeadDim, kHeadDimV, {kBlockQ, kBlockKv, Traits::kStages}, kFeatures);
  using QRing = Pipeline<kQStages>;
  // Whether out leaves straight from the registers. Then the one stage of q there is room for is
  // free for the next tile's as soon as the last scores are there.
  static constexpr bool kOutFromRegisters = kQStages == 1;
  // Then each consumer's rows of q have a ring of their own: whose queries see less goes ahead.
  static constexpr int kQRings = kOutFromRegisters && kWalksUp ? kConsumers : 1;
  using Tiles = MessagePipeline<2, 5>;
  using Marks = Ballot<4 * kConsumers>;

  // A consumer's rows: of q, and at the end of a tile, if it leaves through them, of out.
  union Rows {
    QTile q_smem;
    OutTile out_smem;
  };
  // A bias that the copy engine brings: each consumer's rows, which it gives back by itself.
  using BiasTile = SharedTile<typename Map::BiasElement, 64, kBlockKv>;
  using BiasRing = Pipeline<1>;
  struct BiasTiles {
    BiasTile of[kConsumers];
  };
  struct Shared {
    Rows rows[kQStages][kConsumers];
    KTile k_smem[Traits::kStages];
    VTile v_smem[Traits::kStages];
    Select<Map::kTiles, BiasTiles, Nothing> bias_smem;
    Tiles tiles;
    Marks marks;
    QRing q_rings[kQRings];
    Ring k_ring, v_ring;
    BiasRing bias_rings[kConsumers];
  };
  static_assert(sizeof(Shared) + 1024 <= forward_shared_bytes(kHeadDim, kHeadDimV,
                                                              {kBlockQ, kBlockKv, Traits::kStages},
                                                              kFeatures),
                "attention.h's forward_shared_bytes covers the kernel's shared memory");

  __device__ __forceinline__ static void init(const ForwardParams&, Shared& shared) {
    shared.tiles.init(4 * kConsumers);
    shared.marks.init();
    for (QRing& ring : shared.q_rings) ring.init(4 * kConsumers / kQRings);
    shared.k_ring.init(4 * kConsumers);
    shared.v_ring.init(4 * kConsumers);
    if constexpr (Map::kTiles) {
      for (BiasRing& ring : shared.bias_rings) ring.init(4);
    }
  }

  __device__ __forceinline__ static void load(const ForwardParams& params, Shared& shared) {
    tma::prefetch(params.q);
    tma::prefetch(params.k);
    tma::prefetch(params.v);
    if constexpr (Map::kTiles) tma::prefetch(params.bias);
    typename QRing::State q_state;
    typename Ring::State kv_state;
    typename BiasRing::State bias_state;
    typename Tiles::State tile_state;
    const int group = params.num_heads / params.num_kv_heads;
    const auto load_bias = [&](const Tile& tile, int first_key) {
      if constexpr (Map::kTiles) {
        const ScoreArray& array = params.extras.bias;
        for (int i = 0; i < kConsumers; ++i) {
          BiasRing& ring = shared.bias_rings[i];
          ring.acquire(bias_state, BiasTile::kBytes);
          tma::load(shared.bias_smem.of[i], params.bias, ring.full(bias_state), tma::Keep::kNormal,
                    first_key, tile.first_query + 64 * i, array.head_stride == 0 ? 0 : tile.head,
                    array.batch_stride == 0 ? 0 : tile.batch);
        }
        bias_state.advance();
      }
    };
    const auto load_tiles = [&](uint32 wanted) {
      for (Walk walk(params); walk.valid(); walk.next()) {
        const ForwardPlace place = walk.place();
        if (kKeepsMax && (wanted & Walk::mark_of(place)) == 0) continue;
        if constexpr (kMasked) {
          shared.tiles.send(tile_state, {place.first_query, place.head, place.batch,
                                         place.first_block, place.end_block});
        }
        Tile tile = Walk::tile_at(params, place);
        for (int i = 0; i < kConsumers; ++i) {
          QRing& ring = shared.q_rings[i % kQRings];
          if (i < kQRings) ring.acquire(q_state, kConsumers / kQRings * QTile::kBytes);
          tma::load(shared.rows[q_state.stage][i].q_smem, params.q, ring.full(q_state),
                    tma::Keep::kBriefly, 0, tile.first_query + 64 * i, tile.head, tile.batch);
        }
        q_state.advance();
        const int kv_head = tile.head / group;
        for (; tile.keys.valid(); tile.keys.next(Walk::map_row(params, tile)), kv_state.advance()) {
          const int first_key = tile.keys.block() * kBlockKv;
          shared.k_ring.acquire(kv_state, KTile::kBytes);
          tma::load(shared.k_smem[kv_state.stage], params.k, shared.k_ring.full(kv_state),
                    tma::Keep::kLong, 0, first_key, kv_head, tile.batch);
          load_bias(tile, first_key);
          shared.v_ring.acquire(kv_state, VTile::kBytes);
          tma::load(shared.v_smem[kv_state.stage], params.v, shared.v_ring.full(kv_state),
                    tma::Keep::kLong, 0, first_key, kv_head, tile.batch);
        }
      }
      if constexpr (kMasked) shared.tiles.send(tile_state, {0, 0, 0, 0, -1});
    };
    uint32 wanted = ~0u;
#pragma unroll 1
    for (int pass = 0; pass < (kKeepsMax ? 2 : 1) && wanted != 0; ++pass) {
      load_tiles(wanted);
      if (kKeepsMax && pass == 0) wanted = shared.marks.wait_by_thread();
    }
  }
};

}  // namespace tk::attention
