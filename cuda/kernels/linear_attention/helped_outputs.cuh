// out = scale S q + skip * v, and S at the ends of segments, for one slice or two that share keys.
//
// What outputs.cuh computes, with its parts on different warpgroups: for a chunk of tokens with
// gates D (gates.cuh), S being the state before it,
//   helper     P = q k^T * D for each slice; before and after, the gates of S and of what is added
//   consumers  S q^T diag(before) + v^T P^T, out;  S = total S + (diag(after) v)^T k
// (Yang et al. 2023, section 3; Dao and Gu 2024, section 6.)
// Grid: slices or pairs of them, segments, batch. A block walks its segment's chunks.
// Roles: a producer warp loads a ring of q, k, each slice's v and gates; the helper makes q k^T
// once for all slices and hands P over through two buffers, so that it is up to two chunks ahead of
// the consumers, each of which keeps S (64 x K, fp32) of its slice in registers. Budget at K = 128,
// 3 stages: 220 KB of shared memory for two slices, 160 KB for one; a consumer has 64 registers of
// S, 32 of its rounded copy, 32 of out, 32 of v and its weighted copy; the helper 32 of scores.
// Limit: memory; reading q, k, v and writing out.
#pragma once

#include "kernels/linear_attention/gates.cuh"
#include "kernels/linear_attention/walk.cuh"
#include "tk/tk.cuh"

namespace tk::linear_attention {

template <typename T_, int kKeyDim_, unsigned kFeatures_, int kStages_, int kSlices_>
struct HelpedOutputsTraits {
  using T = T_;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr unsigned kFeatures = kFeatures_;
  static constexpr int kStages = kStages_;
  static constexpr int kSlices = kSlices_;
  static_assert(kKeyDim <= kHelpedKeyDim, "a state fits in a consumer's registers");
  static_assert(kSlices == 1 || kSlices == 2, "one or two slices share their keys");
};

template <typename Traits>
struct HelpedOutputs {
  using T = typename Traits::T;
  static constexpr int kKeyDim = Traits::kKeyDim;
  static constexpr unsigned kFeatures = Traits::kFeatures;
  static constexpr bool kHasSkip = (kFeatures & kSkip) != 0;
  static constexpr int kSlices = Traits::kSlices;
  static constexpr int kBuffers = 2;
  static constexpr int kConsumers = kSlices + 1;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = kSlices == 1 ? 232 : 200;
  static constexpr int kHelperRegisters = kSlices == 1 ? 160 : 88;

  using KeyTile = SharedTile<T, kChunk, kKeyDim>;
  using ValueTile = SharedTile<T, kChunk, kSlice>;
  using WeightTile = SharedTile<T, kChunk, kChunk>;
  using SliceVec = SharedVec<float, kSlice>;
  using Ring = Pipeline<Traits::kStages>;
  using Scores = RegTile<float, 16, kChunk>;  // of a warp's tokens
  using Output = RegTile<float, 16, kChunk>;  // of a warp's columns of v
  using Values = RegTile<T, 16, kChunk>;
  using State = RegTile<float, 16, kKeyDim>;

  // What the helper hands over of a chunk and a slice.
  struct Handover {
    TokenVec before[kBuffers], after[kBuffers];
    Barrier full[kBuffers], empty[kBuffers];
  };
  using Turn = PipelineState<kBuffers>;

  struct Shared {
    KeyTile q_smem[Traits::kStages], k_smem[Traits::kStages];
    ValueTile v_smem[kSlices][Traits::kStages];
    WeightTile weights_smem[kSlices][kBuffers];
    ValueTile out_smem[kSlices][kBuffers];
    ChunkGates<kFeatures> gates[kSlices][Traits::kStages];
    Handover handover[kSlices];
    SliceVec skip[kSlices];
    Barrier skip_full;
    Ring ring;
  };
  static_assert(
      sizeof(Shared) + 1024 <= helped_outputs_shared_bytes(kKeyDim, Traits::kStages, kSlices),
      "linear_attention.h's helped_outputs_shared_bytes covers the kernel's shared memory");
  static constexpr int kStageBytes =
      2 * KeyTile::kBytes + kSlices * (ValueTile::kBytes + ChunkGates<kFeatures>::kBytes);

  __device__ __forceinline__ static void init(const OutputsParams&, Shared& shared) {
    shared.ring.init(4 * kConsumers);
    shared.skip_full.init(1);
#pragma unroll
    for (Handover& handover : shared.handover) {
#pragma unroll
      for (int i = 0; i < kBuffers; ++i) {
        handover.full[i].init(4);
        handover.empty[i].init(4);
      }
    }
  }

  __device__ __forceinline__ static void load(const OutputsParams& params, Shared& shared) {
    tma::prefetch(params.q);
    tma::prefetch(params.k);
    tma::prefetch(params.v);
    if constexpr (kHasSkip) load_skip(params, shared);
    const Segment segment = Segment::of(params);
    typename Ring::State state;
    for (int chunk = segment.first; chunk < segment.end; ++chunk, state.advance()) {
      shared.ring.acquire(state, kStageBytes);
      Barrier& full = shared.ring.full(state);
      const int token = chunk * kChunk;
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        const Place place = Place::of(params, kSlices, i);
        if (i == 0) {
          const int group = place.group(params);
          tma::load(shared.q_smem[state.stage], params.q, full, tma::Keep::kNormal, 0, token, group,
                    place.batch);
          tma::load(shared.k_smem[state.stage], params.k, full, tma::Keep::kNormal, 0, token, group,
                    place.batch);
        }
        // What L2 fetches with 64 values of a head is the next head's, which is read later.
        tma::load(shared.v_smem[i][state.stage], params.v, full, tma::Keep::kNormal,
                  place.slice * kSlice, token, place.head, place.batch);
        shared.gates[i][state.stage].load(params.gates, full, place.row(params), place.batch, chunk,
                                          params.chunks);
      }
    }
  }

  __device__ __forceinline__ static void load_skip(const OutputsParams& params, Shared& shared) {
    shared.skip_full.expect(kSlices * SliceVec::kBytes);
    const int slices = ceil_div(params.value_dim, kSlice);
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      const Place place = Place::of(params, kSlices, i);
      tma::load(shared.skip[i], params.skip + (place.head * slices + place.slice) * kSlice,
                shared.skip_full);
    }
  }

  // The helper: scores and gates, for all slices.
  __device__ __forceinline__ static void help(const OutputsParams& params, Shared& shared) {
    const Segment segment = Segment::of(params);
    typename Ring::State stage;
    Turn turn;
    for (int chunk = segment.first; chunk < segment.end; ++chunk, stage.advance(), turn.advance()) {
      shared.ring.wait(stage);
      Scores scores;
      warpgroup::mm_ABt(scores, shared.q_smem[stage.stage], shared.k_smem[stage.stage]);
      warpgroup::mma_commit();
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        Handover& handover = shared.handover[i];
        handover.empty[turn.stage].wait(turn.phase ^ 1);
        store_gates(shared.gates[i][stage.stage], handover, turn.stage);
      }
      warpgroup::mma_wait<0>(scores);
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        const ChunkGates<kFeatures>& gates = shared.gates[i][stage.stage];
        RegTile<T, 16, kChunk> weights;
        gates.apply(weights, scores, gates);
        warpgroup::store(shared.weights_smem[i][turn.stage], weights);
        publish_shared();
        warp::sync();
        if (warp::leader()) shared.handover[i].full[turn.stage].arrive();
      }
      shared.ring.release(stage);
    }
  }
  __device__ __forceinline__ static void store_gates(const ChunkGates<kFeatures>& gates,
                                                     Handover& handover, int buffer) {
    PerRow<16> rows, weights;
    const int quarter = warp::index() & 3;
    gates.before(rows);
    warp::store(part<16>(handover.before[buffer], quarter), rows);
    gates.after(rows);
    gates.load_weights(weights);
    warp::mul(rows, rows, weights);
    warp::store(part<16>(handover.after[buffer], quarter), rows);
  }

  __device__ __forceinline__ static void compute(const OutputsParams& params, Shared& shared,
                                                 int consumer) {
    const Place place = Place::of(params, kSlices, consumer);
    const Segment segment = Segment::of(params);
    State states[1];
    State& state = states[0];
    load_state(state, params, place, segment);
    RegTile<T, 16, kKeyDim> rounded;
    warp::convert(rounded, state);
    if constexpr (kHasSkip) shared.skip_full.wait(0);

    Handover& handover = shared.handover[consumer];
    typename Ring::State stage;
    Turn turn;
    for (int chunk = segment.first; chunk < segment.end; ++chunk, stage.advance(), turn.advance()) {
      Output out;
      Values v, values;
      shared.ring.wait(stage);
      warpgroup::mm_ABt(out, rounded, shared.q_smem[stage.stage]);
      warpgroup::mma_commit();
      warpgroup::load_transposed(v, shared.v_smem[consumer][stage.stage]);
      if (chunk != segment.first) send(params, shared, place, consumer, chunk - 1, turn.stage ^ 1);
      handover.full[turn.stage].wait(turn.phase);
      const TokenVec& before = handover.before[turn.stage];
      const auto times = [](float x, float y) { return x * y; };
      warp::map_cols(values, v, handover.after[turn.stage], times);
      const float total = load_element(before, kChunk - 1);
      warpgroup::mma_wait<0>(out, rounded);
      warp::map_cols(out, out, before, times);
      warpgroup::mma_ABt(out, v, shared.weights_smem[consumer][turn.stage]);
      warpgroup::mma_commit();
      warp::mul(state, state, total);
      warpgroup::mma_AB(state, values, shared.k_smem[stage.stage]);
      warpgroup::mma_commit();
      warpgroup::mma_wait<1>(out, v);
      warp::sync();
      if (warp::leader()) handover.empty[turn.stage].arrive();
      if (params.scale != 1) warp::mul(out, out, params.scale);
      if constexpr (kHasSkip) add_skip(out, v, shared.skip[consumer]);
      warpgroup::store_transposed(shared.out_smem[consumer][turn.stage], out);
      warpgroup::mma_wait<0>(state, values);
      shared.ring.release(stage);
      warp::convert(rounded, state);
    }
    send(params, shared, place, consumer, segment.end - 1, turn.stage ^ 1);
    store_end(states, params, place, segment);
    if (warpgroup::leader()) tma::wait_read<0>();
  }

  // A chunk's out leaves. Of the tiles, the other one is free then: its out has left.
  __device__ __forceinline__ static void send(const OutputsParams& params, Shared& shared,
                                              const Place& place, int consumer, int chunk,
                                              int tile) {
    publish_shared();
    if (warpgroup::leader()) tma::wait_read<0>();
    warpgroup::sync();
    if (!warpgroup::leader()) return;
    tma::store(params.out, shared.out_smem[consumer][tile], place.slice * kSlice, chunk * kChunk,
               place.head, place.batch);
    tma::commit();
  }
};

template <typename Traits>
__device__ __forceinline__ void helped_outputs(const OutputsParams& params) {
  block::run<HelpedOutputs<Traits>>(params);
}

}  // namespace tk::linear_attention
