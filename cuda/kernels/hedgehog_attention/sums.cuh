// What a segment adds to S = sum of phi(k) v^T and to z = sum of phi(k): where there are few heads,
// sequences are cut into segments that run side by side, and each needs the sums of those before.
//
// Grid: heads of keys, segments, batch: shorter segments than those of outputs.cuh, of which the
// last has none. The window lags by a chunk: a segment has the chunks from the one before its first
// to the last but one.
// Roles: a producer warp loads the head's map and a ring of k and v; a consumer warpgroup has 64
// columns of values and keeps their S (64 x 128, fp32) in registers. phi(k) is computed in halves,
// by sign, and shared. z is a part for each warp's rows until the end.
// Budget at D = V = 128: 145 KB of shared memory; 64 registers of S, 64 of scores and features a
// thread. Limit: as outputs.cuh, in which a chunk takes three times as long.
#pragma once

#include "kernels/hedgehog_attention/walk.cuh"
#include "tk/tk.cuh"

namespace tk::hedgehog_attention {

template <typename T_, int kKeyDim_, int kConsumers_>
struct SumsTraits {
  using T = T_;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr int kConsumers = kConsumers_;
  static_assert(kConsumers == 1 || kConsumers == 2, "a consumer has 64 columns of up to 128");
};

template <typename Traits>
struct Sums {
  using T = typename Traits::T;
  static constexpr int kKeyDim = Traits::kKeyDim;
  static constexpr int kConsumers = Traits::kConsumers;
  static constexpr int kProducerRegisters = kConsumers == 1 ? 56 : 24;
  static constexpr int kConsumerRegisters = 240;

  using MapTile = SharedTile<T, kKeyDim, kMap>;
  using KeyTile = SharedTile<T, kChunk, kKeyDim>;
  using ValueTile = SharedTile<T, kChunk, kSlice>;
  using FeatureTile = SharedTile<T, kChunk, kFeatures>;
  using Ring = Pipeline<kKeyStages>;
  using State = RegTile<float, 16, kFeatures>;

  struct Shared {
    MapTile map_smem;
    KeyTile k_smem[kKeyStages];
    ValueTile v_smem[kKeyStages][kConsumers];
    FeatureTile phi_smem[2];  // of a chunk and of the one before
    Normalizer normalizer;
    Barrier head_full;
    Ring ring;
  };
  static_assert(sizeof(Shared) + 1024 <= sums_shared_bytes(kKeyDim, kConsumers),
                "hedgehog_attention.h's sums_shared_bytes covers the kernel's shared memory");
  static constexpr int kStageBytes = KeyTile::kBytes + kConsumers * ValueTile::kBytes;

  __device__ __forceinline__ static void init(const SumsParams&, Shared& shared) {
    shared.head_full.init(1);
    shared.ring.init(4 * kConsumers);
  }

  __device__ __forceinline__ static void load(const SumsParams& params, Shared& shared) {
    const int head = grid::block_x(), batch = grid::block_z();
    const Segment segment = Segment::of(params);
    shared.head_full.expect(MapTile::kBytes);
    tma::load(shared.map_smem, params.k_map, shared.head_full, tma::Keep::kLong, 0, 0, head);
    typename Ring::State state;
    for (int chunk = segment.first - 1; chunk < segment.end - 1; ++chunk, state.advance()) {
      shared.ring.acquire(state, kStageBytes);
      Barrier& full = shared.ring.full(state);
      tma::load(shared.k_smem[state.stage], params.k, full, tma::Keep::kNormal, 0, chunk * kChunk,
                head, batch);
#pragma unroll
      for (int i = 0; i < kConsumers; ++i) {
        tma::load(shared.v_smem[state.stage][i], params.v, full, tma::Keep::kNormal, i * kSlice,
                  chunk * kChunk, head, batch);
      }
    }
  }

  __device__ __forceinline__ static void compute(const SumsParams& params, Shared& shared,
                                                 int consumer) {
    const Segment segment = Segment::of(params);
    const int head = grid::block_x(), batch = grid::block_z();
    const int first = first_token(params.first, batch);
    State state;
    warp::zero(state);
#pragma unroll
    for (int i = 0; i < 2 / kConsumers; ++i) {
      const int sign = sign_index<kConsumers>(consumer, i);
      shared.normalizer.clear(sign);
      if ((warp::index() & 3) == 0) shared.normalizer.clear_before(sign);
    }
    shared.head_full.wait(0);

    // Features are made while the last chunk's are multiplied by its values. They have two tiles:
    // before consumers meet, each has waited for its product with the one that is written next.
    typename Ring::State stage, done;
    const int last = segment.end - 2;
    Square scores;
    shared.ring.wait(stage);
    warpgroup::mma_wait<0>(state);  // which is zero before any product begins
    warpgroup::mm_AB(scores, shared.k_smem[stage.stage], shared.map_smem);
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(scores);
    for (int chunk = segment.first - 1;; ++chunk) {
      const FeatureTile& phi_smem = shared.phi_smem[chunk & 1];
#pragma unroll
      for (int i = 0; i < 2 / kConsumers; ++i) {
        key_features(phi_smem, shared.normalizer, scores, sign_index<kConsumers>(consumer, i),
                     chunk * kChunk, first);
      }
      publish_shared();
      warpgroup::mma_wait<0>(state);
      if (chunk >= segment.first) {
        shared.ring.release(done);
        done.advance();
      }
      meet<kConsumers>(kFeaturesReady);
      const auto& v_smem = shared.v_smem[stage.stage][consumer];
      if (chunk == last) {
        warpgroup::mma_AtB(state, v_smem, phi_smem);
        warpgroup::mma_commit();
        break;
      }
      stage.advance();
      shared.ring.wait(stage);
      warpgroup::mm_AB(scores, shared.k_smem[stage.stage], shared.map_smem);
      warpgroup::mma_commit();
      warpgroup::mma_AtB(state, v_smem, phi_smem);
      warpgroup::mma_commit();
      warpgroup::mma_wait<1>(scores);
    }
    warpgroup::mma_wait<0>(state);
    shared.ring.release(done);

    const int64 index =
        (static_cast<int64>(batch) * params.num_kv_heads + head) * params.segments + segment.index;
    warp::store_pairs(state_rows(params.sums, index, params.value_dim, consumer), state,
                      16 * (warp::index() & 3), 0);
    meet<kConsumers>(kFeaturesFree);
    if (consumer == 0 && (warp::index() & 3) == 0) {
#pragma unroll
      for (int sign = 0; sign < 2; ++sign) {
        store_normalizer(params.normalizer + index * kFeatures + sign * kMap, shared.normalizer,
                         sign);
      }
    }
  }

  // One warp.
  __device__ __forceinline__ static void store_normalizer(float* array,
                                                          const Normalizer& normalizer, int sign) {
    PerCol<kMap> sums;
    normalizer.load(sums, sign);
    RegTile<float, 16, kMap> rows;  // all alike
    warp::zero(rows);
    warp::add_cols(rows, rows, sums);
    warp::store(GlobalView<float>{array, 1, kMap, kMap}, rows, 0, 0);
  }
};

template <typename Traits>
__device__ __forceinline__ void sums(const SumsParams& params) {
  block::run<Sums<Traits>>(params);
}

}  // namespace tk::hedgehog_attention
