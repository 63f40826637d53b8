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

// Whether a walk comes to a run of chunks, whose state is stored, with this one. The last run may
// be shorter.
template <typename Params>
__device__ __forceinline__ bool begins_run(const Params& params, int chunk, bool reverse) {
  if (!reverse) return chunk % params.stored_every == 0;
  return (chunk + 1) % params.stored_every == 0 || chunk == params.chunks - 1;
}

// A slice's rows of the state of a segment, [B, H, segments, V, K], as far as they are there.
template <typename T, typename Params>
__device__ __forceinline__ GlobalView<T> state_rows(T* states, const Params& params,
                                                    const Place& place, const Segment& segment) {
  const int first = place.slice * kSlice;
  const int64 state = static_cast<int64>(place.row(params)) * segment.count + segment.index;
  return {states + (state * params.value_dim + first) * params.key_dim,
          min(params.value_dim - first, kSlice), params.key_dim, params.key_dim};
}

// Which mark is that of a warp's rows of a slice after a segment.
template <typename Params>
__device__ __forceinline__ int64 mark_of(const Params& params, const Place& place,
                                         const Segment& segment) {
  const int64 state = static_cast<int64>(place.row(params)) * segment.count + segment.index;
  return (state * ceil_div(params.value_dim, kSlice) + place.slice) * (kSlice / kMarkedRows) +
         (warp::index() & 3);
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

// What times zero is zero for finite numbers alone.
struct TimesZero {
  __device__ __forceinline__ float operator()(float x, float y) const {
    return math::fma(x, 0.0f, y * 0.0f);
  }
};

// The state after a segment, in parts of so many columns each: what is asked for of it, and its
// mark (StatesParams).
template <int kParts, typename State, typename Params>
__device__ __forceinline__ void store_end(const State (&state)[kParts], const Params& params,
                                          const Place& place, const Segment& segment) {
  if (params.to == nullptr) return;
  bool is_stored = true;
  if (params.marks != nullptr) {
    PerRow<16> rows;
    warp::zero(rows);
#pragma unroll
    for (int i = 0; i < kParts; ++i) warp::fold_rows(rows, state[i], TimesZero());
    const bool is_marked = warp::any_row(rows, rows, [](float x, float) { return !(x == 0.0f); });
    warp::fill(rows, is_marked ? 1.0f : 0.0f);
    warp::store(GlobalVec<float>{params.marks + mark_of(params, place, segment), 1}, rows, 0);
    is_stored = is_marked || segment.index == segment.count - 1;
  }
  if (!is_stored) return;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    warpgroup::store(state_rows(params.to, params, place, segment), state[i], 0, i * State::kCols);
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
// through Kernel::segment_of, until is_last(chunk) says that one is the last.
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

  template <typename Kernel, typename Params, typename F>
  __device__ __forceinline__ static void load_chunks(const Params& params, Stages& stages,
                                                     F&& is_last) {
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
      if (is_last(chunk)) break;
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
