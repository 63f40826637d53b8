// What a segment adds to the state: S at its end if it starts from zero; and backwards, the state's
// gradient at its start if nothing comes after it.
//
//   sum over its tokens j of w_j (what is left of j at the end) v_j k_j^T         forward
//   sum over its tokens i of scale (what is left of its start at i) dout_i q_i^T  reverse
//
// with the gates of a chunk (gates.cuh) and what is left of each chunk's sum, a number. Forward it
// goes from the segment's last chunk to the first, reverse from the first to the last: against the
// way of the kernel that comes after it, so that this one begins with what is still in L2. A state
// that only grows is never scaled. And where nothing is left in float32, of any slice of the block,
// what is further away would add zeros: the walk ends. It would add what is no number too, which
// spread.cuh sees to. What is left of the state before the segment is stored beside the sum.
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

  // What is left of the sum of the next chunk, in this slice and in the other one of the block.
  struct Left {
    float here = 1, there = Traits::kConsumers == 2 ? 1 : 0;

    // `total(consumer)` is what is left after a chunk.
    template <typename F>
    __device__ __forceinline__ void step(int consumer, F&& total) {
      here *= total(consumer);
      if constexpr (Traits::kConsumers == 2) there *= total(consumer ^ 1);
    }
    // NaN is not nothing.
    __device__ __forceinline__ bool is_nothing() const { return here == 0 && there == 0; }
  };

  __device__ __forceinline__ static void load(const SegmentSumsParams& params, Shared& shared) {
    Left left;
    Walk::template load_chunks<SegmentSums>(params, shared, [&](int chunk) {
      left.step(0, [&](int consumer) {
        const Place place = Place::of(params, Traits::kConsumers, consumer);
        return ChunkGates<Traits::kFeatures>::load_total(params.gates, place.row(params),
                                                         place.batch, chunk, params.chunks);
      });
      return left.is_nothing();
    });
  }

  __device__ __forceinline__ static void compute(const SegmentSumsParams& params, Shared& shared,
                                                 int consumer) {
    const Place place = Place::of(params, Traits::kConsumers, consumer);
    const Segment segment = segment_of(params);
    typename Walk::State sum;
    warp::zero(sum);
    Left left;
    typename Walk::Ring::State stage;
    for (int step = 0; step < segment.end - segment.first; ++step, stage.advance()) {
      const ChunkGates<Traits::kFeatures>& gates = shared.gates[consumer][stage.stage];
      RegTile<T, 16, kChunk> values;  // a row for each column of values
      shared.ring.wait(stage);
      warpgroup::load_transposed(values, shared.values_smem[consumer][stage.stage]);
      if constexpr (Traits::kReverse) {
        gates.scale_cols_before(values, left.here * params.scale);
      } else {
        gates.scale_cols_after(values, left.here);
      }
      left.step(consumer, [&](int i) { return shared.gates[i][stage.stage].total(); });
      warpgroup::mma_AB(sum, values, shared.keys_smem[stage.stage]);
      warpgroup::mma_commit();
      warpgroup::mma_wait<0>(sum, values);
      shared.ring.release(stage);
      if (left.is_nothing()) break;
    }
    const int count = segment.count - params.left_out;
    const int order = Traits::kReverse ? count - 1 - grid::block_y() : grid::block_y();
    warpgroup::store(state_rows(params.to, params, place, Segment{order, count}), sum, 0, 0);
    if (place.slice != 0) return;
    PerRow<16> kept;
    warp::fill(kept, left.here);
    float* const to = params.kept + static_cast<int64>(place.row(params)) * count + order;
    warpgroup::store(GlobalVec<float>{to, 1}, kept, 0);
  }
};

template <typename Traits>
__device__ __forceinline__ void segment_sums(const SegmentSumsParams& params) {
  block::run<SegmentSums<Traits>>(params);
}

}  // namespace tk::linear_attention
