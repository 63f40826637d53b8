// out = (beta exp(s - m) v + alpha phi(q) S) / (the same sums of 1 and z): Hedgehog attention's
// forward pass, in which S = sum of phi(k) v^T and z = sum of phi(k) lag behind by a chunk.
//
// For the queries of chunk c (hedgehog_attention.h says what is near and far):
//   out = P [v of c - 1; v of c] + alpha phi(q) S,  then  S += phi(k of c - 1) (v of c - 1)^T
// Grid: heads, segments, batch. A block walks its segment's chunks.
// Roles: a producer warp loads the head's maps, a ring of q, and a ring of k and v of which the
// last chunk's stays; a consumer warpgroup has 64 columns of values: it keeps S (64 x 128, fp32) of
// those in registers, and for phi(q) S a rounded copy in shared memory. Each makes phi(q) for
// itself; phi(k), phi(q) z and near weights in halves: the first consumer phi of the positive
// scores and the weights of the last chunk's keys, the second the others. For that they meet three
// times a chunk. z is kept in shared memory, a part for each warp's rows, in fp32. Budget at D = V
// = 128: 214 KB of shared memory: 32 of maps, 32 of q, 96 of k and v, 16 of phi(k), 32 of copies of
// S; 64 registers of S, 32 each of scores, weights, out and phi(q) a thread. Limit: the chain of
// products and softmaxes within a chunk, see docs/kernels/hedgehog_attention.md.
// Packed documents: the same for tiles. S and z start anew where the next tile is no far one.
#pragma once

#include "kernels/hedgehog_attention/documents.cuh"
#include "kernels/hedgehog_attention/walk.cuh"
#include "kernels/hedgehog_attention/window.cuh"
#include "tk/tk.cuh"

namespace tk::hedgehog_attention {

template <typename T_, int kKeyDim_, int kConsumers_, bool kDocuments_>
struct OutputsTraits {
  using T = T_;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr bool kDocuments = kDocuments_;
  static_assert(kConsumers == 1 || kConsumers == 2, "a consumer has 64 columns of up to 128");
};

template <typename Traits>
struct Outputs {
  using T = typename Traits::T;
  static constexpr int kKeyDim = Traits::kKeyDim;
  static constexpr int kConsumers = Traits::kConsumers;
  static constexpr bool kDocuments = Traits::kDocuments;
  static constexpr int kProducerRegisters = kConsumers == 1 ? 56 : 24;
  static constexpr int kConsumerRegisters = 240;
  // Whether k W is computed while phi(q) is: one consumer, which has both signs, would spill.
  static constexpr bool kKeysBesideQueries = kConsumers == 2;

  using MapTile = SharedTile<T, kKeyDim, kMap>;
  using KeyTile = SharedTile<T, kChunk, kKeyDim>;
  using ValueTile = SharedTile<T, kChunk, kSlice>;
  // q, and out in its place.
  using RowsTile = SharedTile<T, kChunk, max(kKeyDim, kConsumers* kSlice)>;
  using FeatureTile = SharedTile<T, kChunk, kFeatures>;
  using StateTile = SharedTile<T, kSlice, kFeatures>;
  using QueryRing = Pipeline<kQueryStages>;
  using KeyRing = Pipeline<kKeyStages>;
  using State = RegTile<float, 16, kFeatures>;
  using Operand = RegTile<T, 16, 64>;
  using Windows = RowWindows<kDocuments, kQueryStages>;

  struct Shared {
    MapTile q_map_smem, k_map_smem;
    RowsTile rows_smem[kQueryStages];
    KeyTile k_smem[kKeyStages];
    ValueTile v_smem[kKeyStages][kConsumers];
    FeatureTile phi_smem;  // of keys
    StateTile state_smem[kConsumers];
    Normalizer normalizer;
    // Of each consumer and each warp's rows: the largest score of its near keys; the sum of their
    // weights and of phi(q) z of its sign.
    SharedVec<float, 16> largest[2][4], sums[2][4];
    Barrier head_full;
    QueryRing q_ring;
    KeyRing kv_ring;
    Windows windows;
  };
  static_assert(sizeof(Shared) + 1024 <= outputs_shared_bytes(kKeyDim, kConsumers, kDocuments),
                "hedgehog_attention.h's outputs_shared_bytes covers the kernel's shared memory");
  static constexpr int kStageBytes = KeyTile::kBytes + kConsumers * ValueTile::kBytes;

  struct Place {
    int head, kv_head, batch;
    __device__ __forceinline__ explicit Place(const OutputsParams& params) {
      head = grid::block_x();
      kv_head = head / (params.num_heads / params.num_kv_heads);
      batch = grid::block_z();
    }
    __device__ __forceinline__ int64 state(const OutputsParams& params,
                                           const Segment& segment) const {
      return (static_cast<int64>(batch) * params.num_kv_heads + kv_head) * segment.count +
             segment.index;
    }
    __device__ __forceinline__ Segment segment(const OutputsParams& params) const {
      if constexpr (kDocuments) {
        return document_segment(params.documents, batch);
      } else {
        return Segment::of(params);
      }
    }
  };

  __device__ __forceinline__ static void init(const OutputsParams&, Shared& shared) {
    shared.head_full.init(1);
    shared.q_ring.init(4 * kConsumers);
    shared.kv_ring.init(4 * kConsumers);
  }

  __device__ __forceinline__ static void load(const OutputsParams& params, Shared& shared) {
    const Place place(params);
    const Segment segment = place.segment(params);
    const bool starts = params.normalizer == nullptr;
    shared.head_full.expect(2 * MapTile::kBytes + (starts ? 0 : 2 * MapVec::kBytes));
    tma::load(shared.q_map_smem, params.q_map, shared.head_full, tma::Keep::kLong, 0, 0,
              place.head);
    tma::load(shared.k_map_smem, params.k_map, shared.head_full, tma::Keep::kLong, 0, 0,
              place.kv_head);
    if (!starts) {
      const float* normalizer = params.normalizer + place.state(params, segment) * kFeatures;
      tma::load(shared.normalizer.before[0], normalizer, shared.head_full);
      tma::load(shared.normalizer.before[1], normalizer + kMap, shared.head_full);
    }
    typename QueryRing::State q_state;
    typename KeyRing::State kv_state;
    for (int chunk = segment.first - 1; chunk < segment.end; ++chunk) {
      const int token = first_token_of(params, place, segment, chunk);
      shared.kv_ring.acquire(kv_state, kStageBytes);
      Barrier& full = shared.kv_ring.full(kv_state);
      tma::load(shared.k_smem[kv_state.stage], params.k, full, tma::Keep::kNormal, 0, token,
                place.kv_head, place.batch);
#pragma unroll
      for (int i = 0; i < kConsumers; ++i) {
        tma::load(shared.v_smem[kv_state.stage][i], params.v, full, tma::Keep::kNormal, i * kSlice,
                  token, place.kv_head, place.batch);
      }
      kv_state.advance();
      if (chunk < segment.first) continue;
      shared.q_ring.acquire(q_state, KeyTile::kBytes + Windows::kBytes);
      if constexpr (kDocuments) {
        tma::load(shared.windows.rows[q_state.stage],
                  windows_of(params.documents, place.batch, chunk), shared.q_ring.full(q_state));
      }
      tma::load(q_view(shared, q_state.stage), params.q, shared.q_ring.full(q_state),
                tma::Keep::kBriefly, 0, token, place.head, place.batch);
      q_state.advance();
    }
  }

  // Of the chunk, or of the tile; a segment's first one has kChunk tokens before it.
  __device__ __forceinline__ static int first_token_of(const OutputsParams& params,
                                                       const Place& place, const Segment& segment,
                                                       int chunk) {
    if constexpr (kDocuments) {
      const int* tiles = params.documents.tiles;
      const int tile = place.batch * (params.documents.most + 2) + max(chunk, segment.first);
      const int token = load_scalar(tiles + static_cast<int64>(tile) * kTileNumbers);
      return chunk < segment.first ? token - kChunk : token;
    } else {
      return chunk * kChunk;
    }
  }

  __device__ __forceinline__ static auto q_view(Shared& shared, int stage) {
    return shared.rows_smem[stage].template cols<kKeyDim>(0);
  }

  __device__ __forceinline__ static void compute(const OutputsParams& params, Shared& shared,
                                                 int consumer) {
    const Place place(params);
    const Segment segment = place.segment(params);
    const int first = first_token(params.first, place.batch);
    const float alpha = load_scalar(params.alpha + place.head);
    const float beta = load_scalar(params.beta + place.head);
    const StateTile& state_smem = shared.state_smem[consumer];
    const int quarter = warp::index() & 3;  // of the rows
    State state;
    if (params.sums == nullptr) {
      warp::zero(state);
    } else {
      warpgroup::load(
          state, state_rows(params.sums, place.state(params, segment), params.value_dim, consumer),
          0, 0);
    }
    clear_normalizer(params, shared, consumer);
    share_state(state_smem, state);
    meet<kConsumers>(kFeaturesReady);
    shared.head_full.wait(0);

    DocumentTile tile = {}, next = {};
    if constexpr (kDocuments) {
      next = DocumentTile::of(params.documents, place.batch, segment.first);
    }
    typename QueryRing::State q_stage, q_done;
    typename KeyRing::State last, stage;  // of k and v: the chunk before, and this one
    stage.advance();
    shared.kv_ring.wait(last);
    for (int chunk = segment.first; chunk < segment.end; ++chunk) {
      if constexpr (kDocuments) {
        tile = next;
        next = DocumentTile::of(params.documents, place.batch, chunk + 1);
      }
      const int token = kDocuments ? tile.first : chunk * kChunk;
      const auto q_smem = q_view(shared, q_stage.stage);
      const KeyTile& last_k_smem = shared.k_smem[last.stage];
      const ValueTile& last_v_smem = shared.v_smem[last.stage][consumer];
      Square q_scores, k_scores, out;
      Operand phi_plus, phi_minus;
      PerRow<16> far;
      shared.q_ring.wait(q_stage);
      warpgroup::mm_AB(q_scores, q_smem, shared.q_map_smem);
      warpgroup::mma_commit();
      const auto issue_key_scores = [&] {
        warpgroup::mm_AB(k_scores, last_k_smem, shared.k_map_smem);
        warpgroup::mma_commit();
      };
      if constexpr (kKeysBesideQueries) issue_key_scores();

      warp::zero(far);
      warpgroup::mma_wait<kKeysBesideQueries ? 1 : 0>(q_scores);
      query_features(phi_plus, far, q_scores, shared, 0, alpha, consumer, tile);
      query_features(phi_minus, far, q_scores, shared, 1, alpha, consumer, tile);
      if constexpr (!kKeysBesideQueries) issue_key_scores();
      warpgroup::mm_ABt(out, phi_plus, state_smem.template cols<kMap>(0));
      warpgroup::mma_ABt(out, phi_minus, state_smem.template cols<kMap>(1));
      warpgroup::mma_commit();

      // By now out has left, and the next chunk's q comes in time.
      release_rows(shared, q_done, q_stage);
      warpgroup::mma_wait<1>(k_scores);
      meet<kConsumers>(kFeaturesFree);  // the last chunk's are read
#pragma unroll
      for (int i = 0; i < 2 / kConsumers; ++i) {
        key_features(shared.phi_smem, shared.normalizer, k_scores,
                     sign_index<kConsumers>(consumer, i), token - kChunk, first);
      }
      if constexpr (kDocuments) {
        if (!next.is_far()) forget_normalizer(shared, consumer);
      }
      publish_shared();

      shared.kv_ring.wait(stage);
      PerRow<16> divisors;
      const auto tokens = tokens_of(shared, q_stage.stage, tile, token, first);
      if constexpr (kConsumers == 2) {
        Square scores;
        const int mine = consumer == 0 ? last.stage : stage.stage;
        const int others = consumer == 0 ? stage.stage : last.stage;
        warpgroup::mm_ABt(scores, q_smem, shared.k_smem[mine]);
        warpgroup::mma_commit();
        warpgroup::mma_wait<0>(out, phi_plus, phi_minus, scores);
        Square near;
        PerRow<16> largest;
        scale_half(near, largest, scores, params.scale * kLog2E, tokens, consumer);
        warp::store(shared.largest[consumer][quarter], largest);
        meet<kConsumers>(kFeaturesReady);  // and q is read

        warpgroup::mma_AtB(state, last_v_smem, shared.phi_smem);
        warpgroup::mma_commit();
        PerRow<16> other;
        warp::load(other, shared.largest[1 - consumer][quarter]);
        warp::zip(largest, largest, other, [](float x, float y) { return math::max(x, y); });
        weigh_near(near, largest, beta);
        warp::fold_row_sum(far, near);
        warp::finish_row_sum(far);
        warp::store(shared.sums[consumer][quarter], far);
        // Each consumer's weights stand where the other's out will.
        const RowsTile& rows_smem = shared.rows_smem[q_stage.stage];
        Operand weights, others_weights;
        warp::convert(weights, near);
        warpgroup::store(rows_smem.template cols<kSlice>(1 - consumer), weights);
        warpgroup::mma_AB(out, weights, shared.v_smem[mine][consumer]);
        warpgroup::mma_commit();
        meet<kConsumers>(kWeightsReady);
        warpgroup::load(others_weights, rows_smem.template cols<kSlice>(consumer));
        warpgroup::mma_AB(out, others_weights, shared.v_smem[others][consumer]);
        warpgroup::mma_commit();
        warp::load(other, shared.sums[1 - consumer][quarter]);
        warp::zip(divisors, far, other, [](float x, float y) { return x + y; });
        warpgroup::mma_wait<0>(out, weights, others_weights, state);
      } else {
        Square last_scores, scores;
        warpgroup::mm_ABt(last_scores, q_smem, last_k_smem);
        warpgroup::mm_ABt(scores, q_smem, shared.k_smem[stage.stage]);
        warpgroup::mma_commit();
        warpgroup::mma_wait<0>(out, phi_plus, phi_minus, last_scores, scores);
        meet<kConsumers>(kFeaturesReady);  // and q is read

        warpgroup::mma_AtB(state, last_v_smem, shared.phi_smem);
        warpgroup::mma_commit();
        Operand last_weights, weights;
        weigh_keys(last_weights, weights, divisors, last_scores, scores, params.scale * kLog2E,
                   beta, tokens);
        warpgroup::mma_AB(out, last_weights, last_v_smem);
        warpgroup::mma_AB(out, weights, shared.v_smem[stage.stage][consumer]);
        warpgroup::mma_commit();
        warp::finish_row_sum(far);
        warp::zip(divisors, divisors, far, [](float x, float y) { return x + y; });
        warpgroup::mma_wait<0>(out, last_weights, weights, state);
      }
      invert(divisors);
      shared.kv_ring.release(last);
      last = stage;
      stage.advance();
      warp::mul_rows(out, out, divisors);
      store_out(params, shared, place, consumer, q_stage.stage, token, out, tile);
      q_stage.advance();
      if constexpr (kDocuments) {
        if (!next.is_far()) warp::zero(state);
      }
      share_state(state_smem, state);
    }
    shared.kv_ring.release(last);
    release_rows(shared, q_done, q_stage);
  }

  __device__ __forceinline__ static void clear_normalizer(const OutputsParams& params,
                                                          Shared& shared, int consumer) {
#pragma unroll
    for (int i = 0; i < 2 / kConsumers; ++i) {
      const int sign = sign_index<kConsumers>(consumer, i);
      shared.normalizer.clear(sign);
      if (params.normalizer == nullptr && (warp::index() & 3) == 0) {
        shared.normalizer.clear_before(sign);
      }
    }
  }

  // z starts anew: each warp clears what it added to.
  __device__ __forceinline__ static void forget_normalizer(Shared& shared, int consumer) {
#pragma unroll
    for (int i = 0; i < 2 / kConsumers; ++i) {
      const int sign = sign_index<kConsumers>(consumer, i);
      shared.normalizer.clear(sign);
      if ((warp::index() & 3) == 0) shared.normalizer.clear_before(sign);
    }
  }

  __device__ __forceinline__ static auto tokens_of(const Shared& shared, int stage,
                                                   const DocumentTile& tile, int token, int first) {
    if constexpr (kDocuments) {
      return DocumentTokens(tile, first, shared.windows.rows[stage]);
    } else {
      return Tokens{token, first};
    }
  }

  // alpha phi(q) of a sign, and where that is the consumer's its product with z, which joins each
  // lane's part of `far`.
  __device__ __forceinline__ static void query_features(Operand& phi, PerRow<16>& far,
                                                        const Square& scores, const Shared& shared,
                                                        int sign, float alpha, int consumer,
                                                        const DocumentTile& tile) {
    Square features;
    PerRow<16> scale;
    exponentials(features, scale, scores, sign);
    warp::pin(scale);  // one sign after the other: both are many registers
    warp::map(scale, scale, [=](float x) { return x * alpha; });
    if constexpr (kDocuments) keep_continued(scale, tile);
    if (kConsumers == 1 || sign == consumer) {
      PerCol<kMap> normalizer;
      shared.normalizer.load(normalizer, sign);
      Square rows;  // all alike
      warp::zero(rows);
      warp::add_cols(rows, rows, normalizer);
      PerRow<16> dot;
      warp::zero(dot);
      warp::fold_row_dot(dot, features, rows);
      warp::zip(dot, dot, scale, [](float x, float y) { return x * y; });
      warp::zip(far, far, dot, [](float x, float y) { return x + y; });
    }
    warp::mul_rows(phi, features, scale);
  }

  // Of two consumers: the scores of one chunk's keys, and their largest.
  template <typename TokensOf>
  __device__ __forceinline__ static void scale_half(Square& dst, PerRow<16>& largest,
                                                    const Square& scores, float scale_log2,
                                                    const TokensOf& tokens, int consumer) {
    if (consumer == 0) {
      scale_last_scores(dst, scores, scale_log2, tokens);
    } else {
      scale_own_scores(dst, scores, scale_log2, tokens);
    }
    warp::row_max(largest, dst);
  }
  // beta joins the exponent: exp2(s - m + log2 beta), which is 0 where beta is.
  __device__ __forceinline__ static void weigh_near(Square& scores, const PerRow<16>& largest,
                                                    float beta) {
    const float beta_log2 = math::log2(beta);
    PerRow<16> shift;
    warp::map(shift, largest, [=](float m) { return (m == -kInfinity ? 0.0f : m) - beta_log2; });
    weigh(scores, shift);
  }

  // Weights of the keys of the last chunk and of this one, of which divisors are the sums.
  template <typename TokensOf>
  __device__ __forceinline__ static void weigh_keys(Operand& last_weights, Operand& weights,
                                                    PerRow<16>& divisors, const Square& last_scores,
                                                    const Square& scores, float scale_log2,
                                                    float beta, const TokensOf& tokens) {
    Square last, own;
    scale_last_scores(last, last_scores, scale_log2, tokens);
    scale_own_scores(own, scores, scale_log2, tokens);
    PerRow<16> largest;
    largest_score(largest, last, own);
    weigh_near(last, largest, beta);
    weigh_near(own, largest, beta);
    warp::zero(divisors);
    warp::fold_row_sum(divisors, last);
    warp::fold_row_sum(divisors, own);
    warp::finish_row_sum(divisors);
    warp::convert(last_weights, last);
    warp::convert(weights, own);
  }

  __device__ __forceinline__ static void store_out(const OutputsParams& params, Shared& shared,
                                                   const Place& place, int consumer, int stage,
                                                   int token, const Square& out,
                                                   const DocumentTile& tile) {
    if constexpr (kDocuments) {
      if (!tile.is_full()) {
        warpgroup::store(
            tile_rows<T>(params.out_rows, tile, params.seqlen, place.head, place.batch), out, 0,
            consumer * kSlice);
        return;
      }
    }
    const auto out_smem = shared.rows_smem[stage].template cols<kSlice>(consumer);
    warpgroup::store(out_smem, out);
    publish_shared();
    warpgroup::sync();
    if (warpgroup::leader()) {
      tma::store(params.out, out_smem, consumer * kSlice, token, place.head, place.batch);
      tma::commit();
    }
  }

  // Gives back the rows of the last chunk, once its out has left.
  __device__ __forceinline__ static void release_rows(Shared& shared,
                                                      typename QueryRing::State& done,
                                                      const typename QueryRing::State& stage) {
    if (!(done != stage)) return;
    if (warpgroup::leader()) tma::wait_read<0>();
    shared.q_ring.release(done);
    done.advance();
  }

  // The rounded copy that phi(q) S reads.
  __device__ __forceinline__ static void share_state(const StateTile& state_smem,
                                                     const State& state) {
    warpgroup::store(state_smem, state);
    publish_shared();
    warpgroup::sync();
  }
};

template <typename Traits>
__device__ __forceinline__ void outputs(const OutputsParams& params) {
  if constexpr (Traits::kDocuments) {
    const Segment segment = document_segment(params.documents, grid::block_z());
    if (segment.first >= segment.end) return;
  }
  block::run<Outputs<Traits>>(params);
}

}  // namespace tk::hedgehog_attention
