// dq, and what depends on queries alone: phi(q) as the state's gradient needs it, the gradients of
// q W, alpha and beta, and of each query the largest score and its gradient.
//
// For the queries of chunk c, with S and z as they see them (gradients.cuh has the rest):
//   Z = beta sum of w + alpha phi(q) z,  delta = (beta sum of w dout v + alpha phi(q) dout S) / Z
//   dphi(q) = alpha (dout S - delta z) / Z, of which dy is the gradient of q W
//   dq = ds k + dy W^T,  dalpha = phi(q) (dout S - delta z) / Z
// Nothing is needed of the forward pass.
// Grid: chunks, heads, batch: nothing is shared by blocks.
// Roles: a producer warp loads all that the chunk needs, once; one consumer warpgroup computes.
// Budget at D = V = 128: 170 KB of shared memory; 64 registers of dq, 64 of weights, 64 of their
// gradients a thread. Limit: memory, and the latency of one chain for each multiprocessor.
// Packed documents: a block has a tile; one that is not far needs no features, and leaves zeros.
#pragma once

#include "kernels/hedgehog_attention/gradients.cuh"
#include "tk/tk.cuh"

namespace tk::hedgehog_attention {

template <typename Traits>
struct Queries {
  using T = typename Traits::T;
  static constexpr int kKeyDim = Traits::kKeyDim;
  static constexpr int kValueDim = Traits::kValueDim;
  static constexpr bool kDocuments = Traits::kDocuments;
  static constexpr int kConsumers = 1;
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = 240;

  using MapTile = SharedTile<T, kKeyDim, kMap>;
  using KeyTile = SharedTile<T, kChunk, kKeyDim>;
  using ValueTile = SharedTile<T, kChunk, kValueDim>;
  using FeatureTile = SharedTile<T, kChunk, kFeatures>;
  using ScoreTile = SharedTile<T, kChunk, kMap>;
  // What waits for delta: the gradient of q W is alpha (from_state - delta from_normalizer) / Z.
  using WaitingTile = SharedTile<float, kChunk, kMap>;
  using StateTile = SharedTile<T, kValueDim, kFeatures>;
  using Operand = RegTile<T, 16, 64>;
  using Sum = RegTile<float, 16, kKeyDim>;

  struct Shared {
    KeyTile q_smem, last_k_smem, k_smem;
    ValueTile dout_smem, last_v_smem, v_smem;
    MapTile map_smem;
    StateTile state_smem;
    FeatureTile phi_smem;
    ScoreTile dscores_smem;
    WaitingTile from_state_smem, from_normalizer_smem;
    MapVec normalizer[2];
    Barrier all_full;
    RowWindows<kDocuments, 1> windows;
  };
  static_assert(sizeof(Shared) + 1024 <= queries_shared_bytes(kKeyDim, kValueDim, kDocuments),
                "hedgehog_attention.h's queries_shared_bytes covers the kernel's shared memory");

  struct Place {
    int chunk, head, kv_head, batch;
    int row;    // of [B, H]
    int token;  // the first one
    bool far;   // whether queries see anything from afar
    DocumentTile tile = {};
    __device__ __forceinline__ explicit Place(const QueriesParams& params) {
      chunk = grid::block_x();
      head = grid::block_y();
      kv_head = head / (params.num_heads / params.num_kv_heads);
      batch = grid::block_z();
      row = batch * params.num_heads + head;
      if constexpr (kDocuments) {
        tile = DocumentTile::of(params.documents, batch, chunk);
        token = tile.first;
        far = tile.is_far();
      } else {
        token = chunk * kChunk;
        far = true;
      }
    }
    template <typename U>
    __device__ __forceinline__ GlobalVec<U> tokens(const QueriesParams& params, U* array) const {
      const int chunks = kDocuments ? params.documents.most : params.chunks;
      return {array + (static_cast<int64>(row) * chunks + chunk) * kChunk, kChunk};
    }
    __device__ __forceinline__ auto queries(const QueriesParams& params,
                                            const Shared& shared) const {
      const int first = first_token(params.first, batch);
      if constexpr (kDocuments) {
        return DocumentTokens(tile, first, shared.windows.rows[0]);
      } else {
        return Tokens{token, first};
      }
    }
  };

  __device__ __forceinline__ static void init(const QueriesParams&, Shared& shared) {
    shared.all_full.init(1);
  }

  __device__ __forceinline__ static void load(const QueriesParams& params, Shared& shared) {
    const Place place(params);
    const int token = place.token;
    Barrier& full = shared.all_full;
    const auto load = [&](const auto& tile, const TensorMap& map, int token, int head) {
      tma::load(tile, map, full, tma::Keep::kNormal, 0, token, head, place.batch);
    };
    full.expect(3 * KeyTile::kBytes + 3 * ValueTile::kBytes + MapTile::kBytes +
                (place.far ? StateTile::kBytes + 2 * MapVec::kBytes : 0) +
                RowWindows<kDocuments, 1>::kBytes);
    load(shared.q_smem, params.q, token, place.head);
    load(shared.dout_smem, params.dout, token, place.head);
    load(shared.last_k_smem, params.k, token - kChunk, place.kv_head);
    load(shared.k_smem, params.k, token, place.kv_head);
    load(shared.last_v_smem, params.v, token - kChunk, place.kv_head);
    load(shared.v_smem, params.v, token, place.kv_head);
    tma::load(shared.map_smem, params.q_map, full, tma::Keep::kLong, 0, 0, place.head);
    if constexpr (kDocuments) {
      tma::load(shared.windows.rows[0], windows_of(params.documents, place.batch, place.chunk),
                full);
      if (!place.far) return;
    }
    const int state =
        (place.batch * params.num_kv_heads + place.kv_head) * params.chunks + token / kChunk;
#pragma unroll
    for (int i = 0; i < kValueDim / kSlice; ++i) {
      tma::load(shared.state_smem.template rows<kSlice>(i), params.states, full, tma::Keep::kNormal,
                0, state * kValueDim + i * kSlice);
    }
    const float* normalizer = params.normalizers + static_cast<int64>(state) * kFeatures;
    tma::load(shared.normalizer[0], normalizer, full);
    tma::load(shared.normalizer[1], normalizer + kMap, full);
  }

  // Of features and their products with dout S and z: sums of rows, which weights have too.
  struct Far {
    PerRow<16> state_sum, normalizer_sum;
  };

  __device__ __forceinline__ static void compute(const QueriesParams& params, Shared& shared, int) {
    const Place place(params);
    const float alpha = load_scalar(params.alpha + place.head);
    QueryRows rows;
    Operand last_ds, ds, dscores;
    Sum dq;
    {
      Far far;
      shared.all_full.wait(0);
      if (place.far) {
        features(shared, place, far, alpha);
      } else {
        no_features(shared, far);
      }
      window(params, shared, place, far, alpha, rows, last_ds, ds);
    }
    score_gradients_of_map(dscores, shared, rows, alpha);
    warpgroup::mm_AB(dq, last_ds, shared.last_k_smem);
    warpgroup::mma_AB(dq, ds, shared.k_smem);
    warpgroup::mma_ABt(dq, dscores, shared.map_smem);
    warpgroup::mma_commit();
    divide_features(shared, rows);
    warpgroup::mma_wait<0>(dq, last_ds, ds, dscores);
    if constexpr (kDocuments) {
      if (!place.tile.is_full()) {
        store_tile(params, shared, place, dq, dscores);
        return;
      }
    }
    warpgroup::store(shared.dscores_smem, dscores);
    warpgroup::sync();  // the products of all warps have read q
    warpgroup::store(shared.q_smem, dq);
    publish_shared();
    warpgroup::sync();
    if (warpgroup::leader()) {
      const int token = place.token;
      tma::store(params.dq, shared.q_smem, 0, token, place.head, place.batch);
      tma::store(params.features, shared.phi_smem, 0, token, place.head, place.batch);
      tma::store(params.dscores, shared.dscores_smem, 0, token, place.head, place.batch);
      tma::commit();
      tma::wait_read<0>();
    }
  }

  // As far as there are tokens of the tile.
  __device__ __forceinline__ static void store_tile(const QueriesParams& params,
                                                    const Shared& shared, const Place& place,
                                                    const Sum& dq, const Operand& dscores) {
    const auto rows = [&](const TokenRows& array) {
      return tile_rows<T>(array, place.tile, params.seqlen, place.head, place.batch);
    };
    warpgroup::store(rows(params.dq_rows), dq, 0, 0);
    warpgroup::store(rows(params.dscores_rows), dscores, 0, 0);
#pragma unroll
    for (int sign = 0; sign < 2; ++sign) {
      Operand phi;
      warpgroup::load(phi, shared.phi_smem.template cols<kMap>(sign));
      warpgroup::store(rows(params.features_rows), phi, 0, sign * kMap);
    }
  }

  // Where nothing is far.
  __device__ __forceinline__ static void no_features(Shared& shared, Far& far) {
    warp::zero(far.state_sum);
    warp::zero(far.normalizer_sum);
    Square nothing;
    warp::zero(nothing);
    warpgroup::store(shared.from_state_smem, nothing);
    warpgroup::store(shared.from_normalizer_smem, nothing);
#pragma unroll
    for (int sign = 0; sign < 2; ++sign) {
      warpgroup::store(shared.phi_smem.template cols<kMap>(sign), nothing);
    }
  }

  // All about features that needs no divisors; alpha phi(q) to shared memory.
  __device__ __forceinline__ static void features(Shared& shared, const Place& place, Far& far,
                                                  float alpha) {
    Square scores, from_state, from_normalizer;
    warpgroup::mm_AB(scores, shared.q_smem, shared.map_smem);
    warpgroup::mma_commit();
    warp::zero(from_state);
    warp::zero(from_normalizer);
    warp::zero(far.state_sum);
    warp::zero(far.normalizer_sum);
    warpgroup::mma_wait<0>(scores);
#pragma unroll
    for (int sign = 0; sign < 2; ++sign) {
      Square products, gradients, phi;
      warpgroup::mm_AB(products, shared.dout_smem, shared.state_smem.template cols<kMap>(sign));
      warpgroup::mma_commit();
      softmax(phi, scores, sign);
      {
        PerCol<kMap> normalizer;
        warp::load(normalizer, shared.normalizer[sign]);
        warp::zero(gradients);
        warp::add_cols(gradients, gradients, normalizer);
      }
      softmax_gradients(gradients, phi, far.normalizer_sum, sign_of(sign));
      warp::add(from_normalizer, from_normalizer, gradients);
      warpgroup::mma_wait<0>(products);
      warp::convert(gradients, products);
      softmax_gradients(gradients, phi, far.state_sum, sign_of(sign));
      warp::add(from_state, from_state, gradients);
      warp::mul(phi, phi, alpha);
      if constexpr (kDocuments) {
        warpgroup::keep_rows_before(phi, place.tile.continued, 0.0f);
      }
      warpgroup::store(shared.phi_smem.template cols<kMap>(sign), phi);
    }
    if constexpr (kDocuments) {
      warpgroup::keep_rows_before(from_state, place.tile.continued, 0.0f);
      warpgroup::keep_rows_before(from_normalizer, place.tile.continued, 0.0f);
      keep_continued(far.state_sum, place.tile);
      keep_continued(far.normalizer_sum, place.tile);
    }
    warpgroup::store(shared.from_state_smem, from_state);
    warpgroup::store(shared.from_normalizer_smem, from_normalizer);
  }

  // The gradient of q W. A warp reads what it wrote.
  __device__ __forceinline__ static void score_gradients_of_map(Operand& dscores,
                                                                const Shared& shared,
                                                                const QueryRows& rows,
                                                                float alpha) {
    Square from_state, from_normalizer;
    warpgroup::load(from_state, shared.from_state_smem);
    warpgroup::load(from_normalizer, shared.from_normalizer_smem);
    warp::mul_rows(from_normalizer, from_normalizer, rows.delta);
    warp::sub(from_state, from_state, from_normalizer);
    warp::mul(from_state, from_state, alpha);
    warp::mul_rows(dscores, from_state, rows.inverse);
  }

  // The gradients of scores of near keys, and all else that is known of queries.
  __device__ __forceinline__ static void window(const QueriesParams& params, const Shared& shared,
                                                const Place& place, const Far& far, float alpha,
                                                QueryRows& rows, Operand& last_ds, Operand& ds) {
    const auto tokens = place.queries(params, shared);
    const float beta = load_scalar(params.beta + place.head);
    Square last_weights, weights, last_gradients, gradients;
    {
      Square last_scores, scores;
      warpgroup::mm_ABt(last_scores, shared.q_smem, shared.last_k_smem);
      warpgroup::mm_ABt(scores, shared.q_smem, shared.k_smem);
      warpgroup::mma_commit();
      warpgroup::mma_wait<0>(last_scores, scores);
      scale_last_scores(last_weights, last_scores, params.scale * kLog2E, tokens);
      scale_own_scores(weights, scores, params.scale * kLog2E, tokens);
    }
    Square last_products, products;
    warpgroup::mm_ABt(last_products, shared.dout_smem, shared.last_v_smem);
    warpgroup::mm_ABt(products, shared.dout_smem, shared.v_smem);
    warpgroup::mma_commit();
    PerRow<16> largest, divisors;
    largest_score(largest, last_weights, weights);
    weigh(last_weights, largest);
    weigh(weights, largest);
    warpgroup::store(place.tokens(params, params.largest), largest, 0);
    warp::zero(divisors);
    warp::fold_row_sum(divisors, last_weights);
    warp::fold_row_sum(divisors, weights);
    warp::finish_row_sum(divisors);
    PerRow<16> near = divisors;
    warp::zip(divisors, divisors, far.normalizer_sum,
              [=](float near, float z) { return beta * near + alpha * z; });
    warpgroup::store(place.tokens(params, params.divisors), divisors, 0);
    invert(divisors);
    rows.inverse = divisors;

    warpgroup::mma_wait<0>(last_products, products);
    PerRow<16> sums;
    warp::zero(sums);
    warp::fold_row_dot(sums, last_weights, last_products);
    warp::fold_row_dot(sums, weights, products);
    warp::finish_row_sum(sums);
    warp::zip(rows.delta, sums, far.state_sum,
              [=](float near, float state) { return beta * near + alpha * state; });
    warp::zip(rows.delta, rows.delta, rows.inverse, [](float x, float y) { return x * y; });
    warpgroup::store(place.tokens(params, params.delta), rows.delta, 0);
    // What alpha and beta multiply, less delta times what of it is in the divisor.
    const auto gradient_of = [&](PerRow<16>& sum, const PerRow<16>& ones) {
      PerRow<16> mean;
      warp::zip(mean, ones, rows.delta, [](float x, float delta) { return x * delta; });
      warp::zip(sum, sum, mean, [](float x, float y) { return x - y; });
      warp::zip(sum, sum, rows.inverse, [](float x, float inverse) { return x * inverse; });
    };
    PerRow<16> peaks, dalpha = far.state_sum;
    gradient_of(sums, near);
    gradient_of(dalpha, far.normalizer_sum);
    warpgroup::store(place.tokens(params, params.dbeta), sums, 0);
    warpgroup::store(place.tokens(params, params.dalpha), dalpha, 0);
    count_peaks(peaks, last_weights, weights);
    warp::zip(peaks, sums, peaks, [](float sum, float n) { return n == 0.0f ? 0.0f : sum / n; });
    warpgroup::store(place.tokens(params, params.peaks), peaks, 0);

    weight_gradients(last_gradients, last_products, rows);
    score_gradients(last_gradients, last_weights, peaks, beta * params.scale);
    warp::convert(last_ds, last_gradients);
    weight_gradients(gradients, products, rows);
    score_gradients(gradients, weights, peaks, beta * params.scale);
    warp::convert(ds, gradients);
  }

  __device__ __forceinline__ static void divide_features(const Shared& shared,
                                                         const QueryRows& rows) {
#pragma unroll
    for (int sign = 0; sign < 2; ++sign) {
      Operand phi;
      warpgroup::load(phi, shared.phi_smem.template cols<kMap>(sign));
      warp::mul_rows(phi, phi, rows.inverse);
      warpgroup::store(shared.phi_smem.template cols<kMap>(sign), phi);
    }
  }

  __device__ __forceinline__ static void count_peaks(PerRow<16>& counts, const Square& last,
                                                     const Square& own) {
    const auto is_peak = [](float w) { return w == 1.0f ? 1.0f : 0.0f; };
    Square peaks;
    warp::zero(counts);
    warp::map(peaks, last, is_peak);
    warp::fold_row_sum(counts, peaks);
    warp::map(peaks, own, is_peak);
    warp::fold_row_sum(counts, peaks);
    warp::finish_row_sum(counts);
  }
};

template <typename Traits>
__device__ __forceinline__ void queries(const QueriesParams& params) {
  if constexpr (Traits::kDocuments) {
    if (is_beyond(params.documents, grid::block_x(), grid::block_z())) return;
  }
  block::run<Queries<Traits>>(params);
}

}  // namespace tk::hedgehog_attention
