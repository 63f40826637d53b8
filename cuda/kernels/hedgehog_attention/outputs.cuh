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
// scores and the weights of the last chunk's keys, the second the others. They meet twice a chunk.
// z is kept in shared memory in fp32. Budget at D = V = 128: 214 KB of shared memory: 32 of maps,
// 32 of q, 96 of k and v, 16 of phi(k), 32 of copies of S; a thread has 64 registers of S, and 96
// of scores from before the last out leaves. Limit: the chain of products and softmaxes within a
// chunk, see docs/kernels/hedgehog_attention.md.
// Packed documents: the same for tiles. S and z start anew where the next tile is no far one. What
// is not packed and has 128 columns of values is paired_outputs.cuh's.
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
  // Out on its way. A rounded tile is stored in more instructions, but beside a tile's numbers
  // there are no registers for another.
  using Finished = Select<kDocuments, Operand, Square>;
  using Windows = RowWindows<kDocuments, kQueryStages>;
  static_assert(kQueryStages == 2, "of a chunk and of the one before");

  // What a consumer tells the other of a warp's rows: the largest score of its near keys; the sum
  // of their weights and of phi(q) z of its sign.
  struct RowNumbers {
    SharedVec<float, 16> largest, sums;
  };

  struct Shared {
    MapTile q_map_smem, k_map_smem;
    RowsTile rows_smem[kQueryStages];
    KeyTile k_smem[kKeyStages];
    ValueTile v_smem[kKeyStages][kConsumers];
    FeatureTile phi_smem;  // of keys
    StateTile state_smem[kConsumers];
    RunningNormalizer normalizer;
    RowNumbers rows[2][4];  // of each consumer's warps
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
    __device__ __forceinline__ int64 state(const OutputsParams& params, int index) const {
      return (static_cast<int64>(batch) * params.num_kv_heads + kv_head) * params.states + index;
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
    shared.head_full.expect(2 * MapTile::kBytes);
    tma::load(shared.q_map_smem, params.q_map, shared.head_full, tma::Keep::kLong, 0, 0,
              place.head);
    tma::load(shared.k_map_smem, params.k_map, shared.head_full, tma::Keep::kLong, 0, 0,
              place.kv_head);
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
    State state;
    // S and z before the segment.
    const int states =
        kDocuments ? 1 : params.start_states + segment.index * params.states_of_segment;
    sum_states<kConsumers>(state, shared.normalizer, params.sums, params.normalizer,
                           place.state(params, kDocuments ? segment.index : 0),
                           params.sums == nullptr ? 0 : states, params.value_dim, consumer);
    warpgroup::store(shared.state_smem[consumer], state);
    publish_shared();
    meet<kConsumers>(kFeaturesReady);
    shared.head_full.wait(0);

    if constexpr (kConsumers == 2) {
      walk_together(params, shared, place, segment, first, consumer, state);
    } else {
      walk_alone(params, shared, place, segment, first, state);
    }
  }

  // What is in flight from before a chunk's own steps.
  struct Scores {
    Square of_keys, of_queries, near;  // k W of the last chunk, q W, q k
  };
  // The stage whose keys' near weights a consumer computes.
  __device__ __forceinline__ static int keys_of(int consumer, const typename KeyRing::State& last,
                                                const typename KeyRing::State& stage) {
    return consumer == 0 ? last.stage : stage.stage;
  }
  __device__ __forceinline__ static void issue_scores(Scores& scores, Shared& shared,
                                                      const typename QueryRing::State& q_stage,
                                                      const typename KeyRing::State& last,
                                                      const typename KeyRing::State& stage,
                                                      int consumer) {
    warpgroup::mm_AB(scores.of_keys, shared.k_smem[last.stage], shared.k_map_smem);
    warpgroup::mma_commit();
    shared.q_ring.wait(q_stage);
    const auto q_smem = q_view(shared, q_stage.stage);
    warpgroup::mm_AB(scores.of_queries, q_smem, shared.q_map_smem);
    warpgroup::mma_commit();
    shared.kv_ring.wait(stage);
    warpgroup::mm_ABt(scores.near, q_smem, shared.k_smem[keys_of(consumer, last, stage)]);
    warpgroup::mma_commit();
  }

  // Two consumers, which meet when features and largest scores are there and q is read, and when
  // weights are there and features are read. Products of q and k are issued before out leaves.
  __device__ __forceinline__ static void walk_together(const OutputsParams& params, Shared& shared,
                                                       const Place& place, const Segment& segment,
                                                       int first, int consumer, State& state) {
    const float alpha = load_scalar(params.alpha + place.head);
    const float beta = load_scalar(params.beta + place.head);
    const StateTile& state_smem = shared.state_smem[consumer];
    RowNumbers& my_rows = shared.rows[consumer][warp::index() & 3];
    const RowNumbers& others_rows = shared.rows[1 - consumer][warp::index() & 3];
    DocumentTile tile = {}, next = {};
    if constexpr (kDocuments) {
      next = DocumentTile::of(params.documents, place.batch, segment.first);
    }
    typename QueryRing::State q_stage;
    typename KeyRing::State last, stage;  // of k and v: the chunk before, and this one
    stage.advance();
    Scores scores;
    shared.kv_ring.wait(last);
    issue_scores(scores, shared, q_stage, last, stage, consumer);
    for (int chunk = segment.first;;) {
      if constexpr (kDocuments) {
        tile = next;
        next = DocumentTile::of(params.documents, place.batch, chunk + 1);
      }
      const int token = kDocuments ? tile.first : chunk * kChunk;
      const int mine = keys_of(consumer, last, stage), others = keys_of(1 - consumer, last, stage);
      warpgroup::mma_wait<2>(scores.of_keys);
      key_features(warpgroup::afresh(shared.phi_smem), shared.normalizer, scores.of_keys, consumer,
                   token - kChunk, first);
      publish_shared();

      Square out;
      Operand phi_plus, phi_minus;
      PerRow<16> far, largest, other;
      warp::zero(far);
      warpgroup::mma_wait<1>(scores.of_queries);
      query_features(phi_plus, far, scores.of_queries, shared, 0, alpha, consumer, tile);
      query_features(phi_minus, far, scores.of_queries, shared, 1, alpha, consumer, tile);
      warpgroup::mm_ABt(out, phi_plus, state_smem.template cols<kMap>(0));
      warpgroup::mma_ABt(out, phi_minus, state_smem.template cols<kMap>(1));
      warpgroup::mma_commit();

      warpgroup::mma_wait<1>(scores.near);
      Square near;
      scale_half(near, largest, scores.near, params.scale * kLog2E,
                 tokens_of(shared, q_stage.stage, tile, token, first), consumer);
      warp::store(my_rows.largest, largest);
      // By now the last out has left, and the next q comes in time.
      if (chunk > segment.first) release_rows(shared, q_stage);
      meet<kConsumers>(kFeaturesReady);

      warpgroup::mma_AtB(state, shared.v_smem[last.stage][consumer], shared.phi_smem);
      warpgroup::mma_commit();
      shared.normalizer.gather(consumer, kDocuments && !next.is_far());
      warp::load(other, others_rows.largest);
      warp::zip(largest, largest, other, [](float x, float y) { return math::max(x, y); });
      weigh_near(near, largest, beta);
      warp::fold_row_sum(far, near);
      warp::finish_row_sum(far);
      warp::store(my_rows.sums, far);
      // Each consumer's weights stand where the other's out will.
      const auto rows_smem = warpgroup::afresh(shared.rows_smem[q_stage.stage]);
      Operand weights, others_weights;
      warp::convert(weights, near);
      warpgroup::store(rows_smem.template cols<kSlice>(1 - consumer), near);
      warpgroup::mma_AB(out, weights, shared.v_smem[mine][consumer]);
      warpgroup::mma_commit();
      warpgroup::mma_wait<1>(state, phi_plus, phi_minus);
      meet<kConsumers>(kWeightsReady);

      warpgroup::load(others_weights, rows_smem.template cols<kSlice>(consumer));
      warpgroup::mma_AB(out, others_weights, shared.v_smem[others][consumer]);
      warpgroup::mma_commit();
      PerRow<16> divisors;
      warp::load(other, others_rows.sums);
      warp::zip(divisors, far, other, [](float x, float y) { return x + y; });
      invert(divisors);
      warpgroup::mma_wait<0>(out, weights, others_weights);
      shared.kv_ring.release(last);
      last = stage;
      stage.advance();
      if constexpr (kDocuments) {
        if (!next.is_far()) warp::zero(state);
      }
      warpgroup::store(warpgroup::afresh(state_smem), state);
      Finished finished;
      warp::mul_rows(finished, out, divisors);
      const int out_stage = q_stage.stage;
      q_stage.advance();
      const bool is_stored = store_rows(params, place, consumer, finished, tile);
      const auto leave = [&] {
        store_out(params, shared, place, consumer, out_stage, token, finished, is_stored);
      };
      if (++chunk == segment.end) {
        leave();
        break;
      }
      issue_scores(scores, shared, q_stage, last, stage, consumer);
      leave();
    }
    shared.kv_ring.release(last);
    release_rows(shared, q_stage);
  }

  // One consumer, which has both signs and all keys.
  __device__ __forceinline__ static void walk_alone(const OutputsParams& params, Shared& shared,
                                                    const Place& place, const Segment& segment,
                                                    int first, State& state) {
    const float alpha = load_scalar(params.alpha + place.head);
    const float beta = load_scalar(params.beta + place.head);
    const StateTile& state_smem = shared.state_smem[0];
    DocumentTile tile = {}, next = {};
    if constexpr (kDocuments) {
      next = DocumentTile::of(params.documents, place.batch, segment.first);
    }
    typename QueryRing::State q_stage;
    typename KeyRing::State last, stage;
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
      const ValueTile& last_v_smem = shared.v_smem[last.stage][0];
      Square q_scores, k_scores, out;
      Operand phi_plus, phi_minus;
      PerRow<16> far;
      shared.q_ring.wait(q_stage);
      warpgroup::mm_AB(q_scores, q_smem, shared.q_map_smem);
      warpgroup::mma_commit();
      warp::zero(far);
      warpgroup::mma_wait<0>(q_scores);
      query_features(phi_plus, far, q_scores, shared, 0, alpha, 0, tile);
      query_features(phi_minus, far, q_scores, shared, 1, alpha, 0, tile);
      // Not beside phi(q): there are no registers for both.
      warpgroup::mm_AB(k_scores, last_k_smem, shared.k_map_smem);
      warpgroup::mma_commit();
      warpgroup::mm_ABt(out, phi_plus, state_smem.template cols<kMap>(0));
      warpgroup::mma_ABt(out, phi_minus, state_smem.template cols<kMap>(1));
      warpgroup::mma_commit();

      // By now the last out has left, and the next q comes in time.
      if (chunk > segment.first) release_rows(shared, q_stage);
      warpgroup::mma_wait<1>(k_scores);
      warpgroup::sync();  // z is read
#pragma unroll
      for (int sign = 0; sign < 2; ++sign) {
        key_features(shared.phi_smem, shared.normalizer, k_scores, sign, token - kChunk, first);
      }
      publish_shared();

      shared.kv_ring.wait(stage);
      Square last_scores, scores;
      warpgroup::mm_ABt(last_scores, q_smem, last_k_smem);
      warpgroup::mm_ABt(scores, q_smem, shared.k_smem[stage.stage]);
      warpgroup::mma_commit();
      warpgroup::mma_wait<0>(out, phi_plus, phi_minus, last_scores, scores);
      warpgroup::sync();  // features are there, and q is read
#pragma unroll
      for (int sign = 0; sign < 2; ++sign) {
        shared.normalizer.gather(sign, kDocuments && !next.is_far());
      }

      warpgroup::mma_AtB(state, last_v_smem, shared.phi_smem);
      warpgroup::mma_commit();
      PerRow<16>& divisors = far;
      Operand last_weights, weights;
      weigh_keys(last_weights, weights, divisors, last_scores, scores, params.scale * kLog2E, beta,
                 tokens_of(shared, q_stage.stage, tile, token, first));
      warpgroup::mma_AB(out, last_weights, last_v_smem);
      warpgroup::mma_AB(out, weights, shared.v_smem[stage.stage][0]);
      warpgroup::mma_commit();
      warp::finish_row_sum(divisors);
      invert(divisors);
      warpgroup::mma_wait<0>(out, last_weights, weights, state);
      shared.kv_ring.release(last);
      last = stage;
      stage.advance();
      if constexpr (kDocuments) {
        if (!next.is_far()) warp::zero(state);
      }
      warpgroup::store(state_smem, state);
      Finished finished;
      warp::mul_rows(finished, out, divisors);
      const bool is_stored = store_rows(params, place, 0, finished, tile);
      store_out(params, shared, place, 0, q_stage.stage, token, finished, is_stored);
      q_stage.advance();
    }
    shared.kv_ring.release(last);
    release_rows(shared, q_stage);
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
      PerRow<16> dot;
      shared.normalizer.dot(dot, features, sign);
      warp::zip(dot, dot, scale, [](float x, float y) { return x * y; });
      warp::zip(far, far, dot, [](float x, float y) { return x + y; });
    }
    warp::mul_rows(phi, features, scale);
  }

  // Rows of a tile that is not full, which threads store; whether it is one.
  __device__ __forceinline__ static bool store_rows(const OutputsParams& params, const Place& place,
                                                    int consumer, const Finished& out,
                                                    const DocumentTile& tile) {
    if constexpr (kDocuments) {
      if (tile.is_full()) return false;
      warpgroup::store(tile_rows<T>(params.out_rows, tile, params.seqlen, place.head, place.batch),
                       out, 0, consumer * kSlice);
      return true;
    }
    return false;
  }
  // Out of all others. With it, the state's copy becomes readable for phi(q) S of the next chunk.
  __device__ __forceinline__ static void store_out(const OutputsParams& params, Shared& shared,
                                                   const Place& place, int consumer, int stage,
                                                   int token, const Finished& out, bool is_stored) {
    const auto out_smem = shared.rows_smem[stage].template cols<kSlice>(consumer);
    if (!is_stored) warpgroup::store(out_smem, out);
    publish_shared();
    warpgroup::sync();
    if (!is_stored && warpgroup::leader()) {
      tma::store(params.out, out_smem, consumer * kSlice, token, place.head, place.batch);
      tma::commit();
    }
  }

  // The rows before `stage`'s, once their out has left.
  __device__ __forceinline__ static void release_rows(Shared& shared,
                                                      typename QueryRing::State stage) {
    if (warpgroup::leader()) tma::wait_read<0>();
    stage.stage = 1 - stage.stage;
    shared.q_ring.release(stage);
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
