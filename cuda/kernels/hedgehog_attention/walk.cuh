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
