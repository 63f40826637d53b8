// The state at the starts of chunks, or what segments add to it; and backwards, the state's
// gradient.
//
//   S  <- S + v^T phi(k)              forward, through the chunks of a segment
//   dS <- dS + dout^T phi(scale q)    reverse, back through them
//
// where a document that starts ends what was before it (parts.cuh). What the backward pass needs of
// each chunk is S before it and dS after it, rounded to the type of its products.
// Grid: pieces of the state of slices of 64 values, segments, batch. A block walks its segment's
// chunks.
// Roles: a producer warp loads a ring of keys and values; a consumer warpgroup keeps its piece
// (64 x 160 for 16 values, fp32) in registers, and forms the next chunk's features in shared memory
// while a chunk's product is summed.
// Budget for 16 values, 3 stages: 95 KB of shared memory, 80 registers of state a thread; two
// blocks share a multiprocessor. Limit: memory, writing 2 F bytes of states for every column of 64
// tokens' values.
#pragma once

#include "kernels/based_attention/walk.cuh"

namespace tk::based_attention {

template <typename Traits>
struct States {
  using T = typename Traits::T;
  using KeyTile = typename Traits::KeyTile;
  using ValueTile = typename Traits::ValueTile;
  static constexpr int kPieces = Traits::kPieces;
  static_assert(Traits::kStages >= kLeastWalkStages, "the next chunk is there beside a chunk");
  static constexpr int kConsumers = 1;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 232;

  using Ring = Pipeline<Traits::kStages>;
  using State = RegTile<float, 16, Traits::kPieceColumns>;

  struct Shared {
    KeyTile keys_smem[Traits::kStages];
    ValueTile values_smem[Traits::kStages];
    typename Traits::FeatureTile features_smem[2];  // of a chunk and of the next
    typename Traits::PieceTile state_smem;
    Documents<Traits::kDocuments> documents[Traits::kStages];
    Ring ring;
  };
  static_assert(sizeof(Shared) + 1024 <= states_shared_bytes(Traits::kDim, Traits::kStages),
                "based_attention.h's states_shared_bytes covers the kernel's shared memory");
  static constexpr int kStageBytes =
      KeyTile::kBytes + ValueTile::kBytes + Documents<Traits::kDocuments>::kBytes;

  // The chunk of a step.
  __device__ __forceinline__ static int chunk_at(const StatesParams& params, const Segment& segment,
                                                 int step) {
    return params.reverse ? segment.end - 1 - step : segment.first + step;
  }

  __device__ __forceinline__ static void init(const StatesParams&, Shared& shared) {
    shared.ring.init(4 * kConsumers);
  }

  __device__ __forceinline__ static void load(const StatesParams& params, Shared& shared) {
    tma::prefetch(params.keys);
    tma::prefetch(params.values);
    const Place place = Place::of(params, kPieces);
    const Segment segment = Segment::of(params, params.reverse);
    typename Ring::State state;
    for (int step = 0; step < segment.end - segment.first; ++step, state.advance()) {
      const int chunk = chunk_at(params, segment, step);
      shared.ring.acquire(state, kStageBytes);
      Barrier& full = shared.ring.full(state);
      tma::load(shared.keys_smem[state.stage], params.keys, full, tma::Keep::kNormal, 0,
                chunk * kChunk, place.group(params), place.batch);
      tma::load(shared.values_smem[state.stage], params.values, full, tma::Keep::kNormal,
                place.slice * kSlice, chunk * kChunk, place.head, place.batch);
      shared.documents[state.stage].load(params.counts, full, place.batch, chunk, params.chunks);
    }
  }

  // Which columns a piece has must be known where its features are formed.
  __device__ __forceinline__ static void compute(const StatesParams& params, Shared& shared, int) {
    const Place place = Place::of(params, kPieces);
    walk<0>(params, shared, place);
    if constexpr (kPieces > 1) walk<1>(params, shared, place);
    if constexpr (kPieces > 2) walk<2>(params, shared, place);
    if constexpr (kPieces > 3) walk<3>(params, shared, place);
    if constexpr (kPieces > 4) walk<4>(params, shared, place);
    if constexpr (kPieces > 5) walk<5>(params, shared, place);
  }

  template <int kPiece>
  __device__ __forceinline__ static void walk(const StatesParams& params, Shared& shared,
                                              const Place& place) {
    static_assert(kPieces <= 6, "compute tries up to six pieces");
    if (place.piece != kPiece) return;
    const Segment segment = Segment::of(params, params.reverse);
    State state;
    load_state<Traits>(state, params, place, segment);

    const int steps = segment.end - segment.first;
    typename Ring::State stage;
    int buffer = 0;  // of the features of the chunk's keys
    form_features<kPiece>(params, shared, stage, buffer);
    for (int step = 0; step < steps; ++step) {
      const Documents<Traits::kDocuments>& documents = shared.documents[stage.stage];
      RegTile<T, 16, kChunk> values;  // a row for each column of the slice
      warpgroup::load_transposed(values, shared.values_smem[stage.stage]);
      if (params.reverse) {
        documents.keep_cols_before(values);
      } else {
        documents.keep_cols_after(values);
      }
      if (params.stores) warpgroup::store(shared.state_smem, state);
      publish_shared();
      warpgroup::sync();
      if (params.stores && warpgroup::leader()) {
        tma::store(params.chunk_states, shared.state_smem, kPiece * Traits::kPieceColumns,
                   place.slice * kSlice,
                   place.row(params) * params.chunks + chunk_at(params, segment, step));
        tma::commit();
      }
      documents.keep_state(state);
      warpgroup::mma_AB(state, values, shared.features_smem[buffer]);
      warpgroup::mma_commit();
      const typename Ring::State done = stage;
      stage.advance();
      buffer ^= 1;
      if (step + 1 < steps) form_features<kPiece>(params, shared, stage, buffer);
      if (params.stores) {
        if (warpgroup::leader()) tma::wait_read<0>();  // the chunk's state has left
        warpgroup::sync();
      }
      warpgroup::mma_wait<0>(state, values);
      shared.ring.release(done);
    }
    if (params.adds != nullptr) {
      warpgroup::store_fragments(
          added_by<Traits>(params.adds, params, place, segment, segment.order), state);
    }
    if (segment.is_last(params, params.reverse)) store_state<Traits>(state, params, place);
  }

  // The features of a chunk's keys, as soon as they are there; to be published.
  template <int kPiece>
  __device__ __forceinline__ static void form_features(const StatesParams& params, Shared& shared,
                                                       const typename Ring::State& stage,
                                                       int buffer) {
    constexpr int kFirst = kPiece * Traits::kPieceColumns;
    const KeyTile& keys_smem = shared.keys_smem[stage.stage];
    typename Traits::Features features;
    shared.ring.wait(stage);
    if (params.reverse) {
      warpgroup::load_products<Traits::kDim>(features, keys_smem, kFirst, params.factors);
    } else {
      warpgroup::load_products<Traits::kDim>(features, keys_smem, kFirst);
    }
    warpgroup::store(shared.features_smem[buffer], features);
  }
};

template <typename Traits>
__device__ __forceinline__ void states(const StatesParams& params) {
  block::run<States<Traits>>(params);
}

}  // namespace tk::based_attention
