// Which head and which chunks a block has: what sums.cuh and outputs.cuh share.
#pragma once

#include "kernels/hedgehog_attention/features.cuh"
#include "tk/tk.cuh"

namespace tk::hedgehog_attention {

// Chunks of a segment.
struct Segment {
  int index, count;
  int first, end;

  template <typename Params>
  __device__ __forceinline__ static Segment of(const Params& params) {
    const int index = grid::block_y();
    const int first = index * params.chunks_of_segment;
    return {index, ceil_div(params.chunks, params.chunks_of_segment), first,
            min(first + params.chunks_of_segment, params.chunks)};
  }
};

// A consumer's rows of one of many states [V, kFeatures], as far as they are there.
template <typename T>
__device__ __forceinline__ GlobalView<T> state_rows(T* states, int64 index, int value_dim,
                                                    int consumer) {
  const int first = consumer * kSlice;
  return {states + (index * value_dim + first) * kFeatures, min(value_dim - first, kSlice),
          kFeatures, kFeatures};
}

// The consumer's signs of features: with two consumers each has one.
template <int kConsumers>
__device__ __forceinline__ int sign_index(int consumer, int i) {
  return kConsumers == 2 ? consumer : i;
}

// The sum of `count` states and normalizers from number `first` on: S in the registers of each
// consumer, z in shared memory, of which each has its signs.
template <int kConsumers, typename State>
__device__ __forceinline__ void sum_states(State& state, RunningNormalizer& normalizer,
                                           const float* states, const float* normalizers,
                                           int64 first, int count, int value_dim, int consumer) {
  constexpr int kSigns = 2 / kConsumers;
  const int warp = warp::index() & 3;
  PerRow<16> z[kSigns];
  warp::zero(state);
#pragma unroll
  for (int i = 0; i < kSigns; ++i) warp::zero(z[i]);
#pragma unroll 1
  for (int64 index = first; index < first + count; ++index) {
    State added;
    warp::load_pairs(added, state_rows(states, index, value_dim, consumer), 16 * warp, 0);
#pragma unroll
    for (int i = 0; i < kSigns; ++i) {
      const int sign = sign_index<kConsumers>(consumer, i);
      PerRow<16> more;
      warpgroup::load(more,
                      GlobalVec<const float>{normalizers + index * kFeatures + sign * kMap, kMap},
                      0, 0.0f);
      warp::zip(z[i], z[i], more, [](float x, float y) { return x + y; });
    }
    warp::add(state, state, added);
  }
#pragma unroll
  for (int i = 0; i < kSigns; ++i) {
    warp::store(part<16>(normalizer.total[sign_index<kConsumers>(consumer, i)], warp), z[i]);
  }
}

// Where both consumers meet.
enum Meeting : int { kFeaturesFree = kFirstKernelBarrier, kFeaturesReady, kWeightsReady };
template <int kConsumers>
__device__ __forceinline__ void meet(Meeting meeting) {
  if constexpr (kConsumers == 1) {
    warpgroup::sync();
  } else {
    named_sync(meeting, 128 * kConsumers);
  }
}

}  // namespace tk::hedgehog_attention
