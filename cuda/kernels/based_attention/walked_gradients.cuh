// Gradients beside the state that they need: no state of a chunk is ever in memory.
//
// With s = scale q k^T where a query sees a key, f(s) = 1 + s + s^2 / 2, and
// m = scale (dout v^T) * (1 + s):
//   forward   dq = m k + phi'(q) (dout S), then S += v^T phi(k)
//   reverse   dk = m^T q + phi'(k) (v dS), dv = f(s)^T dout + phi(k) dS^T,
//             then dS += dout^T phi(scale q)
// where phi' brings gradients of features to those of the values (tk/sm90/products.cuh), S is the
// state before the chunk and dS its gradient after it. (The chunkwise form of Yang et al. 2023,
// section 3, whose backward pass walks the same way, with Based's features.) Either walk has
// tokens that gradients are of, its own (q and dout, or k and v), and others that are in the state.
// Grid: slices of 64 values, segments, batch. A block walks its segment's chunks.
// Roles: a producer warp loads a ring of q, k, v and dout; a consumer warpgroup keeps the state
// (64 x F, fp32) in registers and a rounded copy in shared memory. While the state is summed, the
// others' next features are formed.
// Budget for 16 values (F = 160), 2 stages: 113 KB of shared memory; 80 registers of the state and
// 80 of gradients of features a thread; two blocks share a multiprocessor, so that one computes
// while the other waits. Limit: instructions, then memory, reading q, k, v and dout.
#pragma once

#include "kernels/based_attention/normalizer_gradients.cuh"
#include "kernels/based_attention/walk.cuh"

namespace tk::based_attention {

template <typename Traits, bool kReverse, bool kNormalize>
struct WalkedGradients {
  using T = typename Traits::T;
  using KeyTile = typename Traits::KeyTile;
  using ValueTile = typename Traits::ValueTile;
  static_assert(walks(Traits::kDim), "a warpgroup keeps the whole state");
  static_assert(Traits::kStages >= kLeastWalkStages, "the next chunk is there beside a chunk");
  static constexpr int kConsumers = 1;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 232;

  using Ring = Pipeline<Traits::kStages>;
  using Square = RegTile<float, 16, 64>;
  using Operand = RegTile<T, 16, 64>;
  using State = RegTile<float, 16, Traits::kPieceColumns>;
  using Sum = RegTile<float, 16, KeyTile::kCols>;
  using Divisors = NormalizerGradients<Traits, kReverse>;
  // Gradients of features are all made at once where there are registers for them.
  static constexpr int kFirstColumns =
      kNormalize && Traits::kPieceColumns > 96 ? 64 : Traits::kPieceColumns;

  // Whether dq or dk leaves by the copy engine, as dv does: dk beside divisors has no room for it.
  static constexpr bool kCopiesSum = !(kNormalize && kReverse);

  struct Stage {
    KeyTile q_smem, k_smem;
    ValueTile v_smem, dout_smem;

    __device__ __forceinline__ const KeyTile& own_keys() const {
      return kReverse ? k_smem : q_smem;
    }
    __device__ __forceinline__ const ValueTile& own_values() const {
      return kReverse ? v_smem : dout_smem;
    }
    __device__ __forceinline__ const KeyTile& keys() const { return kReverse ? q_smem : k_smem; }
    __device__ __forceinline__ const ValueTile& values() const {
      return kReverse ? dout_smem : v_smem;
    }
  };
  // Bases, since one that is empty takes no memory.
  struct SumCopy {
    KeyTile dkeys_smem;  // dq or dk on its way out
  };
  struct DvCopy {
    ValueTile dv_smem;
  };
  struct DivisorCopies {
    typename Divisors::Shared divisors;
  };
  template <int>
  struct Nothing {};
  struct Shared : Select<kCopiesSum, SumCopy, Nothing<0>>,
                  Select<kReverse, DvCopy, Nothing<1>>,
                  Select<kNormalize, DivisorCopies, Nothing<2>> {
    Stage stages[Traits::kStages];
    typename Traits::FeatureTile features_smem[2];  // of the others, of a chunk and of the next
    typename Traits::PieceTile state_smem;
    typename Divisors::Changes changes[Traits::kStages];
    Documents<Traits::kDocuments> documents[Traits::kStages];
    Ring ring;
    Barrier state_read;   // and divisors, by all warps
    Barrier copies_left;  // dkeys_smem and dv_smem of the last chunk
  };
  static_assert(sizeof(Shared) + 1024 <=
                    walked_gradients_shared_bytes(Traits::kDim, Traits::kStages),
                "based_attention.h's walked_gradients_shared_bytes covers the shared memory");
  static constexpr int kStageBytes = 2 * KeyTile::kBytes + 2 * ValueTile::kBytes +
                                     Documents<Traits::kDocuments>::kBytes +
                                     (kNormalize ? Divisors::Changes::kBytes : 0);

  __device__ __forceinline__ static int chunk_at(const Segment& segment, int step) {
    return kReverse ? segment.end - 1 - step : segment.first + step;
  }

  __device__ __forceinline__ static void init(const WalkedGradientsParams&, Shared& shared) {
    shared.ring.init(4 * kConsumers);
    shared.state_read.init(4 * kConsumers);
    shared.copies_left.init(4 * kConsumers);
  }

  __device__ __forceinline__ static void load(const WalkedGradientsParams& params, Shared& shared) {
    tma::prefetch(params.q);
    tma::prefetch(params.k);
    tma::prefetch(params.v);
    tma::prefetch(params.dout);
    const Place place = Place::of(params, 1);
    const Segment segment = Segment::of(params, kReverse);
    const int group = place.group(params), col = place.slice * kSlice;
    const int slices = ceil_div(params.value_dim, kSlice);
    typename Ring::State state;
    for (int step = 0; step < segment.end - segment.first; ++step, state.advance()) {
      const int chunk = chunk_at(segment, step);
      shared.ring.acquire(state, kStageBytes);
      Barrier& full = shared.ring.full(state);
      Stage& stage = shared.stages[state.stage];
      const int token = chunk * kChunk;
      tma::load(stage.q_smem, params.q, full, tma::Keep::kNormal, 0, token, group, place.batch);
      tma::load(stage.k_smem, params.k, full, tma::Keep::kNormal, 0, token, group, place.batch);
      tma::load(stage.v_smem, params.v, full, tma::Keep::kNormal, col, token, place.head,
                place.batch);
      tma::load(stage.dout_smem, params.dout, full, tma::Keep::kNormal, col, token, place.head,
                place.batch);
      shared.documents[state.stage].load(params.counts, full, place.batch, chunk, params.chunks);
      if constexpr (kNormalize) {
        tma::load(shared.changes[state.stage],
                  params.changes +
                      (static_cast<int64>(place.row(params)) * slices + place.slice) *
                          params.chunks * kChunk +
                      chunk * kChunk,
                  full);
      }
    }
  }

  __device__ __forceinline__ static void compute(const WalkedGradientsParams& params,
                                                 Shared& shared, int) {
    const Place place = Place::of(params, 1);
    const Segment segment = Segment::of(params, kReverse);
    const Taylor taylor{params.scale};
    const ProductFactors own_factors = kReverse ? kKeyFactors : params.factors;
    State state;
    Divisors divisors;
    typename Ring::State at;
    uint32 phase = 0;  // of both barriers
    int buffer = 0;    // of the others' features
    load_state<Traits>(state, params, place, segment);
    if constexpr (kNormalize) {
      divisors.start(place.slice == 0 ? segment_sums(params, place, segment) : nullptr);
    }
    form_features(params, shared, at, buffer);
    share_state(shared, state, divisors);

    const int steps = segment.end - segment.first;
    for (int step = 0; step < steps; ++step) {
      const Stage& stage = shared.stages[at.stage];
      const Documents<Traits::kDocuments>& documents = shared.documents[at.stage];
      const auto& changes = shared.changes[at.stage];
      Sum products;  // own keys times divisors.second
      typename Divisors::Keys keys_t;
      if constexpr (kNormalize) {
        divisors.add(keys_t, stage.keys(), shared.divisors, documents, changes, params.scale);
        warpgroup::mm_AB(products, stage.own_keys(), shared.divisors.second);
      }
      Square scores, dp;
      warpgroup::mm_ABt(scores, stage.own_keys(), stage.keys());
      warpgroup::mm_ABt(dp, stage.own_values(), stage.values());
      warpgroup::mma_commit();
      leave_copies(shared);
      Sum sum;
      if constexpr (kNormalize) {
        warpgroup::mma_wait<0>(scores, dp, products, divisors.second, keys_t);
        Divisors::change(dp, changes);
        divisors.start_sum(sum, products, shared.divisors, documents, changes, params.scale);
      } else {
        warpgroup::mma_wait<0>(scores, dp);
        warp::zero(sum);
      }
      Operand seen;
      if constexpr (kReverse) {
        Operand weights;
        documents.map_seen_by(weights, scores, taylor);
        slopes(scores, dp, taylor);
        documents.map_seen_by(seen, scores, [](float x) { return x; });
        sum_dv(shared, stage, documents, weights, phase);
      } else {
        slopes(scores, dp, taylor);
        documents.map_seen(seen, scores, [](float x) { return x; });
      }
      Operand own;
      warpgroup::load(own, stage.own_values());
      if constexpr (kReverse) {
        documents.keep_rows_after(own);
      } else {
        documents.keep_rows_before(own);
      }
      warpgroup::mma_AB(sum, seen, stage.keys());
      warpgroup::mma_commit();
      fold_features<0, kFirstColumns>(sum, own, seen, shared, stage, own_factors);
      if constexpr (kFirstColumns < Traits::kPieceColumns) {
        fold_features<kFirstColumns, Traits::kPieceColumns - kFirstColumns>(sum, own, seen, shared,
                                                                            stage, own_factors);
      }
      Operand values;  // a row for each column of the slice
      warpgroup::load_transposed(values, stage.values());
      if constexpr (kReverse) {
        documents.keep_cols_before(values);
      } else {
        documents.keep_cols_after(values);
      }
      documents.keep_state(state);
      warpgroup::mma_AB(state, values, shared.features_smem[buffer]);
      warpgroup::mma_commit();
      const int chunk = chunk_at(segment, step);
      if constexpr (!kReverse) shared.copies_left.wait(phase);
      if (params.in_parts) {
        store_sum(static_cast<float*>(params.dkeys), params, sum, place, chunk);
      } else if constexpr (kCopiesSum) {
        warpgroup::store(shared.dkeys_smem, sum);
      } else {
        store_sum(static_cast<T*>(params.dkeys), params, sum, place, chunk);
      }

      const typename Ring::State done = at;
      at.advance();
      buffer ^= 1;
      if (step + 1 < steps) form_features(params, shared, at, buffer);
      warpgroup::mma_wait<0>(state, values);
      shared.ring.release(done);
      shared.state_read.wait(phase);
      phase ^= 1;
      share_state(shared, state, divisors);
      if (warpgroup::leader()) store_copies(params, shared, place, chunk);
    }
    if (segment.is_last(params, kReverse)) store_state<Traits>(state, params, place);
    if (warpgroup::leader()) tma::wait_read<0>();
  }

  // scores become m.
  __device__ __forceinline__ static void slopes(Square& scores, const Square& dp,
                                                const Taylor& taylor) {
    warp::zip(scores, scores, dp,
              [=](float x, float d) { return d * taylor.slope(x) * taylor.scale; });
  }

  // dv = weights dout + phi(k) dS^T, to be published.
  __device__ __forceinline__ static void sum_dv(Shared& shared, const Stage& stage,
                                                const Documents<Traits::kDocuments>& documents,
                                                Operand& weights, uint32 phase) {
    typename Traits::Features keys;
    Square dv;
    warpgroup::load_products<Traits::kDim>(keys, stage.k_smem, 0);
    documents.keep_rows_after(keys);
    warpgroup::mm_ABt(dv, keys, shared.state_smem);
    warpgroup::mma_AB(dv, weights, stage.dout_smem);
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(dv, keys, weights);
    shared.copies_left.wait(phase);
    warpgroup::store(shared.dv_smem, dv);
  }

  // sum += what the gradients of these columns of features, values state, are of the values. Waits
  // for all products; the last of two says that the state has been read.
  template <int kFirst, int kCount>
  __device__ __forceinline__ static void fold_features(Sum& sum, Operand& values, Operand& seen,
                                                       Shared& shared, const Stage& stage,
                                                       const ProductFactors& factors) {
    RegTile<float, 16, kCount> dfeatures;
    warpgroup::mm_AB(dfeatures, values,
                     shared.state_smem.view().template cols_from<kCount>(kFirst));
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(dfeatures, sum, values, seen);
    if constexpr (kFirst + kCount == Traits::kPieceColumns) {
      warp::sync();
      if (warp::leader()) shared.state_read.arrive();
    }
    warpgroup::fold_products<Traits::kDim>(sum, dfeatures, stage.own_keys(), kFirst, factors);
  }

  // The others' features of a chunk, as soon as it is there; to be published.
  __device__ __forceinline__ static void form_features(const WalkedGradientsParams& params,
                                                       Shared& shared,
                                                       const typename Ring::State& at, int buffer) {
    const KeyTile& keys_smem = shared.stages[at.stage].keys();
    auto& features_smem = shared.features_smem[buffer];
    shared.ring.wait(at);
    if constexpr (!kReverse) {
      warpgroup::store_products<Traits::kDim>(features_smem, keys_smem, 0);
      return;
    }
    typename Traits::Features features;
    bool formed = false;
    if constexpr (kSame<T, bf16>) {
      formed = params.factors_are_powers;
      if (formed) {
        warpgroup::load_products<Traits::kDim>(features, keys_smem, 0,
                                               PowerFactors{params.factors});
      }
    }
    if (!formed) warpgroup::load_products<Traits::kDim>(features, keys_smem, 0, params.factors);
    warpgroup::store(features_smem, features);
  }

  // The last chunk's copies have left shared memory, as the leader knows.
  __device__ __forceinline__ static void leave_copies(Shared& shared) {
    if (warpgroup::leader()) tma::wait_read<0>();
    warp::sync();
    if (warp::leader()) shared.copies_left.arrive();
  }

  // The rounded copy that products read; publishes features and what leaves, too.
  __device__ __forceinline__ static void share_state(Shared& shared, const State& state,
                                                     const Divisors& divisors) {
    warpgroup::store(shared.state_smem, state);
    if constexpr (kNormalize) divisors.share(shared.divisors);
    publish_shared();
    warpgroup::sync();
  }

  // dq or dk of a chunk, or a part of it.
  template <typename U>
  __device__ __forceinline__ static void store_sum(U* dkeys, const WalkedGradientsParams& params,
                                                   const Sum& sum, const Place& place, int chunk) {
    const int slices = ceil_div(params.value_dim, kSlice);
    const int row = params.num_heads * slices * Traits::kDim;
    const int64 first = static_cast<int64>(place.batch) * params.seqlen * row +
                        (place.head * slices + place.slice) * Traits::kDim;
    warpgroup::store(GlobalView<U>{dkeys + first, params.seqlen, Traits::kDim, row}, sum,
                     chunk * kChunk, 0);
  }

  // One thread: what has been published.
  __device__ __forceinline__ static void store_copies(const WalkedGradientsParams& params,
                                                      Shared& shared, const Place& place,
                                                      int chunk) {
    if constexpr (kCopiesSum) {
      if (!params.in_parts) {
        tma::store(params.dkeys_map, shared.dkeys_smem, 0, chunk * kChunk, place.group(params),
                   place.batch);
      }
    }
    if constexpr (kReverse) {
      tma::store(params.dv, shared.dv_smem, place.slice * kSlice, chunk * kChunk, place.head,
                 place.batch);
    }
    tma::commit();
  }
};

template <typename Traits, bool kReverse, bool kNormalize>
__device__ __forceinline__ void walked_gradients(const WalkedGradientsParams& params) {
  block::run<WalkedGradients<Traits, kReverse, kNormalize>>(params);
}

}  // namespace tk::based_attention
