// The state at the starts of runs of chunks, and at the ends of segments; and backwards, the
// state's gradient.
//
//   S <- total S + (diag(w * after) v)^T k           forward, through the chunks of a segment
//   dS <- total dS + (diag(scale * before) dout)^T q  reverse, back through them
//
// with the gates of a chunk (gates.cuh). Stored, and rounded to the type of products, are S
// before each run of chunks and dS after it.
// Grid: kConsumers slices of 64 values, segments, batch. A block walks its segment's chunks.
// Roles: a producer warp loads a ring of keys and each consumer's values and gates; a consumer
// warpgroup keeps the state (64 x K, fp32) of its slice in registers, and a copy on its way out.
// Budget at K = 128, 2 consumers, 3 stages: 134 KB of shared memory; 64 registers of state a
// thread. Limit: memory: reading keys and values, and 2 K bytes of states for each 64-token value
// column.
#pragma once

#include "kernels/linear_attention/gates.cuh"
#include "kernels/linear_attention/walk.cuh"
#include "tk/tk.cuh"

namespace tk::linear_attention {

template <typename T_, int kKeyDim_, bool kReverse_, unsigned kFeatures_, int kConsumers_,
          int kStages_>
struct StatesTraits {
  using T = T_;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr bool kReverse = kReverse_;
  static constexpr unsigned kFeatures = kFeatures_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kStages = kStages_;
  static_assert(kConsumers == 1 || kConsumers == 2, "one or two slices share their keys");
  static_assert((kFeatures & kSkip) == 0, "what skips the state has no part in it");
  static_assert(!kReverse || (kFeatures & kWeights) == 0, "gradients of out have no weights");
};

template <typename Traits>
struct States {
  using T = typename Traits::T;
  static constexpr int kKeyDim = Traits::kKeyDim;
  static constexpr unsigned kFeatures = Traits::kFeatures;
  static constexpr int kConsumers = Traits::kConsumers;
  static constexpr int kResidentBlocks = walk_blocks(kKeyDim, kConsumers);
  static constexpr int kProducerRegisters = kConsumers == 1 && kResidentBlocks == 1 ? 56 : 24;
  static constexpr int kConsumerRegisters = kResidentBlocks == 2 ? 232 : 240;

  using KeyTile = SharedTile<T, kChunk, kKeyDim>;
  using ValueTile = SharedTile<T, kChunk, kSlice>;
  using StateTile = SharedTile<T, kSlice, kKeyDim>;
  using Ring = Pipeline<Traits::kStages>;
  using State = RegTile<float, 16, kKeyDim>;

  struct Shared {
    KeyTile keys_smem[Traits::kStages];
    ValueTile values_smem[kConsumers][Traits::kStages];
    StateTile state_smem[kConsumers];
    ChunkGates<kFeatures> gates[kConsumers][Traits::kStages];
    Ring ring;
  };
  static_assert(sizeof(Shared) + 1024 <=
                    states_shared_bytes(kKeyDim, {kConsumers, Traits::kStages}),
                "linear_attention.h's states_shared_bytes covers the kernel's shared memory");
  static constexpr int kStageBytes =
      KeyTile::kBytes + kConsumers * (ValueTile::kBytes + ChunkGates<kFeatures>::kBytes);

  // The chunk of a step.
  __device__ __forceinline__ static int chunk_at(const Segment& segment, int step) {
    return Traits::kReverse ? segment.end - 1 - step : segment.first + step;
  }

  // Whether the walk comes to a run of chunks with this one. The last run may be shorter.
  __device__ __forceinline__ static bool begins_run(const StatesParams& params, int chunk) {
    if (!Traits::kReverse) return chunk % params.stored_every == 0;
    return (chunk + 1) % params.stored_every == 0 || chunk == params.chunks - 1;
  }

  __device__ __forceinline__ static void init(const StatesParams&, Shared& shared) {
    shared.ring.init(4 * kConsumers);
  }

  __device__ __forceinline__ static void load(const StatesParams& params, Shared& shared) {
    tma::prefetch(params.keys);
    tma::prefetch(params.values);
    const Segment segment = Segment::of(params);
    typename Ring::State state;
    for (int step = 0; step < segment.end - segment.first; ++step, state.advance()) {
      const int chunk = chunk_at(segment, step);
      shared.ring.acquire(state, kStageBytes);
      Barrier& full = shared.ring.full(state);
#pragma unroll
      for (int i = 0; i < kConsumers; ++i) {
        const Place place = Place::of(params, kConsumers, i);
        if (i == 0) {
          tma::load(shared.keys_smem[state.stage], params.keys, full, tma::Keep::kNormal, 0,
                    chunk * kChunk, place.group(params), place.batch);
        }
        tma::load(shared.values_smem[i][state.stage], params.values, full, tma::Keep::kNormal,
                  place.slice * kSlice, chunk * kChunk, place.head, place.batch);
        shared.gates[i][state.stage].load(params.gates, full, place.row(params), place.batch, chunk,
                                          params.chunks);
      }
    }
  }

  __device__ __forceinline__ static void compute(const StatesParams& params, Shared& shared,
                                                 int consumer) {
    const Place place = Place::of(params, kConsumers, consumer);
    const Segment segment = Segment::of(params);
    const int slices = ceil_div(params.value_dim, kSlice);
    State state;
    load_state(state, params, place, segment);

    typename Ring::State stage;
    for (int step = 0; step < segment.end - segment.first; ++step, stage.advance()) {
      const int chunk = chunk_at(segment, step);
      if (begins_run(params, chunk)) {
        const int runs = ceil_div(params.chunks, params.stored_every);
        const int matrix = place.row(params) * runs + chunk / params.stored_every;
        store_chunk_state(params, shared.state_smem[consumer], state,
                          (matrix * slices + place.slice) * kSlice);
      }
      const ChunkGates<kFeatures>& gates = shared.gates[consumer][stage.stage];
      shared.ring.wait(stage);
      if constexpr (Traits::kReverse) {
        step_back(state, gates, shared.keys_smem[stage.stage],
                  shared.values_smem[consumer][stage.stage], params.scale);
      } else {
        step_on(state, gates, shared.keys_smem[stage.stage],
                shared.values_smem[consumer][stage.stage]);
      }
      shared.ring.release(stage);
    }
    store_state(state, params, place, segment);
    if (warpgroup::leader()) tma::wait_read<0>();
  }

  __device__ __forceinline__ static void store_chunk_state(const StatesParams& params,
                                                           const StateTile& state_smem,
                                                           const State& state, int row) {
    if (warpgroup::leader()) tma::wait_read<0>();  // the last one has left
    warpgroup::sync();
    warpgroup::store(state_smem, state);
    publish_shared();
    warpgroup::sync();
    if (warpgroup::leader()) {
      tma::store(params.stored, state_smem, 0, row);
      tma::commit();
    }
  }
};

template <typename Traits>
__device__ __forceinline__ void states(const StatesParams& params) {
  block::run<States<Traits>>(params);
}

}  // namespace tk::linear_attention
