// out = (beta exp(s - m) v + alpha phi(q) S) / (the same sums of 1 and z), for 128 columns of
// values and sequences that are not packed.
//
// What outputs.cuh computes, with its parts on different warpgroups; for the queries of chunk c:
//   helper     phi(q), P = beta exp(s - m) of the keys of c - 1 and of c, and 1 / sums of both
//   consumers  S phi(q)^T + v^T P^T, times 1 / sums;  S += v^T phi(k) of c - 1;  phi(k) of c
// Grid: heads, segments, batch. A block walks its segment's chunks.
// Roles: a producer warp loads the head's maps and rings of q, k and v. The helper has all that
// asks nothing of S, and runs ahead of the consumers by as much as they have read of what it handed
// over. A consumer warpgroup has 64 columns of values: S^T of those (64 x 128, fp32) in registers.
// Each makes phi(k) of one sign while its products run. Out takes the place of the values of c - 1,
// which nobody else reads, and leaves by a storing warp each. The last warp beside them adds up z,
// which the helper multiplies with phi(q) on the tensor cores.
// Budget at D = 128: 223 KB of shared memory: 32 of maps, 32 of q, 48 of k, 48 of v, 48 of phi(q),
// phi(k) and P, 8 of z; a consumer has 64 registers of S, 32 of its rounded copy or of scores, 32
// of out; the helper up to 128 of scores and features. Limit: the arithmetic of both, see
// docs/kernels/hedgehog_attention.md.
#pragma once

#include "kernels/hedgehog_attention/walk.cuh"
#include "kernels/hedgehog_attention/window.cuh"
#include "tk/tk.cuh"

namespace tk::hedgehog_attention {

template <typename T_, int kKeyDim_>
struct PairedOutputsTraits {
  using T = T_;
  static constexpr int kKeyDim = kKeyDim_;
};

template <typename Traits>
struct PairedOutputs {
  using T = typename Traits::T;
  static constexpr int kKeyDim = Traits::kKeyDim;
  static constexpr int kSlices = 2;
  static constexpr int kConsumers = kSlices + 1;
  static constexpr int kStorers = kSlices;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 160;
  static constexpr int kHelperRegisters = 168;

  using MapTile = SharedTile<T, kKeyDim, kMap>;
  using KeyTile = SharedTile<T, kChunk, kKeyDim>;
  using ValueTile = SharedTile<T, kChunk, kSlice>;
  using FeatureTile = SharedTile<T, kChunk, kFeatures>;
  using WeightTile = SharedTile<T, kChunk, 2 * kChunk>;  // of the keys of both chunks
  using QueryRing = Pipeline<kQueryStages>;
  using KeyRing = Pipeline<kKeyStages>;
  using Turn = PipelineState<1>;
  using State = RegTile<float, 16, kFeatures>;
  using Operand = RegTile<T, 16, 64>;

  // A tile that goes from one role to another, chunk by chunk. Who reads it publishes it: who wrote
  // it would wait for its stores.
  struct Handover {
    Barrier full, empty;
    __device__ __forceinline__ void init(int warps, int readers) {
      full.init(warps);
      empty.init(readers);
    }
    // Each warp: what it stored is there.
    __device__ __forceinline__ void give() {
      warp::sync();
      if (warp::leader()) full.arrive();
    }
    __device__ __forceinline__ void take(uint32 phase) const {
      full.wait(phase);
      publish_shared();
    }
    // Each warp: what it read may be overwritten.
    __device__ __forceinline__ void release() {
      warp::sync();
      if (warp::leader()) empty.arrive();
    }
  };
  using FeatureVec = SharedVec<float, kFeatures>;
  // Of a chunk's phi(k): the sums of each warp's rows.
  struct KeySums {
    FeatureVec parts[4];
    Barrier full;
  };
  // z before a chunk as an operand. A feature's row has an eighth of its z, rounded, in the first
  // eight columns, and of what rounding left in the others: phi(q) times it is the far keys' sum in
  // sixteen parts, which lanes hold as they do parts of other sums.
  using SumTile = SharedTile<T, kFeatures, 16>;
  struct Sums {
    FeatureVec all;
    Barrier full;
  };

  struct Shared {
    MapTile q_map_smem, k_map_smem;
    KeyTile q_smem[kQueryStages];
    KeyTile k_smem[kKeyStages];
    ValueTile v_smem[kKeyStages][kSlices];  // and out
    FeatureTile phi_q_smem, phi_k_smem;
    WeightTile weights_smem;
    SumTile z_smem[2];
    KeySums key_sums[2];
    Sums z[2];  // of a chunk and the next, as z_smem
    SharedVec<float, kChunk> inverse;
    Barrier head_full;
    QueryRing q_ring;
    KeyRing k_ring, v_ring;
    Handover queries, keys, weights;
    Barrier out_full[kSlices][kKeyStages];
  };
  static_assert(sizeof(Shared) + 1024 <= paired_outputs_shared_bytes(kKeyDim),
                "hedgehog_attention.h's paired_outputs_shared_bytes covers the kernel's shared "
                "memory");

  struct Place {
    int head, kv_head, batch;
    __device__ __forceinline__ explicit Place(const OutputsParams& params) {
      head = grid::block_x();
      kv_head = head / (params.num_heads / params.num_kv_heads);
      batch = grid::block_z();
    }
  };

  // The states whose sum precedes a segment.
  struct States {
    int64 first, end;
    __device__ __forceinline__ States(const OutputsParams& params, const Place& place,
                                      const Segment& segment) {
      first =
          (static_cast<int64>(place.batch) * params.num_kv_heads + place.kv_head) * params.states;
      end = first + (params.sums == nullptr
                         ? 0
                         : params.start_states + segment.index * params.states_of_segment);
    }
  };

  __device__ __forceinline__ static void init(const OutputsParams&, Shared& shared) {
    shared.head_full.init(1);
    shared.q_ring.init(4);
    shared.k_ring.init(4 * kConsumers);
    shared.v_ring.init(kStorers);
    shared.queries.init(4, 4 * kSlices);
    shared.weights.init(4, 4 * kSlices);
    shared.keys.init(4 * kSlices, 4 * kSlices);
#pragma unroll
    for (KeySums& sums : shared.key_sums) sums.full.init(4 * kSlices);
#pragma unroll
    for (Sums& z : shared.z) z.full.init(1);
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
#pragma unroll
      for (Barrier& full : shared.out_full[i]) full.init(4);
    }
  }

  __device__ __forceinline__ static void load(const OutputsParams& params, Shared& shared) {
    const Place place(params);
    const Segment segment = Segment::of(params);
    shared.head_full.expect(2 * MapTile::kBytes);
    tma::load(shared.q_map_smem, params.q_map, shared.head_full, tma::Keep::kLong, 0, 0,
              place.head);
    tma::load(shared.k_map_smem, params.k_map, shared.head_full, tma::Keep::kLong, 0, 0,
              place.kv_head);
    typename QueryRing::State q_state;
    typename KeyRing::State state;  // of k and of v
    for (int chunk = segment.first - 1; chunk < segment.end; ++chunk, state.advance()) {
      const int token = chunk * kChunk;
      shared.k_ring.acquire(state, KeyTile::kBytes);
      tma::load(shared.k_smem[state.stage], params.k, shared.k_ring.full(state), tma::Keep::kNormal,
                0, token, place.kv_head, place.batch);
      if (chunk >= segment.first) {
        shared.q_ring.acquire(q_state, KeyTile::kBytes);
        tma::load(shared.q_smem[q_state.stage], params.q, shared.q_ring.full(q_state),
                  tma::Keep::kBriefly, 0, token, place.head, place.batch);
        q_state.advance();
      }
      // The last of them: the helper needs none, and is ahead of who does.
      shared.v_ring.acquire(state, kSlices * ValueTile::kBytes);
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        tma::load(shared.v_smem[state.stage][i], params.v, shared.v_ring.full(state),
                  tma::Keep::kNormal, i * kSlice, token, place.kv_head, place.batch);
      }
    }
  }

  // Out of a slice, and with it the stage of values that it stands in.
  __device__ __forceinline__ static void store(const OutputsParams& params, Shared& shared,
                                               int slice) {
    const Place place(params);
    const Segment segment = Segment::of(params);
    typename KeyRing::State stage;
    for (int chunk = segment.first; chunk < segment.end; ++chunk, stage.advance()) {
      shared.out_full[slice][stage.stage].wait(stage.phase);
      publish_shared();
      tma::store(params.out, shared.v_smem[stage.stage][slice], slice * kSlice, chunk * kChunk,
                 place.head, place.batch);
      tma::commit();
      tma::wait_read<0>();
      shared.v_ring.release_by_thread(stage);
    }
  }

  // z, for the helper: before a chunk it is what was added to S with the chunk before last. Sums
  // and z have two buffers each: consumers have taken the weights of a chunk, whose sums the helper
  // divides by, before they give the sums that z of the next chunk but one is made of.
  __device__ __forceinline__ static void tally(const OutputsParams& params, Shared& shared) {
    const Place place(params);
    const Segment segment = Segment::of(params);
    const States states(params, place, segment);
    start_sums(params, states, shared.z[0].all);
    give_sums(shared.z[0], shared.z_smem[0]);
#pragma unroll 1
    for (int step = 1; step < segment.end - segment.first; ++step) {
      KeySums& keys = shared.key_sums[(step - 1) & 1];
      Sums &before = shared.z[(step - 1) & 1], &z = shared.z[step & 1];
      keys.full.wait((step - 1) >> 1 & 1);
      warp::add_parts(z.all, before.all, keys.parts);
      give_sums(z, shared.z_smem[step & 1]);
    }
  }
  // Before the segment: 16 columns at a time.
  __device__ __forceinline__ static void start_sums(const OutputsParams& params,
                                                    const States& states, FeatureVec& z) {
#pragma unroll 1
    for (int i = 0; i < kFeatures / 16; ++i) {
      PerRow<16> sum, added;
      warp::zero(sum);
#pragma unroll 1
      for (int64 index = states.first; index < states.end; ++index) {
        const GlobalVec<const float> each = {params.normalizer + index * kFeatures, kFeatures};
        warp::load(added, each, 16 * i, 0.0f);
        warp::zip(sum, sum, added, [](float x, float y) { return x + y; });
      }
      warp::store(part<16>(z, i), sum);
    }
  }
  // What other lanes have stored, as an operand.
  __device__ __forceinline__ static void give_sums(Sums& z, const SumTile& z_smem) {
    warp::sync();
#pragma unroll 1
    for (int i = 0; i < kFeatures / 16; ++i) {
      PerRow<16> sums;
      RegTile<float, 16, 16> exact, rounded;
      RegTile<T, 16, 16> parts;
      warp::load(sums, part<16>(z.all, i));
      warp::map(sums, sums, [](float x) { return 0.125f * x; });
      warp::fill(exact, 0.0f);
      warp::add_rows(exact, exact, sums);
      warp::convert(parts, exact);
      warp::convert(rounded, parts);
      warp::for_each(rounded, [](int, int col, float x) { return col < 8 ? 0.0f : x; });
      warp::sub(exact, exact, rounded);
      warp::convert(parts, exact);
      warp::store(z_smem.template rows<16>(i), parts);
    }
    publish_shared();
    warp::sync();
    if (warp::leader()) z.full.arrive();
  }

  // The helper: what asks nothing of S.
  __device__ __forceinline__ static void help(const OutputsParams& params, Shared& shared) {
    const Place place(params);
    const Segment segment = Segment::of(params);
    const int first = first_token(params.first, place.batch);
    const float alpha = load_scalar(params.alpha + place.head);
    const float beta = load_scalar(params.beta + place.head);
    shared.head_full.wait(0);

    typename QueryRing::State q_stage;
    typename KeyRing::State last, stage;
    stage.advance();
    Turn turn;
    Square scores;
    shared.q_ring.wait(q_stage);
    warpgroup::mm_AB(scores, shared.q_smem[q_stage.stage], warpgroup::afresh(shared.q_map_smem));
    warpgroup::mma_commit();
    shared.k_ring.wait(last);
    for (int chunk = segment.first;; turn.advance()) {
      const int step = chunk - segment.first;
      const KeyTile& q_smem = shared.q_smem[q_stage.stage];
      Square last_near, near;
      warpgroup::mma_wait<0>(scores);
      shared.k_ring.wait(stage);
      warpgroup::mm_ABt(near, q_smem, shared.k_smem[stage.stage]);
      warpgroup::mma_commit();
      // Both signs at once: what one waits for, the other fills.
      Square phi_plus, phi_minus;
      PerRow<16> scale_plus, scale_minus;
      exponentials(phi_plus, scale_plus, scores, 0);
      exponentials(phi_minus, scale_minus, scores, 1);
      warp::pin(scale_plus);
      warp::pin(scale_minus);
      warpgroup::mm_ABt(last_near, q_smem, shared.k_smem[last.stage]);
      warpgroup::mma_commit();
      Operand plus, minus;
      scale_queries(plus, phi_plus, scale_plus, alpha);
      scale_queries(minus, phi_minus, scale_minus, alpha);
      shared.queries.empty.wait(turn.phase ^ 1);
      warpgroup::store(shared.phi_q_smem.template cols<kMap>(0), plus);
      warpgroup::store(shared.phi_q_smem.template cols<kMap>(1), minus);
      shared.queries.give();
      RegTile<float, 16, 16> far;
      const SumTile& z_smem = shared.z_smem[step & 1];
      shared.z[step & 1].full.wait(step >> 1 & 1);
      warpgroup::mm_AB(far, plus, z_smem.template rows<kMap>(0));
      warpgroup::mma_AB(far, minus, z_smem.template rows<kMap>(1));
      warpgroup::mma_commit();

      warpgroup::mma_wait<1>(last_near, near);
      shared.k_ring.release(last);
      last = stage;
      stage.advance();
      const int token = chunk * kChunk;
      const bool is_last = ++chunk == segment.end;
      if (!is_last) {
        shared.q_ring.release(q_stage);
        q_stage.advance();
        shared.q_ring.wait(q_stage);
      }
      Operand last_weights, weights;
      PerRow<16> sums;
      warp::zero(sums);
      weigh_keys(last_weights, weights, sums, last_near, near, params.scale * kLog2E, beta,
                 Tokens{token, first});
      warpgroup::mma_wait<0>(far, plus, minus);
      warp::fold_row_sum(sums, far);
      warp::finish_row_sum(sums);
      invert(sums);
      shared.weights.empty.wait(turn.phase ^ 1);
      warpgroup::store(shared.weights_smem.template cols<kChunk>(0), last_weights);
      warpgroup::store(shared.weights_smem.template cols<kChunk>(1), weights);
      warp::store(part<16>(shared.inverse, warp::index() & 3), sums);
      // Not before weights are stored: the compiler lets nobody read what products wrote while the
      // next of them run. Of the last chunk once more: no branch may be around a product.
      warpgroup::mm_AB(scores, shared.q_smem[q_stage.stage], warpgroup::afresh(shared.q_map_smem));
      warpgroup::mma_commit();
      shared.weights.give();
      if (is_last) break;
    }
    warpgroup::mma_wait<0>(scores);
    shared.q_ring.release(q_stage);
    shared.k_ring.release(last);
  }

  // alpha phi(q) of a sign from exponentials and their scale.
  __device__ __forceinline__ static void scale_queries(Operand& dst, Square& phi, PerRow<16>& scale,
                                                       float alpha) {
    warp::map(scale, scale, [=](float x) { return x * alpha; });
    warp::mul_rows(phi, phi, scale);
    warp::convert(dst, phi);
  }

  __device__ __forceinline__ static void compute(const OutputsParams& params, Shared& shared,
                                                 int consumer) {
    const Place place(params);
    const Segment segment = Segment::of(params);
    const int first = first_token(params.first, place.batch);
    State state;
    load_state(state, params, place, segment, consumer);
    shared.head_full.wait(0);

    typename KeyRing::State last, stage;  // of v: the chunk before, and this one; of k as well
    stage.advance();
    Turn turn, keys_turn;
    Square scores;
    shared.k_ring.wait(last);
    warpgroup::mm_AB(scores, shared.k_smem[last.stage], shared.k_map_smem);
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(scores);
    shared.k_ring.release(last);
    give_keys(shared, scores, consumer, keys_turn, 0, (segment.first - 1) * kChunk, first);
    shared.v_ring.wait(last);
    for (int chunk = segment.first; chunk < segment.end; ++chunk, turn.advance()) {
      const ValueTile& last_v_smem = shared.v_smem[last.stage][consumer];
      Square out;  // 64 columns of v in rows
      RegTile<T, 16, kFeatures> rounded;
      warp::convert(rounded, state);
      shared.queries.take(turn.phase);
      warpgroup::mm_ABt(out, rounded, shared.phi_q_smem);
      warpgroup::mma_commit();
      shared.keys.take(keys_turn.phase);
      keys_turn.advance();
      warpgroup::mma_AtB(state, last_v_smem, shared.phi_k_smem);
      warpgroup::mma_commit();
      shared.k_ring.wait(stage);
      warpgroup::mma_wait<1>(rounded);
      shared.queries.release();
      // In the registers of S's copy.
      warpgroup::mm_AB(scores, shared.k_smem[stage.stage], shared.k_map_smem);
      warpgroup::mma_commit();
      shared.weights.take(turn.phase);
      shared.v_ring.wait(stage);
      warpgroup::mma_AtBt(out, last_v_smem, shared.weights_smem.template cols<kChunk>(0));
      warpgroup::mma_AtBt(out, shared.v_smem[stage.stage][consumer],
                          shared.weights_smem.template cols<kChunk>(1));
      warpgroup::mma_commit();
      warpgroup::mma_wait<1>(state, scores);
      shared.keys.release();
      shared.k_ring.release(stage);
      give_keys(shared, scores, consumer, keys_turn, (chunk - segment.first + 1), chunk * kChunk,
                first);

      warpgroup::mma_wait<0>(out);
      warp::map_cols(out, out, shared.inverse, [](float x, float y) { return x * y; });
      shared.weights.release();
      warpgroup::sync();  // all have read v
      warpgroup::store_transposed(last_v_smem, out);
      warp::sync();
      if (warp::leader()) shared.out_full[consumer][last.stage].arrive();
      last = stage;
      stage.advance();
    }
  }

  __device__ __forceinline__ static void load_state(State& state, const OutputsParams& params,
                                                    const Place& place, const Segment& segment,
                                                    int consumer) {
    const States states(params, place, segment);
    warp::zero(state);
#pragma unroll 1
    for (int64 index = states.first; index < states.end; ++index) {
      State added;
      warp::load_pairs(added, state_rows(params.sums, index, params.value_dim, consumer),
                       16 * (warp::index() & 3), 0);
      warp::add(state, state, added);
    }
  }
  // phi(k) of the consumer's sign, and the sums of its columns: of a segment's `step`th chunk but
  // one, whose scores these are. Who reads them has `turn` next.
  __device__ __forceinline__ static void give_keys(Shared& shared, Square& scores, int sign,
                                                   const Turn& turn, int step, int token,
                                                   int first) {
    softmax(scores, scores, sign);
    drop_rows(scores, token, first);
    KeySums& sums = shared.key_sums[step & 1];
    warp::store_col_sum(part<kMap>(sums.parts[warp::index() & 3], sign), scores);
    shared.keys.empty.wait(turn.phase ^ 1);
    warpgroup::store(shared.phi_k_smem.template cols<kMap>(sign), scores);
    shared.keys.give();
    if (warp::leader()) sums.full.arrive();
  }
};

template <typename Traits>
__device__ __forceinline__ void paired_outputs(const OutputsParams& params) {
  block::run<PairedOutputs<Traits>>(params);
}

}  // namespace tk::hedgehog_attention
