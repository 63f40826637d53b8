// Which slice of which head a consumer has, and which chunks: what kernels share that walk through
// a sequence.
#pragma once

#include "kernels/linear_attention/gates.cuh"
#include "tk/tk.cuh"

namespace tk::linear_attention {

// A consumer's place. Slices are numbered through all heads; those of a block share their keys.
struct Place {
  int head, slice, batch;

  template <typename Params>
  __device__ __forceinline__ static Place of(const Params& params, int consumers, int consumer) {
    const int slices = ceil_div(params.value_dim, kSlice);
    const int index = grid::block_x() * consumers + consumer;
    return {index / slices, index % slices, grid::block_z()};
  }
  // The head of q and k.
  template <typename Params>
  __device__ __forceinline__ int group(const Params& params) const {
    return head / (params.num_heads / params.num_groups);
  }
  template <typename Params>
  __device__ __forceinline__ int row(const Params& params) const {
    return batch * params.num_heads + head;
  }
};

// The block's segment of the sequence.
struct Segment {
  int index, count;
  int first, end;  // chunks

  template <typename Params>
  __device__ __forceinline__ static Segment of(const Params& params) {
    return at(params, grid::block_y());
  }
  template <typename Params>
  __device__ __forceinline__ static Segment at(const Params& params, int index) {
    const int first = index * params.chunks_of_segment;
    return {index, ceil_div(params.chunks, params.chunks_of_segment), first,
            min(first + params.chunks_of_segment, params.chunks)};
  }
};

// A slice's rows of the state of a segment, [B, H, segments, V, K], as far as they are there.
template <typename T, typename Params>
__device__ __forceinline__ GlobalView<T> state_rows(T* states, const Params& params,
                                                    const Place& place, const Segment& segment) {
  const int first = place.slice * kSlice;
  const int64 state = static_cast<int64>(place.row(params)) * segment.count + segment.index;
  return {states + (state * params.value_dim + first) * params.key_dim,
          min(params.value_dim - first, kSlice), params.key_dim, params.key_dim};
}

// Starts from what is there, or from zero. A state may be a part of the columns.
template <typename State, typename Params>
__device__ __forceinline__ void load_state(State& state, const Params& params, const Place& place,
                                           const Segment& segment, int first_col = 0) {
  if (params.from == nullptr) {
    warp::zero(state);
  } else {
    warpgroup::load(state, state_rows(params.from, params, place, segment), 0, first_col);
  }
}
template <typename State, typename Params>
__device__ __forceinline__ void store_state(const State& state, const Params& params,
                                            const Place& place, const Segment& segment,
                                            int first_col = 0) {
  if (params.to != nullptr) {
    warpgroup::store(state_rows(params.to, params, place, segment), state, 0, first_col);
  }
}

// -- Kernels of the state alone -------------------------------------------------------------------

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

// What segment_sums.cuh and states.cuh share: a ring of keys and of each consumer's values and
// gates, which a producer warp fills with the chunks that Kernel::chunk_at names, one for each step
// through Kernel::segment_of.
template <typename Traits>
struct StatesWalk {
  using T = typename Traits::T;
  static constexpr int kKeyDim = Traits::kKeyDim;
  static constexpr unsigned kFeatures = Traits::kFeatures;
  static constexpr int kConsumers = Traits::kConsumers;
  static constexpr int kResidentBlocks = walk_blocks(kKeyDim, kConsumers);
  static constexpr int kProducerRegisters = kConsumers == 1 && kResidentBlocks == 1 ? 56 : 24;
  static constexpr int kConsumerRegisters = kResidentBlocks == 2 ? 232 : 240;

  using KeyTile = SharedTile<T, kChunk, kKeyDim>;
  using ValueTile = SharedTile<T, kChunk, kSlice>;
  using Ring = Pipeline<Traits::kStages>;
  using State = RegTile<float, 16, kKeyDim>;

  struct Stages {
    KeyTile keys_smem[Traits::kStages];
    ValueTile values_smem[kConsumers][Traits::kStages];
    ChunkGates<kFeatures> gates[kConsumers][Traits::kStages];
    Ring ring;
  };
  static constexpr int kStageBytes =
      KeyTile::kBytes + kConsumers * (ValueTile::kBytes + ChunkGates<kFeatures>::kBytes);

  template <typename Kernel, typename Params>
  __device__ __forceinline__ static void load_chunks(const Params& params, Stages& stages) {
    tma::prefetch(params.keys);
    tma::prefetch(params.values);
    const Segment segment = Kernel::segment_of(params);
    typename Ring::State state;
    for (int step = 0; step < segment.end - segment.first; ++step, state.advance()) {
      const int chunk = Kernel::chunk_at(segment, step);
      stages.ring.acquire(state, kStageBytes);
      Barrier& full = stages.ring.full(state);
#pragma unroll
      for (int i = 0; i < kConsumers; ++i) {
        const Place place = Place::of(params, kConsumers, i);
        if (i == 0) {
          tma::load(stages.keys_smem[state.stage], params.keys, full, tma::Keep::kNormal, 0,
                    chunk * kChunk, place.group(params), place.batch);
        }
        tma::load(stages.values_smem[i][state.stage], params.values, full, tma::Keep::kNormal,
                  place.slice * kSlice, chunk * kChunk, place.head, place.batch);
        stages.gates[i][state.stage].load(params.gates, full, place.row(params), place.batch, chunk,
                                          params.chunks);
      }
    }
  }
};

// out += skip * v, of a warpgroup's 64 columns of v, which are its rows.
template <typename Output, typename Values>
__device__ __forceinline__ void add_skip(Output& out, const Values& v,
                                         const SharedVec<float, kSlice>& skip_smem) {
  PerRow<16> skip;
  warpgroup::load(skip, skip_smem);
  Output skipped;
  warp::convert(skipped, v);
  warp::mul_rows(skipped, skipped, skip);
  warp::add(out, out, skipped);
}

}  // namespace tk::linear_attention
