// out = scale S q + skip * v, and S at the ends of segments: linear attention's forward pass.
//
// For a chunk of tokens with gates D (gates.cuh), S being the state before it:
//   out = scale ((q k^T * D) v + diag(before) q S^T) + skip * v
//   S   = total S + (diag(after) v)^T k
// (Yang et al. 2023, section 3; Dao and Gu 2024, section 6.)
// Grid: kConsumers slices of 64 values, segments, batch. A block walks its segment's chunks.
// Roles: a producer warp loads a ring of q, k and each consumer's v and gates; a consumer warpgroup
// keeps S (64 x K, fp32) of its slice in registers, and for q S^T a rounded copy in shared memory.
// Consumers share q and k: slices of one head, or heads of one group. While one waits for its
// products, the other computes.
// Budget at K = 128, 2 consumers, 2 stages: 147 KB of shared memory; 64 registers of S, 32 each of
// scores and out a thread. Limit: memory; reading q, k, v and writing out, and beside it shared
// memory's bandwidth.
#pragma once

#include "kernels/linear_attention/gates.cuh"
#include "kernels/linear_attention/walk.cuh"
#include "tk/tk.cuh"

namespace tk::linear_attention {

template <typename T_, int kKeyDim_, unsigned kFeatures_, int kConsumers_, int kStages_>
struct OutputsTraits {
  using T = T_;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr unsigned kFeatures = kFeatures_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kStages = kStages_;
  static_assert(kConsumers == 1 || kConsumers == 2, "one or two slices share their keys");
};

template <typename Traits>
struct Outputs {
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
  using SliceVec = SharedVec<float, kSlice>;
  using Ring = Pipeline<Traits::kStages>;
  using Scores = RegTile<float, 16, kChunk>;
  using Output = RegTile<float, 16, kSlice>;
  using State = RegTile<float, 16, kKeyDim>;

  struct Shared {
    KeyTile q_smem[Traits::kStages], k_smem[Traits::kStages];
    ValueTile v_smem[kConsumers][Traits::kStages];
    StateTile state_smem[kConsumers];
    ValueTile out_smem[kConsumers];
    ChunkGates<kFeatures> gates[kConsumers][Traits::kStages];
    SliceVec skip[kConsumers];
    Barrier skip_full;
    Ring ring;
  };
  static_assert(sizeof(Shared) + 1024 <=
                    outputs_shared_bytes(kKeyDim, {kConsumers, Traits::kStages}),
                "linear_attention.h's outputs_shared_bytes covers the kernel's shared memory");
  static constexpr int kStageBytes =
      2 * KeyTile::kBytes + kConsumers * (ValueTile::kBytes + ChunkGates<kFeatures>::kBytes);

  __device__ __forceinline__ static void init(const OutputsParams&, Shared& shared) {
    shared.ring.init(4 * kConsumers);
    shared.skip_full.init(1);
  }

  __device__ __forceinline__ static void load(const OutputsParams& params, Shared& shared) {
    tma::prefetch(params.q);
    tma::prefetch(params.k);
    tma::prefetch(params.v);
    if constexpr ((kFeatures & kSkip) != 0) load_skip(params, shared);
    const Segment segment = Segment::of(params);
    typename Ring::State state;
    for (int chunk = segment.first; chunk < segment.end; ++chunk, state.advance()) {
      shared.ring.acquire(state, kStageBytes);
      Barrier& full = shared.ring.full(state);
      const int token = chunk * kChunk;
#pragma unroll
      for (int i = 0; i < kConsumers; ++i) {
        const Place place = Place::of(params, kConsumers, i);
        if (i == 0) {
          const int group = place.group(params);
          tma::load(shared.q_smem[state.stage], params.q, full, tma::Keep::kNormal, 0, token, group,
                    place.batch);
          tma::load(shared.k_smem[state.stage], params.k, full, tma::Keep::kNormal, 0, token, group,
                    place.batch);
        }
        tma::load(shared.v_smem[i][state.stage], params.v, full, tma::Keep::kBriefly,
                  place.slice * kSlice, token, place.head, place.batch);
        shared.gates[i][state.stage].load(params.gates, full, place.row(params), place.batch, chunk,
                                          params.chunks);
      }
    }
  }

  __device__ __forceinline__ static void load_skip(const OutputsParams& params, Shared& shared) {
    shared.skip_full.expect(kConsumers * SliceVec::kBytes);
    const int slices = ceil_div(params.value_dim, kSlice);
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) {
      const Place place = Place::of(params, kConsumers, i);
      tma::load(shared.skip[i], params.skip + (place.head * slices + place.slice) * kSlice,
                shared.skip_full);
    }
  }

  __device__ __forceinline__ static void compute(const OutputsParams& params, Shared& shared,
                                                 int consumer) {
    const Place place = Place::of(params, kConsumers, consumer);
    const Segment segment = Segment::of(params);
    const StateTile& state_smem = shared.state_smem[consumer];
    const ValueTile& out_smem = shared.out_smem[consumer];
    State state;
    load_state(state, params, place, segment);
    share_state(state_smem, state);
    if constexpr ((kFeatures & kSkip) != 0) shared.skip_full.wait(0);

    typename Ring::State stage;
    for (int chunk = segment.first; chunk < segment.end; ++chunk, stage.advance()) {
      const KeyTile& q_smem = shared.q_smem[stage.stage];
      const KeyTile& k_smem = shared.k_smem[stage.stage];
      const ValueTile& v_smem = shared.v_smem[consumer][stage.stage];
      const ChunkGates<kFeatures>& gates = shared.gates[consumer][stage.stage];
      Scores scores;
      Output out;
      shared.ring.wait(stage);
      warpgroup::mm_ABt(scores, q_smem, k_smem);
      warpgroup::mma_commit();
      warpgroup::mm_ABt(out, q_smem, state_smem);
      warpgroup::mma_commit();

      warpgroup::mma_wait<1>(scores);
      RegTile<T, 16, kChunk> weights;
      gates.apply(weights, scores);
      PerRow<16> before;
      gates.before(before);
      warpgroup::mma_wait<0>(out);
      warp::mul_rows(out, out, before);
      warpgroup::mma_AB(out, weights, v_smem);
      warpgroup::mma_commit();

      RegTile<T, 16, kChunk> values;
      issue_step_on(state, values, gates, k_smem, v_smem);

      warpgroup::mma_wait<1>(out, weights);
      warp::mul(out, out, params.scale);
      if constexpr ((kFeatures & kSkip) != 0) add_skip(out, v_smem, shared.skip[consumer]);
      warpgroup::store(out_smem, out);
      publish_shared();
      warpgroup::sync();
      if (warpgroup::leader()) {
        tma::store(params.out, out_smem, place.slice * kSlice, chunk * kChunk, place.head,
                   place.batch);
        tma::commit();
      }
      warpgroup::mma_wait<0>(state, values);
      shared.ring.release(stage);
      share_state(state_smem, state);
    }
    store_state(state, params, place, segment);
    if (warpgroup::leader()) tma::wait_read<0>();
  }

  // The rounded copy that q S^T reads.
  __device__ __forceinline__ static void share_state(const StateTile& state_smem,
                                                     const State& state) {
    warpgroup::store(state_smem, state);
    publish_shared();
    if (warpgroup::leader()) tma::wait_read<0>();  // the chunk's out has left
    warpgroup::sync();
  }

  __device__ __forceinline__ static void add_skip(Output& out, const ValueTile& v_smem,
                                                  const SliceVec& skip) {
    RegTile<T, 16, kSlice> v;
    warpgroup::load(v, v_smem);
    warp::zip_cols(out, out, v, skip, [](float x, float y, float d) { return x + y * d; });
  }
};

template <typename Traits>
__device__ __forceinline__ void outputs(const OutputsParams& params) {
  block::run<Outputs<Traits>>(params);
}

}  // namespace tk::linear_attention
