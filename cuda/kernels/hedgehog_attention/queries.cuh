// dq, and what depends on queries alone: phi(q) as the state's gradient needs it, the gradients of
// q W, alpha and beta, and of each query the largest score and its gradient.
//
// For the queries of chunk c, with S and z as they see them (gradients.cuh has the rest):
//   g = (dout S - delta z) / Z, the gradient of alpha phi(q)
//   dy = the gradient of q W, dq = ds k + dy W^T, dalpha = phi(q) g
// Grid: chunks, heads, batch: nothing is shared by blocks.
// Roles: a producer warp loads all that the chunk needs, once; one consumer warpgroup computes.
// Budget at D = V = 128: 170 KB of shared memory; 64 registers of dq, 64 of weights, 64 of their
// gradients a thread. Limit: memory, and the latency of one chain for each multiprocessor.
#pragma once

#include "kernels/hedgehog_attention/gradients.cuh"
#include "tk/tk.cuh"

namespace tk::hedgehog_attention {

template <typename Traits>
struct Queries {
  using T = typename Traits::T;
  static constexpr int kKeyDim = Traits::kKeyDim;
  static constexpr int kValueDim = Traits::kValueDim;
  static constexpr int kConsumers = 1;
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = 240;

  using MapTile = SharedTile<T, kKeyDim, kMap>;
  using KeyTile = SharedTile<T, kChunk, kKeyDim>;
  using ValueTile = SharedTile<T, kChunk, kValueDim>;
  using FeatureTile = SharedTile<T, kChunk, kFeatures>;
  using ScoreTile = SharedTile<T, kChunk, kMap>;
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
    MapVec normalizer[2];
    Barrier window_full, features_full;
  };
  static_assert(sizeof(Shared) + 1024 <= queries_shared_bytes(kKeyDim, kValueDim),
                "hedgehog_attention.h's queries_shared_bytes covers the kernel's shared memory");

  struct Place {
    int chunk, head, kv_head, batch;
    int row;  // of [B, H]
    __device__ __forceinline__ explicit Place(const QueriesParams& params) {
      chunk = grid::block_x();
      head = grid::block_y();
      kv_head = head / (params.num_heads / params.num_kv_heads);
      batch = grid::block_z();
      row = batch * params.num_heads + head;
    }
    template <typename U>
    __device__ __forceinline__ GlobalVec<U> tokens(const QueriesParams& params, U* array) const {
      return {array + (static_cast<int64>(row) * params.chunks + chunk) * kChunk, kChunk};
    }
  };

  __device__ __forceinline__ static void init(const QueriesParams&, Shared& shared) {
    shared.window_full.init(1);
    shared.features_full.init(1);
  }

  __device__ __forceinline__ static void load(const QueriesParams& params, Shared& shared) {
    const Place place(params);
    const int token = place.chunk * kChunk;
    const auto load = [&](const auto& tile, const TensorMap& map, int token, int head) {
      tma::load(tile, map, shared.window_full, tma::Keep::kNormal, 0, token, head, place.batch);
    };
    shared.window_full.expect(3 * KeyTile::kBytes + 3 * ValueTile::kBytes);
    load(shared.q_smem, params.q, token, place.head);
    load(shared.last_k_smem, params.k, token - kChunk, place.kv_head);
    load(shared.k_smem, params.k, token, place.kv_head);
    load(shared.dout_smem, params.dout, token, place.head);
    load(shared.last_v_smem, params.v, token - kChunk, place.kv_head);
    load(shared.v_smem, params.v, token, place.kv_head);

    Barrier& full = shared.features_full;
    full.expect(MapTile::kBytes + StateTile::kBytes + 2 * MapVec::kBytes);
    tma::load(shared.map_smem, params.q_map, full, tma::Keep::kLong, 0, 0, place.head);
    // The window has the last chunk, and the state what is before it.
    const int state = (place.batch * params.num_kv_heads + place.kv_head) * params.chunks +
                      max(place.chunk - 1, 0);
#pragma unroll
    for (int i = 0; i < kValueDim / kSlice; ++i) {
      tma::load(shared.state_smem.template rows<kSlice>(i), params.states, full, tma::Keep::kNormal,
                0, state * kValueDim + i * kSlice);
    }
    const float* normalizer = params.normalizers + static_cast<int64>(state) * kFeatures;
    tma::load(shared.normalizer[0], normalizer, full);
    tma::load(shared.normalizer[1], normalizer + kMap, full);
  }

  __device__ __forceinline__ static void compute(const QueriesParams& params, Shared& shared, int) {
    const Place place(params);
    QueryRows rows;
    warpgroup::load(rows.inverse, place.tokens(params, params.divisors), 0, 0.0f);
    warpgroup::load(rows.delta, place.tokens(params, params.delta), 0, 0.0f);
    invert(rows.inverse);
    shared.window_full.wait(0);
    Sum dq;
    {
      Operand last_ds, ds;
      window(params, shared, place, rows, last_ds, ds);
      warpgroup::mm_AB(dq, last_ds, shared.last_k_smem);
      warpgroup::mma_AB(dq, ds, shared.k_smem);
      warpgroup::mma_commit();
      warpgroup::mma_wait<0>(dq, last_ds, ds);
    }
    shared.features_full.wait(0);
    Operand dscores;
    features(params, shared, place, rows, dscores);
    warpgroup::mma_ABt(dq, dscores, shared.map_smem);
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(dq, dscores);
    warpgroup::store(shared.dscores_smem, dscores);
    warpgroup::sync();  // the products of all warps have read q
    warpgroup::store(shared.q_smem, dq);
    publish_shared();
    warpgroup::sync();
    if (warpgroup::leader()) {
      const int token = place.chunk * kChunk;
      tma::store(params.dq, shared.q_smem, 0, token, place.head, place.batch);
      tma::store(params.features, shared.phi_smem, 0, token, place.head, place.batch);
      tma::store(params.dscores, shared.dscores_smem, 0, token, place.head, place.batch);
      tma::commit();
      tma::wait_read<0>();
    }
  }

  // The gradients of scores of near keys.
  __device__ __forceinline__ static void window(const QueriesParams& params, const Shared& shared,
                                                const Place& place, const QueryRows& rows,
                                                Operand& last_ds, Operand& ds) {
    const Tokens tokens = {place.chunk * kChunk, first_token(params.first, place.batch)};
    Square last_scores, scores, last_products, products;
    warpgroup::mm_ABt(last_scores, shared.q_smem, shared.last_k_smem);
    warpgroup::mm_ABt(scores, shared.q_smem, shared.k_smem);
    warpgroup::mma_commit();
    warpgroup::mm_ABt(last_products, shared.dout_smem, shared.last_v_smem);
    warpgroup::mm_ABt(products, shared.dout_smem, shared.v_smem);
    warpgroup::mma_commit();
    warpgroup::mma_wait<1>(last_scores, scores);
    Square last_weights, weights;
    scale_last_scores(last_weights, last_scores, params.scale * kLog2E, tokens);
    scale_own_scores(weights, scores, params.scale * kLog2E, tokens);
    PerRow<16> largest;
    largest_score(largest, last_weights, weights);
    weigh(last_weights, largest);
    weigh(weights, largest);
    warpgroup::store(place.tokens(params, params.largest), largest, 0);

    warpgroup::mma_wait<0>(last_products, products);
    Square last_gradients, gradients;
    weight_gradients(last_gradients, last_products, rows);
    weight_gradients(gradients, products, rows);
    PerRow<16> sums, peaks;
    warp::zero(sums);
    warp::fold_row_dot(sums, last_weights, last_gradients);
    warp::fold_row_dot(sums, weights, gradients);
    warp::finish_row_sum(sums);
    warpgroup::store(place.tokens(params, params.dbeta), sums, 0);
    count_peaks(peaks, last_weights, weights);
    warp::zip(peaks, sums, peaks, [](float sum, float n) { return n == 0.0f ? 0.0f : sum / n; });
    warpgroup::store(place.tokens(params, params.peaks), peaks, 0);
    const float factor = load_scalar(params.beta + place.head) * params.scale;
    score_gradients(last_gradients, last_weights, peaks, factor);
    score_gradients(gradients, weights, peaks, factor);
    warp::convert(last_ds, last_gradients);
    warp::convert(ds, gradients);
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

  // The gradient of q W; alpha phi(q) / Z, which leaves through shared memory.
  __device__ __forceinline__ static void features(const QueriesParams& params, const Shared& shared,
                                                  const Place& place, const QueryRows& rows,
                                                  Operand& dscores) {
    const float alpha = load_scalar(params.alpha + place.head);
    Square scores, sum;
    PerRow<16> dalpha;
    warp::zero(dalpha);
    warpgroup::mm_AB(scores, shared.q_smem, shared.map_smem);
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(scores);
    warp::zero(sum);
#pragma unroll
    for (int sign = 0; sign < 2; ++sign) {
      Square products, gradients, phi;
      warpgroup::mm_AB(products, shared.dout_smem, shared.state_smem.template cols<kMap>(sign));
      warpgroup::mma_commit();
      softmax(phi, scores, sign_of(sign));
      PerCol<kMap> normalizer;
      warp::load(normalizer, shared.normalizer[sign]);
      warp::outer(gradients, rows.delta, normalizer,
                  [](float delta, float z) { return delta * z; });
      warpgroup::mma_wait<0>(products);
      warp::sub(gradients, products, gradients);
      warp::mul_rows(gradients, gradients, rows.inverse);
      softmax_gradients(gradients, phi, dalpha, alpha * sign_of(sign));
      warp::add(sum, sum, gradients);
      warp::mul(phi, phi, alpha);
      warp::mul_rows(phi, phi, rows.inverse);
      warpgroup::store(shared.phi_smem.template cols<kMap>(sign), phi);
    }
    warpgroup::store(place.tokens(params, params.dalpha), dalpha, 0);
    warp::convert(dscores, sum);
  }
};

template <typename Traits>
__device__ __forceinline__ void queries(const QueriesParams& params) {
  block::run<Queries<Traits>>(params);
}

}  // namespace tk::hedgehog_attention
