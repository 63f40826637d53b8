// out = scale S q + skip * v, and S at the ends of segments: linear attention's forward pass.
//
// For a chunk of tokens with gates D (gates.cuh), S being the state before it:
//   out^T = scale (v^T (q k^T * D)^T + S q^T diag(before)) + skip * v^T
//   S     = total S + (diag(after) v)^T k
// (Yang et al. 2023, section 3; Dao and Gu 2024, section 6.)
// Grid: slices of 64 values, segments, batch. A block walks its segment's chunks; two share a
// multiprocessor where K allows. With a helper, helped_outputs.cuh's.
// Roles: a producer warp loads a ring of q, k, v and gates; the consumer warpgroup keeps S (64 x K,
// fp32) of its slice in registers, where S q^T takes it from: out is computed transposed, so that
// only the weights q k^T * D pass through shared memory. Out leaves with the barrier that shares
// the next chunk's weights.
// Budget at K = 128, 2 stages: 100 KB of shared memory; 64 registers of S, 32 of its rounded copy,
// 32 each of scores and out a thread. Limit: memory; reading q, k, v and writing out, and beside it
// shared memory's bandwidth.
#pragma once

#include "kernels/linear_attention/gates.cuh"
#include "kernels/linear_attention/walk.cuh"
#include "tk/tk.cuh"

namespace tk::linear_attention {

template <typename T_, int kKeyDim_, unsigned kFeatures_, int kStages_>
struct OutputsTraits {
  using T = T_;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr unsigned kFeatures = kFeatures_;
  static constexpr int kStages = kStages_;
};

template <typename Traits>
struct Outputs {
  using T = typename Traits::T;
  static constexpr int kKeyDim = Traits::kKeyDim;
  static constexpr unsigned kFeatures = Traits::kFeatures;
  static constexpr int kConsumers = 1;
  static constexpr int kResidentBlocks = walk_blocks(kKeyDim, kConsumers);
  static constexpr int kTiles = static_cast<int>(outputs_tiles(kKeyDim));
  static constexpr int kProducerRegisters = kResidentBlocks == 1 ? 56 : 24;
  static constexpr int kConsumerRegisters = kResidentBlocks == 2 ? 232 : 240;

  // S is kept in parts of so many columns. Where it is one, there are registers for a rounded copy
  // and S q^T is computed beside q k^T.
  static constexpr int kPart = kKeyDim <= 128 ? kKeyDim : kKeyDim % 128 == 0 ? 128 : 64;
  static constexpr int kParts = kKeyDim / kPart;
  static_assert(kKeyDim % kPart == 0 && kParts <= 3, "a state of one to three parts");

  using KeyTile = SharedTile<T, kChunk, kKeyDim>;
  using ValueTile = SharedTile<T, kChunk, kSlice>;
  using WeightTile = SharedTile<T, kChunk, kChunk>;
  using SliceVec = SharedVec<float, kSlice>;
  using Ring = Pipeline<Traits::kStages>;
  // Of a warp's tokens, and else of its columns of v.
  using Scores = RegTile<float, 16, kChunk>;
  using Output = RegTile<float, 16, kChunk>;
  using Values = RegTile<T, 16, kChunk>;
  using State = RegTile<float, 16, kPart>;

  struct Shared {
    KeyTile q_smem[Traits::kStages], k_smem[Traits::kStages];
    ValueTile v_smem[Traits::kStages];
    WeightTile weights_smem[kTiles];
    ValueTile out_smem[kTiles];
    ChunkGates<kFeatures> gates[Traits::kStages];
    SliceVec skip;
    Barrier skip_full;
    Ring ring;
  };
  static_assert(sizeof(Shared) + 1024 <= outputs_shared_bytes(kKeyDim, Traits::kStages),
                "linear_attention.h's outputs_shared_bytes covers the kernel's shared memory");
  static constexpr int kStageBytes =
      2 * KeyTile::kBytes + ValueTile::kBytes + ChunkGates<kFeatures>::kBytes;

  __device__ __forceinline__ static void init(const OutputsParams&, Shared& shared) {
    shared.ring.init(4);
    shared.skip_full.init(1);
  }

  __device__ __forceinline__ static void load(const OutputsParams& params, Shared& shared) {
    tma::prefetch(params.q);
    tma::prefetch(params.k);
    tma::prefetch(params.v);
    if constexpr ((kFeatures & kSkip) != 0) load_skip(params, shared);
    const Place place = Place::of(params, 1, 0);
    const int group = place.group(params);
    const Segment segment = Segment::of(params);
    typename Ring::State state;
    for (int chunk = segment.first; chunk < segment.end; ++chunk, state.advance()) {
      shared.ring.acquire(state, kStageBytes);
      Barrier& full = shared.ring.full(state);
      const int token = chunk * kChunk;
      tma::load(shared.q_smem[state.stage], params.q, full, tma::Keep::kNormal, 0, token, group,
                place.batch);
      tma::load(shared.k_smem[state.stage], params.k, full, tma::Keep::kNormal, 0, token, group,
                place.batch);
      // What L2 fetches with 64 values of a head is the next head's, which is read later.
      tma::load(shared.v_smem[state.stage], params.v, full, tma::Keep::kNormal,
                place.slice * kSlice, token, place.head, place.batch);
      shared.gates[state.stage].load(params.gates, full, place.row(params), place.batch, chunk,
                                     params.chunks);
    }
  }

  __device__ __forceinline__ static void load_skip(const OutputsParams& params, Shared& shared) {
    const Place place = Place::of(params, 1, 0);
    const int slices = ceil_div(params.value_dim, kSlice);
    shared.skip_full.expect(SliceVec::kBytes);
    tma::load(shared.skip, params.skip + (place.head * slices + place.slice) * kSlice,
              shared.skip_full);
  }

  __device__ __forceinline__ static void compute(const OutputsParams& params, Shared& shared, int) {
    const Place place = Place::of(params, 1, 0);
    const Segment segment = Segment::of(params);
    constexpr bool kHasSkip = (kFeatures & kSkip) != 0;
    State state[kParts];
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      load_state(state[i], params, place, segment, i * kPart);
    }
    RegTile<T, 16, kPart> rounded;  // what products take of a part
    if constexpr (kParts == 1) warp::convert(rounded, state[0]);
    if constexpr (kHasSkip) shared.skip_full.wait(0);

    typename Ring::State stage;
    for (int chunk = segment.first; chunk < segment.end; ++chunk, stage.advance()) {
      const KeyTile& q_smem = shared.q_smem[stage.stage];
      const KeyTile& k_smem = shared.k_smem[stage.stage];
      const ValueTile& v_smem = shared.v_smem[stage.stage];
      const WeightTile& weights_smem = shared.weights_smem[chunk % kTiles];
      const ChunkGates<kFeatures>& gates = shared.gates[stage.stage];
      Scores scores;
      Output out;
      shared.ring.wait(stage);
      warpgroup::mm_ABt(scores, q_smem, k_smem);
      warpgroup::mma_commit();
      Values v, values;
      GateColumns<kFeatures> cols;
      RegTile<T, 16, kChunk> weights;
      if constexpr (kParts == 1) {
        warpgroup::mm_ABt(out, rounded, q_smem);
        warpgroup::mma_commit();
        gates.load_columns(cols);
        warpgroup::load_transposed(v, v_smem);
        warpgroup::mma_wait<1>(scores);
        gates.apply(weights, scores, cols);
      } else {
        warpgroup::mma_wait<0>(scores);
        gates.apply(weights, scores, gates);
      }
      warpgroup::store(weights_smem, weights);
      publish(params, shared, place, segment, chunk);
      if constexpr (kParts == 1) {
        warpgroup::mma_wait<0>(out, rounded);
        gates.scale_cols_before(out, cols);
        warp::convert(values, v);
      } else {
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
          warp::convert(rounded, state[i]);
          warpgroup::mma_ABt(out, rounded, q_smem.template cols<kPart>(i), i > 0);
          warpgroup::mma_commit();
          warpgroup::mma_wait<0>(out, rounded);
        }
        warpgroup::load_transposed(v, v_smem);
        gates.scale_cols_before(out, 1.0f);
      }
      warpgroup::mma_ABt(out, v, weights_smem);
      warpgroup::mma_commit();
      const auto finish_out = [&] {
        // To ask takes registers that large states leave none of.
        if (kParts > 1 || params.scale != 1) warp::mul(out, out, params.scale);
        if constexpr (kHasSkip) add_skip(out, v, shared.skip);
        if constexpr (kTiles == 1) {  // all have read the weights, and the out before has left
          if (warpgroup::leader()) tma::wait_read<0>();
          warpgroup::sync();
        }
        warpgroup::store_transposed(shared.out_smem[chunk % kTiles], out);
      };
      if constexpr (kParts > 1) {
        warpgroup::mma_wait<0>(out, v);
        finish_out();
        warp::convert(values, v);
        gates.scale_cols_after(values);
      } else {
        gates.scale_cols_after(values, cols);
      }
      const float total = gates.total();
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        warp::mul(state[i], state[i], total);
        warpgroup::mma_AB(state[i], values, k_smem.template cols<kPart>(i));
      }
      warpgroup::mma_commit();
      if constexpr (kParts == 1) {
        warpgroup::mma_wait<1>(out, v);
        finish_out();
      }
      warpgroup::mma_wait<0>(state[0], state[kParts / 2], state[kParts - 1], values);
      shared.ring.release(stage);
      if constexpr (kParts == 1) warp::convert(rounded, state[0]);
    }
    publish(params, shared, place, segment, segment.end);
    store_end(state, params, place, segment);
    if (warpgroup::leader()) tma::wait_read<0>();
  }

  // Makes what was stored visible to products and copies, of which one takes away the out of the
  // chunk before `chunk`. Of two tiles, those of the next chunk are free then: their out has left,
  // and their weights have been read.
  __device__ __forceinline__ static void publish(const OutputsParams& params, Shared& shared,
                                                 const Place& place, const Segment& segment,
                                                 int chunk) {
    publish_shared();
    if (warpgroup::leader()) tma::wait_read<0>();
    warpgroup::sync();
    if (chunk == segment.first || !warpgroup::leader()) return;
    tma::store(params.out, shared.out_smem[(chunk - 1) % kTiles], place.slice * kSlice,
               (chunk - 1) * kChunk, place.head, place.batch);
    tma::commit();
  }
};

template <typename Traits>
__device__ __forceinline__ void outputs(const OutputsParams& params) {
  block::run<Outputs<Traits>>(params);
}

}  // namespace tk::linear_attention
