// S = sum of phi(k) v^T and z = sum of phi(k) as the far tiles of packed documents see them, or
// back from the end the gradients of both.
//
//   forward, for far tile i:  S += phi(k of i - 2) (v of i - 2)^T,  z += sum of phi(k of i - 2)
//   reverse, for far tile i:  dS += phi^T dout of i,  dz -= sum of delta phi of i,  both of tile i
//   - 2
// where phi is alpha phi(q) / Z, and 0 for rows that see nothing from afar. Sums start anew at a
// far tile that does not follow another one (reverse: that no other one follows): tiles in a row
// that are far are of one document. That of tiles i - 2 and i - 1 is then i's too, so they have
// kChunk tokens each, and tile i - 2 begins two chunks before i does. Grid: heads of keys (reverse:
// of queries), shares of tiles, batch. Roles: a producer warp loads the head's map and a ring of k
// and v (reverse: of phi, dout and delta), of far tiles alone; a consumer warpgroup has 64 columns
// of values and keeps their sums (64 x 128, fp32) in registers, and a rounded copy on its way out.
// phi(k) is made in halves, by sign, and z of either sign kept in shared memory, a part for each
// warp's rows. Budget at D = V = 128: 177 KB of shared memory (reverse 133); 64 registers of S, 64
// of scores and features a thread. Limit: forward as sums.cuh; reverse memory.
#pragma once

#include "kernels/hedgehog_attention/documents.cuh"
#include "tk/tk.cuh"

namespace tk::hedgehog_attention {

template <typename T_, int kKeyDim_, int kConsumers_, bool kReverse_>
struct DocumentStatesTraits {
  using T = T_;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr bool kReverse = kReverse_;
  static_assert(kConsumers == 1 || kConsumers == 2, "a consumer has 64 columns of up to 128");
};

template <typename Traits>
struct DocumentStates {
  using T = typename Traits::T;
  static constexpr int kConsumers = Traits::kConsumers;
  static constexpr bool kReverse = Traits::kReverse;
  static constexpr int kKeyDim = kReverse ? kFeatures : Traits::kKeyDim;
  static constexpr int kProducerRegisters = kConsumers == 1 ? 56 : 24;
  static constexpr int kConsumerRegisters = 240;

  using MapTile = SharedTile<T, kKeyDim, kMap>;
  using KeyTile = SharedTile<T, kChunk, kKeyDim>;
  using ValueTile = SharedTile<T, kChunk, kSlice>;
  using FeatureTile = SharedTile<T, kChunk, kFeatures>;
  using StateTile = SharedTile<T, kSlice, kFeatures>;
  using Ring = Pipeline<kStateStages>;
  using State = RegTile<float, 16, kFeatures>;

  // What makes phi(k).
  struct Features {
    MapTile map_smem;
    FeatureTile phi_smem;
  };
  struct Nothing {};
  struct Shared {
    KeyTile keys_smem[kStateStages];
    ValueTile values_smem[kStateStages][kConsumers];
    StateTile state_smem[kConsumers];
    Select<kReverse, Nothing, Features> of_keys;
    Normalizer normalizer;
    RowVec delta[kStateStages];
    Barrier head_full;
    Ring ring;
  };
  static_assert(sizeof(Shared) + 1024 <=
                    document_states_shared_bytes(Traits::kKeyDim, kConsumers, kReverse),
                "hedgehog_attention.h's document_states_shared_bytes covers the shared memory");
  static constexpr int kStageBytes =
      KeyTile::kBytes + kConsumers * ValueTile::kBytes + (kReverse ? RowVec::kBytes : 0);

  struct Place {
    int head, batch;
    int row;         // of [B, heads]
    int first, end;  // tiles

    __device__ __forceinline__ explicit Place(const DocumentStatesParams& params) {
      head = grid::block_x();
      batch = grid::block_z();
      row = batch * params.num_heads + head;
      const Segment segment = document_segment(params.documents, batch);
      first = segment.first;
      end = segment.end;
      if (!kReverse) {
        // S at the start of the next share is this one's business, and that at its own start that
        // of the one before.
        if (first > 0) ++first;
        end = min(end + 1, load_scalar(params.documents.counts + batch));
      }
    }
    __device__ __forceinline__ int tiles() const { return max(end - first, 0); }
    // The tile of a step.
    __device__ __forceinline__ int tile(int step) const {
      return kReverse ? end - 1 - step : first + step;
    }
    __device__ __forceinline__ int64 share(const DocumentStatesParams& params) const {
      return static_cast<int64>(row) * params.states + grid::block_y();
    }
  };

  __device__ __forceinline__ static void init(const DocumentStatesParams&, Shared& shared) {
    shared.head_full.init(1);
    shared.ring.init(4 * kConsumers);
  }

  __device__ __forceinline__ static void load(const DocumentStatesParams& params, Shared& shared) {
    const Place place(params);
    if constexpr (!kReverse) {
      shared.head_full.expect(MapTile::kBytes);
      tma::load(shared.of_keys.map_smem, params.k_map, shared.head_full, tma::Keep::kLong, 0, 0,
                place.head);
    }
    typename Ring::State state;
    for (int step = 0; step < place.tiles(); ++step) {
      const int index = place.tile(step);
      const DocumentTile tile = DocumentTile::of(params.documents, place.batch, index);
      if (!tile.is_far()) continue;
      const int token = kReverse ? tile.first : tile.first - 2 * kChunk;
      shared.ring.acquire(state, kStageBytes);
      Barrier& full = shared.ring.full(state);
      tma::load(shared.keys_smem[state.stage], params.keys, full, tma::Keep::kNormal, 0, token,
                place.head, place.batch);
#pragma unroll
      for (int i = 0; i < kConsumers; ++i) {
        tma::load(shared.values_smem[state.stage][i], params.values, full, tma::Keep::kNormal,
                  i * kSlice, token, place.head, place.batch);
      }
      if constexpr (kReverse) {
        const int64 row = static_cast<int64>(place.row) * params.documents.most + index;
        tma::load(shared.delta[state.stage], params.delta + row * kChunk, full);
      }
      state.advance();
    }
  }

  __device__ __forceinline__ static void compute(const DocumentStatesParams& params, Shared& shared,
                                                 int consumer) {
    const Place place(params);
    const int first = first_token(params.first, place.batch);
    State state;
    begin(params, shared, place, consumer, state);
    if constexpr (!kReverse) shared.head_full.wait(0);

    typename Ring::State stage;
    bool afresh = false;  // the last tile was no far one
    for (int step = 0; step < place.tiles(); ++step) {
      const DocumentTile tile = DocumentTile::of(params.documents, place.batch, place.tile(step));
      if (!tile.is_far()) {
        afresh = true;
        continue;
      }
      if (afresh) warp::zero(state);
      shared.ring.wait(stage);
      if constexpr (kReverse) {
        step_back(shared, state, stage.stage, consumer, afresh);
      } else {
        step_on(shared, state, stage.stage, consumer, afresh, tile.first - 2 * kChunk, first);
      }
      shared.ring.release(stage);
      stage.advance();
      afresh = false;
      const int keys_first = kReverse ? tile.first - 2 * kChunk : tile.first;
      if (params.normalizers != nullptr && keys_first >= 0) {
        store_states(params, shared, place, keys_first / kChunk, consumer, state);
      }
    }
    if (afresh) warp::zero(state);
    end(params, shared, place, consumer, state, afresh);
    if (warpgroup::leader()) tma::wait_read<0>();
  }

  // phi(k) and z in halves, as sums.cuh has them.
  __device__ __forceinline__ static void step_on(Shared& shared, State& state, int stage,
                                                 int consumer, bool afresh, int token, int first) {
    Square scores;
    const FeatureTile& phi_smem = shared.of_keys.phi_smem;
    warpgroup::mm_AB(scores, shared.keys_smem[stage], shared.of_keys.map_smem);
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(scores, state);
    meet<kConsumers>(kFeaturesFree);  // the last tile's are read, and z is
#pragma unroll
    for (int i = 0; i < 2 / kConsumers; ++i) {
      const int sign = sign_index<kConsumers>(consumer, i);
      if (afresh) clear(shared, sign);
      key_features(phi_smem, shared.normalizer, scores, sign, token, first);
    }
    publish_shared();
    meet<kConsumers>(kFeaturesReady);
    warpgroup::mma_AtB(state, shared.values_smem[stage][consumer], phi_smem);
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(state);
  }

  __device__ __forceinline__ static void step_back(Shared& shared, State& state, int stage,
                                                   int consumer, bool afresh) {
    const KeyTile& phi_smem = shared.keys_smem[stage];
    warpgroup::mma_AtB(state, shared.values_smem[stage][consumer], phi_smem);
    warpgroup::mma_commit();
    PerRow<16> delta;
    warpgroup::load(delta, shared.delta[stage]);
    meet<kConsumers>(kFeaturesFree);  // dz is read
#pragma unroll
    for (int i = 0; i < 2 / kConsumers; ++i) {
      const int sign = sign_index<kConsumers>(consumer, i);
      if (afresh) clear(shared, sign);
      Square phi;
      warpgroup::load(phi, phi_smem.template cols<kMap>(sign));
      warp::map_rows(phi, phi, delta, [](float x, float delta) { return -x * delta; });
      shared.normalizer.add(sign, phi);
    }
    meet<kConsumers>(kFeaturesReady);
    warpgroup::mma_wait<0>(state);
  }

  // Each warp what it adds to.
  __device__ __forceinline__ static void clear(Shared& shared, int sign) {
    shared.normalizer.clear(sign);
    if ((warp::index() & 3) == 0) shared.normalizer.clear_before(sign);
  }

  // What the share starts with.
  __device__ __forceinline__ static void begin(const DocumentStatesParams& params, Shared& shared,
                                               const Place& place, int consumer, State& state) {
    if (params.from == nullptr) {
      warp::zero(state);
    } else {
      warpgroup::load(
          state, state_rows(params.from, place.share(params), params.value_dim, consumer), 0, 0);
    }
#pragma unroll
    for (int i = 0; i < 2 / kConsumers; ++i) {
      const int sign = sign_index<kConsumers>(consumer, i);
      clear(shared, sign);
      if (params.from_normalizer != nullptr && (warp::index() & 3) == 0) {
        PerCol<kMap> before;
        load_cols(before, params.from_normalizer + place.share(params) * kFeatures + sign * kMap);
        warp::store(shared.normalizer.before[sign], before);
      }
    }
  }

  // What it leaves behind.
  __device__ __forceinline__ static void end(const DocumentStatesParams& params, Shared& shared,
                                             const Place& place, int consumer, const State& state,
                                             bool afresh) {
    if (params.to == nullptr) return;
    warpgroup::store(state_rows(params.to, place.share(params), params.value_dim, consumer), state,
                     0, 0);
    meet<kConsumers>(kFeaturesFree);
#pragma unroll
    for (int i = 0; i < 2 / kConsumers; ++i) {
      if (afresh) clear(shared, sign_index<kConsumers>(consumer, i));
    }
    meet<kConsumers>(kFeaturesReady);
    store_normalizer(params.to_normalizer + place.share(params) * kFeatures, shared.normalizer,
                     consumer);
  }

  // Copies for the tile whose queries, or keys, begin in a chunk.
  __device__ __forceinline__ static void store_states(const DocumentStatesParams& params,
                                                      Shared& shared, const Place& place, int chunk,
                                                      int consumer, const State& state) {
    const int64 index = static_cast<int64>(place.row) * params.chunks + chunk;
    store_normalizer(params.normalizers + index * kFeatures, shared.normalizer, consumer);
    const StateTile& state_smem = shared.state_smem[consumer];
    if (warpgroup::leader()) tma::wait_read<0>();  // the last one has left
    warpgroup::sync();
    warpgroup::store(state_smem, state);
    publish_shared();
    warpgroup::sync();
    if (warpgroup::leader()) {
      tma::store(params.stored, state_smem, 0,
                 static_cast<int>(index) * kConsumers * kSlice + consumer * kSlice);
      tma::commit();
    }
  }

  // One warp of each consumer: z of its signs.
  __device__ __forceinline__ static void store_normalizer(float* array,
                                                          const Normalizer& normalizer,
                                                          int consumer) {
    if ((warp::index() & 3) != 0) return;
#pragma unroll
    for (int i = 0; i < 2 / kConsumers; ++i) {
      const int sign = sign_index<kConsumers>(consumer, i);
      PerCol<kMap> sums;
      normalizer.load(sums, sign);
      RegTile<float, 16, kMap> rows;  // all alike
      warp::zero(rows);
      warp::add_cols(rows, rows, sums);
      warp::store(GlobalView<float>{array + sign * kMap, 1, kMap, kMap}, rows, 0, 0);
    }
  }
  __device__ __forceinline__ static void load_cols(PerCol<kMap>& dst, const float* array) {
    RegTile<float, 16, kMap> rows;
    warp::load(rows, GlobalView<const float>{array, 1, kMap, kMap}, 0, 0);
    warp::col_sum(dst, rows);  // rows that are not there read as zero
  }
};

template <typename Traits>
__device__ __forceinline__ void document_states(const DocumentStatesParams& params) {
  block::run<DocumentStates<Traits>>(params);
}

}  // namespace tk::hedgehog_attention
