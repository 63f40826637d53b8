// What a segment adds to the state: S at its end if it starts from zero; and backwards, the state's
// gradient at its start if nothing comes after it.
//
//   sum over its tokens j of w_j (what is left of j at the end) v_j k_j^T         forward
//   sum over its tokens i of scale (what is left of its start at i) dout_i q_i^T  reverse
//
// with the gates of a chunk (gates.cuh) and what is left of each chunk's sum, a number. Forward it
// goes from the segment's last chunk to the first, reverse from the first to the last: against the
// way of the kernel that comes after it, so that this one begins with what is still in L2. And a
// state that only grows is never scaled.
// Grid: kConsumers slices of 64 values, segments, or all but the last (reverse: the first), batch.
// Roles: a producer warp loads a ring of keys and each consumer's values and gates; a consumer
// warpgroup keeps the sum (64 x K, fp32) of its slice in registers.
// Budget: that of states.cuh without the copy on its way out. Limit: reading keys and values.
#pragma once

#include "kernels/linear_attention/walk.cuh"
#include "tk/tk.cuh"

namespace tk::linear_attention {

template <typename Traits>
struct SegmentSums : StatesWalk<Traits> {
  using Walk = StatesWalk<Traits>;
  using T = typename Traits::T;
  using Shared = typename Walk::Stages;
  static_assert(sizeof(Shared) + 1024 <=
                    segment_sums_shared_bytes(Traits::kKeyDim,
                                              {Traits::kConsumers, Traits::kStages}),
                "linear_attention.h's segment_sums_shared_bytes covers the shared memory");

  __device__ __forceinline__ static Segment segment_of(const SegmentSumsParams& params) {
    return Segment::at(params, grid::block_y() + (Traits::kReverse ? params.left_out : 0));
  }
  // The chunk of a step.
  __device__ __forceinline__ static int chunk_at(const Segment& segment, int step) {
    return Traits::kReverse ? segment.first + step : segment.end - 1 - step;
  }

  __device__ __forceinline__ static void init(const SegmentSumsParams&, Shared& shared) {
    shared.ring.init(4 * Traits::kConsumers);
  }

  __device__ __forceinline__ static void load(const SegmentSumsParams& params, Shared& shared) {
    Walk::template load_chunks<SegmentSums>(params, shared);
  }

  __device__ __forceinline__ static void compute(const SegmentSumsParams& params, Shared& shared,
                                                 int consumer) {
    const Place place = Place::of(params, Traits::kConsumers, consumer);
    const Segment segment = segment_of(params);
    typename Walk::State sum;
    warp::zero(sum);
    float left = 1;  // of a chunk's own sum
    typename Walk::Ring::State stage;
    for (int step = 0; step < segment.end - segment.first; ++step, stage.advance()) {
      const ChunkGates<Traits::kFeatures>& gates = shared.gates[consumer][stage.stage];
      RegTile<T, 16, kChunk> values;  // a row for each column of values
      shared.ring.wait(stage);
      warpgroup::load_transposed(values, shared.values_smem[consumer][stage.stage]);
      if constexpr (Traits::kReverse) {
        gates.scale_cols_before(values, left * params.scale);
      } else {
        gates.scale_cols_after(values, left);
      }
      left *= gates.total();
      warpgroup::mma_AB(sum, values, shared.keys_smem[stage.stage]);
      warpgroup::mma_commit();
      warpgroup::mma_wait<0>(sum, values);
      shared.ring.release(stage);
    }
    const int count = segment.count - params.left_out;
    const int order = Traits::kReverse ? count - 1 - grid::block_y() : grid::block_y();
    store_state(sum, params, place, Segment{order, count});
  }
};

template <typename Traits>
__device__ __forceinline__ void segment_sums(const SegmentSumsParams& params) {
  block::run<SegmentSums<Traits>>(params);
}

}  // namespace tk::linear_attention
