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

#include "kernels/linear_attention/walk.cuh"
#include "tk/tk.cuh"

namespace tk::linear_attention {

template <typename Traits>
struct States : StatesWalk<Traits> {
  using Walk = StatesWalk<Traits>;
  using T = typename Traits::T;
  using StateTile = SharedTile<T, kSlice, Traits::kKeyDim>;
  using typename Walk::State;

  struct Shared : Walk::Stages {
    StateTile state_smem[Traits::kConsumers];
  };
  static_assert(sizeof(Shared) + 1024 <=
                    states_shared_bytes(Traits::kKeyDim, {Traits::kConsumers, Traits::kStages}),
                "linear_attention.h's states_shared_bytes covers the kernel's shared memory");

  __device__ __forceinline__ static Segment segment_of(const StatesParams& params) {
    return Segment::of(params);
  }
  // The chunk of a step.
  __device__ __forceinline__ static int chunk_at(const Segment& segment, int step) {
    return Traits::kReverse ? segment.end - 1 - step : segment.first + step;
  }

  __device__ __forceinline__ static void init(const StatesParams&, Shared& shared) {
    shared.ring.init(4 * Traits::kConsumers);
  }

  __device__ __forceinline__ static void load(const StatesParams& params, Shared& shared) {
    Walk::template load_chunks<States>(params, shared, [](int) { return false; });
  }

  __device__ __forceinline__ static void compute(const StatesParams& params, Shared& shared,
                                                 int consumer) {
    const Place place = Place::of(params, Traits::kConsumers, consumer);
    const Segment segment = segment_of(params);
    const int slices = ceil_div(params.value_dim, kSlice);
    // Reverse, states of segments come in the order in which the gradient goes through them.
    const int order = Traits::kReverse ? segment.count - 1 - segment.index : segment.index;
    const Segment ordered{order, segment.count};
    State states[1];
    State& state = states[0];
    load_state(state, params, place, ordered);

    typename Walk::Ring::State stage;
    for (int step = 0; step < segment.end - segment.first; ++step, stage.advance()) {
      const int chunk = chunk_at(segment, step);
      if (begins_run(params, chunk, Traits::kReverse)) {
        const int runs = ceil_div(params.chunks, params.stored_every);
        const int matrix = stored_matrix(place.batch, chunk / params.stored_every, runs, place.head,
                                         params.num_heads, place.slice, slices);
        store_chunk_state(params, shared.state_smem[consumer], state, matrix * kSlice);
      }
      const ChunkGates<Traits::kFeatures>& gates = shared.gates[consumer][stage.stage];
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
    store_end(states, params, place, ordered);
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
