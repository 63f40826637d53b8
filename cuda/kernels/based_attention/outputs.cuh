// out = S phi(scale q), and S at the end: Based attention's forward pass.
//
// For a chunk of tokens, S being the state before it and f the Taylor series of exp:
//   out = tril(f(scale q k^T)) v + phi(scale q) S^T
//   S   = S + v^T phi(k)
// and, normalized, out divided by the sums of weights (normalizer.cuh).
// (Arora et al. 2024, section 4.1; the chunkwise form of Yang et al. 2023, section 3, with the
// symmetric half of the products of degree two.)
// Grid: slices of 64 values, segments, batch. A block walks its segment's chunks.
// Roles: a producer warp loads a ring of q, k and v; a consumer warpgroup keeps S (64 x F, fp32) in
// registers, and for phi(q) S^T a rounded copy in shared memory. While the state is summed it forms
// the next chunk's features: of q as an operand in registers (where there are enough), of k in
// shared memory. What a chunk leaves there (features, state, out) is published at once, by one
// barrier.
// Budget for 16 values (F = 160), 3 stages: 105 KB of shared memory; 80 registers of S, 40 of
// features, 32 of out and of scores a thread; two blocks share a multiprocessor, so that one
// computes while the other waits. Limit: memory, reading q, k, v and writing out; then the
// instructions that form features.
#pragma once

#include "kernels/based_attention/normalizer.cuh"
#include "kernels/based_attention/walk.cuh"

namespace tk::based_attention {

template <typename Traits, bool kNormalize>
struct Outputs {
  using T = typename Traits::T;
  using KeyTile = typename Traits::KeyTile;
  using ValueTile = typename Traits::ValueTile;
  using StateTile = typename Traits::PieceTile;
  static_assert(walks(Traits::kDim), "a warpgroup keeps the whole state");
  static_assert(Traits::kStages >= kLeastWalkStages, "the next chunk is there beside a chunk");
  static constexpr int kConsumers = 1;
  // Weights take as long as features: beside the product with the state, but where there are too
  // few registers for that.
  static constexpr bool kWeighsFirst = kNormalize || Traits::kDocuments;
  // Features of the next chunk's q beside the sum of the state, too: its product then starts as
  // soon as the state is there.
  static constexpr bool kQueriesAhead = !kWeighsFirst;
  // Features of q two at a time, as pairs of bf16: exact where the scale is a power of two, as 16
  // values' own is. What another scale multiplies, S's copy has. (With documents and normalization
  // there are no registers for it.)
  static constexpr bool kPairs = kSame<T, bf16> && !(kNormalize && Traits::kDocuments);
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 232;

  using Ring = Pipeline<Traits::kStages>;
  using Scores = RegTile<float, 16, kChunk>;
  using Output = RegTile<float, 16, kSlice>;
  using State = RegTile<float, 16, Traits::kPieceColumns>;
  using Sums = Normalizer<Traits>;

  struct Shared {
    KeyTile q_smem[Traits::kStages], k_smem[Traits::kStages];
    ValueTile v_smem[Traits::kStages];
    typename Traits::FeatureTile keys_smem[2];  // features of k, of a chunk and of the next
    StateTile state_smem;
    ValueTile out_smem;
    typename Sums::Shared sums;  // with kNormalize
    Documents<Traits::kDocuments> documents[Traits::kStages];
    Ring ring;
    Barrier copies_read;  // state_smem and sums by all warps, out_smem by the last chunk's store
  };
  static_assert(sizeof(Shared) + 1024 <= outputs_shared_bytes(Traits::kDim, Traits::kStages),
                "based_attention.h's outputs_shared_bytes covers the kernel's shared memory");
  static constexpr int kStageBytes =
      2 * KeyTile::kBytes + ValueTile::kBytes + Documents<Traits::kDocuments>::kBytes;

  __device__ __forceinline__ static void init(const OutputsParams&, Shared& shared) {
    shared.ring.init(4 * kConsumers);
    shared.copies_read.init(4 * kConsumers);
  }

  __device__ __forceinline__ static void load(const OutputsParams& params, Shared& shared) {
    tma::prefetch(params.q);
    tma::prefetch(params.k);
    tma::prefetch(params.v);
    const Place place = Place::of(params, 1);
    const Segment segment = Segment::of(params);
    const int group = place.group(params);
    typename Ring::State state;
    for (int chunk = segment.first; chunk < segment.end; ++chunk, state.advance()) {
      shared.ring.acquire(state, kStageBytes);
      Barrier& full = shared.ring.full(state);
      const int token = chunk * kChunk;
      tma::load(shared.q_smem[state.stage], params.q, full, tma::Keep::kNormal, 0, token, group,
                place.batch);
      tma::load(shared.k_smem[state.stage], params.k, full, tma::Keep::kNormal, 0, token, group,
                place.batch);
      // What L2 fetches with a head's 128 bytes is the neighbouring head's, which is read later.
      tma::load(shared.v_smem[state.stage], params.v, full, tma::Keep::kNormal,
                place.slice * kSlice, token, place.head, place.batch);
      shared.documents[state.stage].load(params.counts, full, place.batch, chunk, params.chunks);
    }
  }

  __device__ __forceinline__ static void compute(const OutputsParams& params, Shared& shared, int) {
    const Place place = Place::of(params, 1);
    const Segment segment = Segment::of(params);
    State state;
    Sums sums;
    typename Ring::State stage;
    uint32 read_phase = 0;
    int buffer = 0;  // of the features of the chunk's keys
    const PowerFactors factors = {params.factors_are_powers ? params.factors : kKeyFactors};
    load_state<Traits>(state, params, place, segment);
    if constexpr (kNormalize) sums.start(segment_sums(params, place, segment));
    form_keys(shared, stage, buffer);
    typename Traits::Features queries;  // of the chunk
    if constexpr (kQueriesAhead) {
      form_queries(queries, shared.q_smem[stage.stage], params, factors);
    }
    share_state(shared, params, state, sums);

    for (int chunk = segment.first; chunk < segment.end; ++chunk) {
      const KeyTile& q_smem = shared.q_smem[stage.stage];
      const KeyTile& k_smem = shared.k_smem[stage.stage];
      const ValueTile& v_smem = shared.v_smem[stage.stage];
      const Documents<Traits::kDocuments>& documents = shared.documents[stage.stage];
      Scores scores;
      Output out;
      typename Sums::Square products;  // q times the second sums
      warpgroup::mm_ABt(scores, q_smem, k_smem);
      if constexpr (kNormalize) warpgroup::mm_AB(products, q_smem, shared.sums.second);
      warpgroup::mma_commit();
      RegTile<T, 16, kChunk> weights;
      PerRow<16> totals;
      const auto weigh = [&] {
        documents.map_seen(weights, scores, Taylor{params.scale});
        if constexpr (kNormalize) {
          sums.total(totals, products, weights, q_smem, shared.sums, documents, params.factors);
          if (params.divisors != nullptr) store_divisors(params, totals, place, chunk);
        }
      };
      if constexpr (kNormalize) {
        warpgroup::mma_wait<0>(scores, products);
      } else if constexpr (kWeighsFirst) {
        warpgroup::mma_wait<0>(scores);
      }
      if constexpr (kWeighsFirst) weigh();
      if constexpr (!kQueriesAhead) form_queries(queries, q_smem, params, factors);
      if constexpr (!kQueriesAhead && !kWeighsFirst) warpgroup::mma_wait<0>(scores);
      warpgroup::mm_ABt(out, queries, shared.state_smem);
      warpgroup::mma_commit();
      if constexpr (kQueriesAhead) warpgroup::mma_wait<1>(scores);
      if constexpr (!kWeighsFirst) weigh();
      RegTile<T, 16, kChunk> values;  // a row for each column of v
      warpgroup::load_transposed(values, v_smem);
      documents.keep_cols_after(values);
      documents.keep_state(state);
      warpgroup::mma_wait<0>(out, queries);
      if constexpr (!kNormalize) leave_copies(shared);
      documents.keep_rows_before(out);
      warpgroup::mma_AB(out, weights, v_smem);
      warpgroup::mma_commit();
      typename Sums::Keys keys_t;
      warpgroup::mma_AB(state, values, shared.keys_smem[buffer]);
      if constexpr (kNormalize) {
        sums.add_count(shared.sums, documents);
        sums.add(keys_t, k_smem, shared.sums, documents);
      }
      warpgroup::mma_commit();
      if constexpr (kNormalize) leave_copies(shared);

      warpgroup::mma_wait<1>(out, weights);
      shared.copies_read.wait(read_phase);
      read_phase ^= 1;
      if constexpr (kNormalize) {
        Output quotients;
        warp::map(totals, totals, [](float x) { return x == 0 ? 0.0f : 1.0f / x; });
        warp::mul_rows(quotients, out, totals);
        warpgroup::store(shared.out_smem, quotients);
      } else {
        warpgroup::store(shared.out_smem, out);
      }
      const typename Ring::State done = stage;
      // The state's product has its operands in registers and in keys_smem.
      if constexpr (!kNormalize) shared.ring.release(done);
      stage.advance();
      buffer ^= 1;
      if (chunk + 1 < segment.end) {
        form_keys(shared, stage, buffer);
        if constexpr (kQueriesAhead) {
          form_queries(queries, shared.q_smem[stage.stage], params, factors);
        }
      }
      if constexpr (kNormalize) {
        warpgroup::mma_wait<0>(state, values, sums.second, keys_t);
      } else {
        warpgroup::mma_wait<0>(state, values);
      }
      if constexpr (kNormalize) shared.ring.release(done);
      share_state(shared, params, state, sums);
      if (warpgroup::leader()) {
        tma::store(params.out, shared.out_smem, place.slice * kSlice, chunk * kChunk, place.head,
                   place.batch);
        tma::commit();
      }
    }
    if (segment.is_last(params)) store_state<Traits>(state, params, place);
    if (warpgroup::leader()) tma::wait_read<0>();
  }

  __device__ __forceinline__ static void store_divisors(const OutputsParams& params,
                                                        const PerRow<16>& totals,
                                                        const Place& place, int chunk) {
    if (place.slice > 0) return;
    float* of_chunk =
        params.divisors + (static_cast<int64>(place.row(params)) * params.chunks + chunk) * kChunk;
    warpgroup::store(GlobalVec<float>{of_chunk, kChunk}, totals, 0);
  }

  __device__ __forceinline__ static void form_queries(typename Traits::Features& queries,
                                                      const KeyTile& q_smem,
                                                      const OutputsParams& params,
                                                      const PowerFactors& factors) {
    if constexpr (kPairs) {
      warpgroup::load_products<Traits::kDim>(queries, q_smem, 0, factors);
    } else {
      warpgroup::load_products<Traits::kDim>(queries, q_smem, 0, params.factors);
    }
  }

  // The features of a chunk's keys, as soon as they are there. Before share_state.
  __device__ __forceinline__ static void form_keys(Shared& shared,
                                                   const typename Ring::State& stage, int buffer) {
    shared.ring.wait(stage);
    warpgroup::store_products<Traits::kDim>(shared.keys_smem[buffer], shared.k_smem[stage.stage],
                                            0);
  }

  // A warp has read the copies; the leader waits for the store.
  __device__ __forceinline__ static void leave_copies(Shared& shared) {
    if (warpgroup::leader()) tma::wait_read<0>();
    warp::sync();
    if (warp::leader()) shared.copies_read.arrive();
  }

  // The rounded copies that products with q read; publishes the features of keys and out, too.
  __device__ __forceinline__ static void share_state(Shared& shared, const OutputsParams& params,
                                                     const State& state, const Sums& sums) {
    if (kPairs && !params.factors_are_powers) {
      RegTile<T, 16, Traits::kPieceColumns> scaled;
      warpgroup::scale_products<Traits::kDim>(scaled, state, 0, params.factors);
      warpgroup::store(shared.state_smem, scaled);
    } else {
      warpgroup::store(shared.state_smem, state);
    }
    if constexpr (kNormalize) sums.share(shared.sums);
    publish_shared();
    warpgroup::sync();
  }
};

template <typename Traits, bool kNormalize>
__device__ __forceinline__ void outputs(const OutputsParams& params) {
  block::run<Outputs<Traits, kNormalize>>(params);
}

}  // namespace tk::based_attention
