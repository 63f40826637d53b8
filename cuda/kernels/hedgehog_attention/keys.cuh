// dk, dv and the gradient of k W, from the queries that see a chunk's keys near, and from the
// state's gradient for those that see them from afar.
//
// For the keys of chunk c, which queries of chunks c and c + 1 see near, with dS and dz the
// gradients of S and z from all later queries (gradients.cuh has the rest):
//   dv = (beta w / Z)^T dout + phi(k) dS^T
//   dy = the gradient of k W, from dphi(k) = v dS + dz;  dk = ds^T q + dy W^T
// Grid: chunks, heads of keys, batch: a block walks the query heads of its group; nothing is added
// in global memory.
// Roles: a producer warp loads k, v, dS and the map once, and a ring of q, dout and what is known
// of queries; consumer 0 computes dv, consumer 1 dk, each for itself, with queries as rows, as
// queries.cuh does, so that the largest scores are the same numbers. Weights, and ds, go through
// shared memory to be transposed.
// Budget at D = V = 128: 172 KB of shared memory; 64 registers of dk or dv, 32 each of weights,
// their gradients, features and theirs a thread. Limit: memory, and the latency of one chain for
// each multiprocessor.
// Packed documents: a block has a tile of keys, which that tile's queries see near and, where it
// continues a document, the next one's; others see them from afar where the one after that is far.
#pragma once

#include "kernels/hedgehog_attention/gradients.cuh"
#include "tk/tk.cuh"

namespace tk::hedgehog_attention {

template <typename Traits>
struct Keys {
  using T = typename Traits::T;
  static constexpr int kKeyDim = Traits::kKeyDim;
  static constexpr int kValueDim = Traits::kValueDim;
  static constexpr bool kDocuments = Traits::kDocuments;
  static constexpr int kConsumers = 2;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  using MapTile = SharedTile<T, kKeyDim, kMap>;
  using KeyTile = SharedTile<T, kChunk, kKeyDim>;
  using ValueTile = SharedTile<T, kChunk, kValueDim>;
  using PairTile = SharedTile<T, kChunk, kChunk>;
  using StateTile = SharedTile<T, kValueDim, kFeatures>;
  using TokenVec = SharedVec<float, kChunk>;
  using Ring = Pipeline<kTokenStages>;
  using Operand = RegTile<T, 16, 64>;
  using KeySum = RegTile<float, 16, kKeyDim>;
  using ValueSum = RegTile<float, 16, kValueDim>;

  struct Shared {
    KeyTile k_smem;
    ValueTile v_smem;
    MapTile map_smem;
    StateTile dstate_smem;
    PairTile weights_smem, ds_smem;  // and the gradient of k W on its way out
    KeyTile dk_smem;
    ValueTile dv_smem;
    KeyTile q_smem[kTokenStages];
    ValueTile dout_smem[kTokenStages];
    TokenVec divisors[kTokenStages], delta[kTokenStages], largest[kTokenStages],
        peaks[kTokenStages];
    MapVec dnormalizer[2];
    Barrier keys_full;
    Ring ring;
    RowWindows<kDocuments, 1> windows;
  };
  static_assert(sizeof(Shared) + 1024 <= keys_shared_bytes(kKeyDim, kValueDim, kDocuments),
                "hedgehog_attention.h's keys_shared_bytes covers the kernel's shared memory");
  static constexpr int kStageBytes = KeyTile::kBytes + ValueTile::kBytes + 4 * TokenVec::kBytes;

  struct Place {
    int chunk, kv_head, batch;
    int group, first_head;  // query heads
    int query_chunks;       // that see the keys near
    int token;              // the first one
    bool far;               // whether queries see the keys from afar
    DocumentTile tile = {}, next = {};

    __device__ __forceinline__ explicit Place(const KeysParams& params) {
      chunk = grid::block_x();
      kv_head = grid::block_y();
      batch = grid::block_z();
      group = params.num_heads / params.num_kv_heads;
      first_head = kv_head * group;
      if constexpr (kDocuments) {
        tile = DocumentTile::of(params.documents, batch, chunk);
        next = DocumentTile::of(params.documents, batch, chunk + 1);
        query_chunks = next.continued > 0 ? 2 : 1;
        token = tile.first;
        far = DocumentTile::is_far(params.documents, batch, chunk + 2);
      } else {
        query_chunks = min(2, params.chunks - chunk);
        token = chunk * kChunk;
        far = chunk + 2 < params.chunks;
      }
    }
    // Of the i-th chunk of queries.
    __device__ __forceinline__ int query_token(int i) const {
      if constexpr (kDocuments) {
        return i == 0 ? tile.first : next.first;
      } else {
        return (chunk + i) * kChunk;
      }
    }
    __device__ __forceinline__ auto queries(int i, int first, const Shared& shared) const {
      if constexpr (kDocuments) {
        return DocumentTokens(i == 0 ? tile : next, first, shared.windows.rows[0]);
      } else {
        return Tokens{query_token(i), first};
      }
    }
  };

  __device__ __forceinline__ static void init(const KeysParams&, Shared& shared) {
    shared.keys_full.init(1);
    shared.ring.init(4 * kConsumers);
  }

  __device__ __forceinline__ static void load(const KeysParams& params, Shared& shared) {
    const Place place(params);
    const int token = place.token;
    Barrier& keys_full = shared.keys_full;
    keys_full.expect(KeyTile::kBytes + ValueTile::kBytes + MapTile::kBytes +
                     (place.far ? StateTile::kBytes + 2 * MapVec::kBytes : 0) +
                     RowWindows<kDocuments, 1>::kBytes);
    tma::load(shared.k_smem, params.k, keys_full, tma::Keep::kBriefly, 0, token, place.kv_head,
              place.batch);
    tma::load(shared.v_smem, params.v, keys_full, tma::Keep::kBriefly, 0, token, place.kv_head,
              place.batch);
    tma::load(shared.map_smem, params.k_map, keys_full, tma::Keep::kLong, 0, 0, place.kv_head);
    if constexpr (kDocuments) {
      tma::load(shared.windows.rows[0], windows_of(params.documents, place.batch, place.chunk),
                keys_full);
    }
    if (place.far) load_state(params, shared, place);

    typename Ring::State stage;
    for (int head = place.first_head; head < place.first_head + place.group; ++head) {
      for (int i = 0; i < place.query_chunks; ++i, stage.advance()) {
        const int chunk = place.chunk + i;
        const int query_token = place.query_token(i);
        shared.ring.acquire(stage, kStageBytes);
        Barrier& full = shared.ring.full(stage);
        tma::load(shared.q_smem[stage.stage], params.q, full, tma::Keep::kNormal, 0, query_token,
                  head, place.batch);
        tma::load(shared.dout_smem[stage.stage], params.dout, full, tma::Keep::kNormal, 0,
                  query_token, head, place.batch);
        const int chunks = kDocuments ? params.documents.most : params.chunks;
        const int64 first =
            ((static_cast<int64>(place.batch) * params.num_heads + head) * chunks + chunk) * kChunk;
        tma::load(shared.divisors[stage.stage], params.divisors + first, full);
        tma::load(shared.delta[stage.stage], params.delta + first, full);
        tma::load(shared.largest[stage.stage], params.largest + first, full);
        tma::load(shared.peaks[stage.stage], params.peaks + first, full);
      }
    }
  }

  __device__ __forceinline__ static void load_state(const KeysParams& params, Shared& shared,
                                                    const Place& place) {
    const int state =
        (place.batch * params.num_kv_heads + place.kv_head) * params.chunks + place.token / kChunk;
#pragma unroll
    for (int i = 0; i < kValueDim / kSlice; ++i) {
      tma::load(shared.dstate_smem.template rows<kSlice>(i), params.dstates, shared.keys_full,
                tma::Keep::kBriefly, 0, state * kValueDim + i * kSlice);
    }
    const float* dnormalizer = params.dnormalizers + static_cast<int64>(state) * kFeatures;
    tma::load(shared.dnormalizer[0], dnormalizer, shared.keys_full);
    tma::load(shared.dnormalizer[1], dnormalizer + kMap, shared.keys_full);
  }

  __device__ __forceinline__ static void compute(const KeysParams& params, Shared& shared,
                                                 int consumer) {
    shared.keys_full.wait(0);
    if (consumer == 0) {
      sum_dv(params, shared);
    } else {
      sum_dk(params, shared);
    }
  }

  // Calls step(head, stage, tokens, own) for every chunk of queries that see the keys near.
  template <typename Step>
  __device__ __forceinline__ static void walk(const KeysParams& params, Shared& shared,
                                              const Place& place, Step&& step) {
    const int first = first_token(params.first, place.batch);
    typename Ring::State stage;
    for (int head = place.first_head; head < place.first_head + place.group; ++head) {
      for (int i = 0; i < place.query_chunks; ++i, stage.advance()) {
        shared.ring.wait(stage);
        step(head, stage.stage, place.queries(i, first, shared), i == 0);
        shared.ring.release(stage);
      }
    }
  }

  __device__ __forceinline__ static void sum_dv(const KeysParams& params, Shared& shared) {
    const Place place(params);
    ValueSum dv;
    warp::zero(dv);
    walk(params, shared, place, [&](int head, int stage, const auto& tokens, bool own) {
      Square scores, weights;
      warpgroup::mm_ABt(scores, shared.q_smem[stage], shared.k_smem);
      warpgroup::mma_commit();
      PerRow<16> inverse;
      warpgroup::load(inverse, shared.divisors[stage]);
      invert(inverse);
      warp::mul(inverse, inverse, load_scalar(params.beta + head));
      warpgroup::mma_wait<0>(scores);
      weigh_scores(weights, scores, params, shared, stage, tokens, own);
      warp::mul_rows(weights, weights, inverse);
      add_transposed(dv, shared.weights_smem, weights, shared.dout_smem[stage]);
    });

    if (place.far) add_far_dv(params, shared, place, dv);
    if constexpr (kDocuments) {
      if (!place.tile.is_full()) {
        warpgroup::store(
            tile_rows<T>(params.dv_rows, place.tile, params.seqlen, place.kv_head, place.batch), dv,
            0, 0);
        return;
      }
    }
    store(params.dv, shared.dv_smem, dv, place);
  }

  __device__ __forceinline__ static void add_far_dv(const KeysParams& params, Shared& shared,
                                                    const Place& place, ValueSum& dv) {
    Square scores;
    warpgroup::mm_AB(scores, shared.k_smem, shared.map_smem);
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(scores);
#pragma unroll
    for (int sign = 0; sign < 2; ++sign) {
      Operand phi;
      {
        Square features;
        key_features(features, scores, params, place, sign);
        warp::convert(phi, features);
      }
      warpgroup::mma_ABt(dv, phi, shared.dstate_smem.template cols<kMap>(sign));
      warpgroup::mma_commit();
      warpgroup::mma_wait<0>(dv, phi);
    }
  }

  __device__ __forceinline__ static void sum_dk(const KeysParams& params, Shared& shared) {
    const Place place(params);
    KeySum dk;
    warp::zero(dk);
    walk(params, shared, place, [&](int head, int stage, const auto& tokens, bool own) {
      Square scores, products, weights, gradients;
      warpgroup::mm_ABt(scores, shared.q_smem[stage], shared.k_smem);
      warpgroup::mma_commit();
      warpgroup::mm_ABt(products, shared.dout_smem[stage], shared.v_smem);
      warpgroup::mma_commit();
      QueryRows rows;
      PerRow<16> peaks;
      warpgroup::load(rows.inverse, shared.divisors[stage]);
      warpgroup::load(rows.delta, shared.delta[stage]);
      warpgroup::load(peaks, shared.peaks[stage]);
      invert(rows.inverse);
      warpgroup::mma_wait<1>(scores);
      weigh_scores(weights, scores, params, shared, stage, tokens, own);
      warpgroup::mma_wait<0>(products);
      weight_gradients(gradients, products, rows);
      score_gradients(gradients, weights, peaks, load_scalar(params.beta + head) * params.scale);
      add_transposed(dk, shared.ds_smem, gradients, shared.q_smem[stage]);
    });

    Operand dscores;
    if (place.far) {
      add_far_dk(params, shared, place, dk, dscores);
    } else {
      warp::zero(dscores);
    }
    if constexpr (kDocuments) {
      if (!place.tile.is_full()) {
        const auto rows = [&](const TokenRows& array) {
          return tile_rows<T>(array, place.tile, params.seqlen, place.kv_head, place.batch);
        };
        warpgroup::store(rows(params.dk_rows), dk, 0, 0);
        warpgroup::store(rows(params.dscores_rows), dscores, 0, 0);
        return;
      }
    }
    warpgroup::sync();  // ds is read
    warpgroup::store(shared.ds_smem, dscores);
    store(params.dk, shared.dk_smem, dk, place);
    if (warpgroup::leader()) {
      tma::store(params.dscores, shared.ds_smem, 0, place.token, place.kv_head, place.batch);
      tma::commit();
      tma::wait_read<0>();
    }
  }

  // And the gradient of k W.
  __device__ __forceinline__ static void add_far_dk(const KeysParams& params, Shared& shared,
                                                    const Place& place, KeySum& dk,
                                                    Operand& dscores) {
    Square scores, sum;
    PerRow<16> unused;
    warp::zero(unused);
    warpgroup::mm_AB(scores, shared.k_smem, shared.map_smem);
    warpgroup::mma_commit();
    warp::zero(sum);
    warpgroup::mma_wait<0>(scores);
#pragma unroll
    for (int sign = 0; sign < 2; ++sign) {
      Square products, gradients, phi;
      warpgroup::mm_AB(products, shared.v_smem, shared.dstate_smem.template cols<kMap>(sign));
      warpgroup::mma_commit();
      key_features(phi, scores, params, place, sign);
      PerCol<kMap> dnormalizer;
      warp::load(dnormalizer, shared.dnormalizer[sign]);
      warpgroup::mma_wait<0>(products);
      warp::add_cols(gradients, products, dnormalizer);
      softmax_gradients(gradients, phi, unused, sign_of(sign));
      warp::add(sum, sum, gradients);
    }
    warp::convert(dscores, sum);
    warpgroup::mma_ABt(dk, dscores, shared.map_smem);
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(dk, dscores);
  }

  // exp(s - m).
  template <typename TokensOf>
  __device__ __forceinline__ static void weigh_scores(Square& weights, const Square& scores,
                                                      const KeysParams& params,
                                                      const Shared& shared, int stage,
                                                      const TokensOf& tokens, bool own) {
    PerRow<16> largest;
    warpgroup::load(largest, shared.largest[stage]);
    if (own) {
      scale_own_scores(weights, scores, params.scale * kLog2E, tokens);
    } else {
      scale_last_scores(weights, scores, params.scale * kLog2E, tokens);
    }
    weigh(weights, largest);
  }

  // sum += pairs^T tokens, of queries in rows.
  template <typename Sum, typename Tile>
  __device__ __forceinline__ static void add_transposed(Sum& sum, const PairTile& smem,
                                                        const Square& pairs, const Tile& tokens) {
    warpgroup::sync();  // what was there is read
    warpgroup::store(smem, pairs);
    publish_shared();
    warpgroup::sync();
    warpgroup::mma_AtB(sum, smem, tokens);
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(sum);
  }

  __device__ __forceinline__ static void key_features(Square& phi, const Square& scores,
                                                      const KeysParams& params, const Place& place,
                                                      int sign) {
    softmax(phi, scores, sign);
    drop_rows(phi, place.token, first_token(params.first, place.batch));
  }

  template <typename Tile, typename Sum>
  __device__ __forceinline__ static void store(const TensorMap& map, const Tile& smem,
                                               const Sum& sum, const Place& place) {
    warpgroup::store(smem, sum);
    publish_shared();
    warpgroup::sync();
    if (warpgroup::leader()) {
      tma::store(map, smem, 0, place.token, place.kv_head, place.batch);
      tma::commit();
      tma::wait_read<0>();
    }
  }
};

template <typename Traits>
__device__ __forceinline__ void keys(const KeysParams& params) {
  if constexpr (Traits::kDocuments) {
    if (is_beyond(params.documents, grid::block_x(), grid::block_z())) return;
  }
  block::run<Keys<Traits>>(params);
}

}  // namespace tk::hedgehog_attention
