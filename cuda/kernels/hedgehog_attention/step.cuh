// One token and the latest two windows: they move on by it, and its queries see them.
//
//   windows <- [windows[1:], token],  p as hedgehog_attention.h has it for the keys in them
//   numerators = sum p v,  divisors = sum p
//   phi of the queries, and of the key that leaves the windows, which goes to the sums
//
// (Zhang et al., "LoLCATs", 2024, section 3.2, for one query.) What is older than the windows, the
// sums of linear attention, is state_step/columns.cuh's, which comes after and divides. Grid: heads
// of keys, 1, batch; a block of two warpgroups, a window for each. The copy engine brings windows
// from their second token on, and takes them back to their first place once the token stands behind
// them: each is read and written once, in place. Meanwhile, products with the maps on the tensor
// cores, one warpgroup's of the key that leaves and the other's of a query, a row of a tile; then
// of the windows' keys, of which only weights are made. Budget at D = V = 128: 104 KB of shared
// memory and 128 registers, so that two blocks share a multiprocessor and 128 KB of windows are in
// flight. Limit: memory.
#pragma once

#include "kernels/hedgehog_attention/features.cuh"
#include "tk/tk.cuh"

namespace tk::hedgehog_attention {

template <typename T_, int kKeyDim_, int kValueDim_>
struct StepTraits {
  using T = T_;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr int kValueDim = kValueDim_;
};

template <typename Traits>
struct Step {
  using T = typename Traits::T;
  static constexpr int kKeyDim = Traits::kKeyDim;
  static constexpr int kValueDim = Traits::kValueDim;
  static constexpr int kTokens = 2 * kChunk;
  static constexpr int kKeyParts = kKeyDim / 64, kValueParts = kValueDim / 64;
  static constexpr int kWarps = kStepThreads / 32;
  // Whose features a warpgroup makes: those of the key that leaves, or of a query.
  enum Role : int { kLeaving = 0, kQuery = 1 };

  using Vec = SharedVec<float, 64>;
  using RowVec = SharedVec<float, 16>;  // of a warp's rows of a window
  struct Shared {
    SharedTile<T, kTokens, kKeyDim> keys_smem;
    SharedTile<T, kTokens, kValueDim> values_smem;
    SharedTile<T, kKeyDim, kMap> maps_smem[2];
    SharedVec<float, kKeyDim> rows[2];  // what features are made of
    SharedVec<float, kKeyDim> token_key;
    SharedVec<float, kValueDim> token_value;
    MapVec features[2];
    RowVec scores[kWarps], weights[kWarps];
    Vec totals[kValueParts][kWarps];
    Barrier keys_full, values_full, maps_full[2];
  };
  static_assert(sizeof(Shared) + 1024 <= step_shared_bytes(kKeyDim, kValueDim),
                "hedgehog_attention.h's step_shared_bytes covers the kernel's shared memory");

  const StepParams& params;
  Shared& shared;
  const int head, batch;  // of keys
  const int warp;         // of the warpgroup's
  const int role;         // and which window is the warpgroup's
  const int position;     // of the token in its sequence

  __device__ __forceinline__ Step(const StepParams& params, Shared& shared)
      : params(params),
        shared(shared),
        head(grid::block_x()),
        batch(grid::block_z()),
        warp(warp::uniform_index() & 3),
        role(warp::uniform_index() / 4),
        position(load_scalar(params.length + batch)) {}

  __device__ __forceinline__ int warp_of_block() const { return 4 * role + warp; }

  // One thread: both windows of keys, or of values.
  template <typename Tile>
  __device__ __forceinline__ void load_windows(const Tile& tile, const TensorMap& map,
                                               Barrier& full) const {
    full.init(1);
    publish_barriers();
    full.expect(sizeof(tile.data));
#pragma unroll
    for (int window = 0; window < 2; ++window) {
      // From the second token on: the last row is none, and comes as zeros.
      tma::load(tile.template rows<kChunk>(window), map, full, tma::Keep::kBriefly, 0,
                window * kChunk + 1, head, batch);
    }
  }
  // One thread.
  __device__ __forceinline__ void load_map(int of_role, int of_head) const {
    shared.maps_full[of_role].expect(sizeof(shared.maps_smem[of_role].data));
    tma::load(shared.maps_smem[of_role], of_role == kQuery ? params.q_map : params.k_map,
              shared.maps_full[of_role], tma::Keep::kLong, 0, 0, of_head);
  }
  // One thread.
  __device__ __forceinline__ void store_window(int window) const {
    tma::store(params.keys, shared.keys_smem.template rows<kChunk>(window), 0, window * kChunk,
               head, batch);
    tma::store(params.values, shared.values_smem.template rows<kChunk>(window), 0, window * kChunk,
               head, batch);
    tma::commit();
  }

  // A vector of an array [.., size] in rows.
  __device__ __forceinline__ static GlobalVec<const T> vector(const void* array, int64 row,
                                                              int size) {
    return {static_cast<const T*>(array) + row * size, size};
  }
  // The block: sixteen values to a warp.
  __device__ __forceinline__ void fetch(PerRow<16>& dst, const GlobalVec<const T>& src) const {
    warp::load(dst, src, 16 * warp_of_block(), 0.0f);
  }
  template <int kDim>
  __device__ __forceinline__ void share(SharedVec<float, kDim>& dst, const PerRow<16>& src) const {
    if (16 * warp_of_block() < kDim) warp::store(tk::part<16>(dst, warp_of_block()), src);
  }

  // What is large, by a thread of two warps of each warpgroup.
  __device__ __forceinline__ void load_tiles(int query_head) const {
    if (warp == 0 && warp::elect()) {
      if (role == kQuery) {
        load_windows(shared.values_smem, params.values, shared.values_full);
      } else {
        load_windows(shared.keys_smem, params.keys, shared.keys_full);
      }
    }
    if (warp == 1 && warp::elect()) {
      shared.maps_full[role].init(1);
      publish_barriers();
      load_map(role, role == kQuery ? query_head : head);
    }
  }
  // What is small, of which all is asked for before any is waited for. What leaves the windows, if
  // anything does, goes to the sums, which are nothing before the first.
  __device__ __forceinline__ void share_vectors(int64 row, int64 token) const {
    const int64 oldest = static_cast<int64>(batch) * kTokens * params.num_kv_heads + head;
    const int key_dim = params.key_dim, value_dim = params.value_dim;
    PerRow<16> query, old_key, token_key, old_value, token_value;
    fetch(query, vector(params.query, row, key_dim));
    fetch(old_key, vector(params.old_keys, oldest, key_dim));
    fetch(token_key, vector(params.token_key, token, key_dim));
    fetch(token_value, vector(params.token_value, token, value_dim));
    fetch(old_value, vector(params.old_values, oldest, value_dim));
    share(shared.rows[kQuery], query);
    share(shared.token_key, token_key);
    share(shared.token_value, token_value);
    if (position < kTokens) {
      warp::zero(old_key);
      warp::zero(old_value);
    }
    share(shared.rows[kLeaving], old_key);
    const int first = 16 * warp_of_block();
    warp::store(GlobalVec<T>{static_cast<T*>(params.value) + token * value_dim, value_dim},
                old_value, first);
    PerRow<16> decay;
    warp::fill(decay, position > kTokens ? 1.0f : 0.0f);
    warp::store(GlobalVec<float>{params.decays + token, 1}, decay, first);
  }

  // A warpgroup: factor phi(x) of its row x, the first of two warps' shares of an operand, of which
  // each has one sign of the features. To an array, and a query's for the block, which meets before
  // their use.
  __device__ __forceinline__ void make_features(float* dst, float factor, int phase) const {
    RegTile<T, 16, kKeyDim> operand;
    {
      PerRow<16> is_first;
      warp::zero(is_first);
      warp::for_each(is_first, [](int row, float) { return row == 0 ? 1.0f : 0.0f; });
      if (warp >= 2) warp::zero(is_first);
      warp::zero(operand);
      warp::map_cols(operand, operand, shared.rows[role], [](float, float x) { return x; });
      warp::map_rows(operand, operand, is_first,
                     [](float x, float first) { return first > 0 ? x : 0.0f; });
    }
    Square scores, features;
    shared.maps_full[role].wait(phase);
    warpgroup::mm_AB(scores, operand, shared.maps_smem[role]);
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(scores, operand);
    if (warp >= 2) return;
    const int sign = warp;
    PerRow<16> inverse;
    exponentials(features, inverse, scores, sign);
    warp::for_each(inverse, [=](int row, float x) { return row == 0 ? factor * x : 0.0f; });
    warp::mul_rows(features, features, inverse);
    warp::store(GlobalView<float>{dst + sign * kMap, 1, kMap, kMap}, features, 0, 0);
    if (role == kQuery) warp::store_col_sum(shared.features[sign], features);
  }

  // One warp: the token's values of a panel become the last row of a window.
  template <typename Window>
  __device__ __forceinline__ static void insert(const Window& window, const Vec& token) {
    const auto place = window.template rows<16>(kTokens / 16 - 1);
    PerRow<16> is_last;
    PerCol<64> cols;
    RegTile<float, 16, 64> tile, added;
    warp::zero(is_last);
    warp::for_each(is_last, [](int row, float) { return row == 15 ? 1.0f : 0.0f; });
    warp::load(cols, token);
    warp::load(tile, place);  // zeros in its last row
    warp::outer(added, is_last, cols, [](float last, float x) { return last > 0 ? x : 0.0f; });
    warp::add(tile, tile, added);
    warp::store(place, tile);
  }
  // The warps that make no features, each a panel.
  __device__ __forceinline__ void insert_token() const {
    const int part = warp - 2;
    if (role == kLeaving && part >= 0 && part < kKeyParts) {
      insert(shared.keys_smem.template cols<64>(part), tk::part<64>(shared.token_key, part));
    }
    if (role == kQuery && part >= 0 && part < kValueParts) {
      insert(shared.values_smem.template cols<64>(part), tk::part<64>(shared.token_value, part));
    }
  }

  __device__ __forceinline__ void run() const {
    const int queries = params.num_heads / params.num_kv_heads;
    const int first_head = head * queries;
    const int64 first = static_cast<int64>(batch) * params.num_heads + first_head;
    const int64 token = static_cast<int64>(batch) * params.num_kv_heads + head;
    const float alpha = load_scalar(params.alpha + first_head);
    float beta = load_scalar(params.beta + first_head);
    load_tiles(first_head);
    share_vectors(first, token);
    block::sync();
    const bool is_query = role == kQuery;
    const float leaves = position >= kTokens ? 1.0f : 0.0f;
    make_features(
        is_query ? params.features + first * kFeatures : params.key_features + token * kFeatures,
        is_query ? alpha : leaves, 0);
    shared.keys_full.wait(0);
    shared.values_full.wait(0);
    insert_token();
    publish_shared();
    block::sync();
    if (warpgroup::leader()) store_window(role);

    shared.maps_full[kLeaving].wait(0);
#pragma unroll 1
    for (int r = 0;;) {
      // Again for each query: kept between them, products would take the registers that making the
      // next one's features needs.
      Square mapped;
      PerRow<16> near;
      warpgroup::mm_AB(mapped, shared.keys_smem.template rows<kChunk>(role),
                       shared.maps_smem[kLeaving]);
      warpgroup::mma_commit();
      near_scores(near);
      warpgroup::mma_wait<0>(mapped);
      // All have met since the product with the map before.
      if (r + 1 < queries && is_query && warpgroup::leader()) load_map(kQuery, first_head + r + 1);
      attend(near, mapped, first + r, beta);
      if (++r == queries) break;
      next_query(first + r, first_head + r, r & 1);
      beta = load_scalar(params.beta + first_head + r);
      block::sync();
    }
    if (warpgroup::leader()) tma::wait_read<0>();
  }
  // All have met since they have read the query before.
  __device__ __forceinline__ void next_query(int64 row, int query_head, int phase) const {
    PerRow<16> query;
    fetch(query, vector(params.query, row, params.key_dim));
    share(shared.rows[kQuery], query);
    block::sync();
    if (role == kQuery) {
      const float alpha = load_scalar(params.alpha + query_head);
      make_features(params.features + row * kFeatures, alpha, phase);
    }
  }

  // Of a window's tokens: 1 those near the new one, 0 those that are far, -1 those of no sequence.
  __device__ __forceinline__ void kinds(PerRow<16>& dst) const {
    warp::zero(dst);
    warpgroup::for_each(dst, [=, this](int row, float) {
      const int back = kTokens - 1 - role * kChunk - row;
      if (back > position) return -1.0f;
      return position / kChunk - (position - back) / kChunk <= 1 ? 1.0f : 0.0f;
    });
  }

  // scale q k, before it is known which keys are near.
  __device__ __forceinline__ void near_scores(PerRow<16>& scores) const {
    warp::zero(scores);
#pragma unroll 1
    for (int part = 0; part < kKeyParts; ++part) {
      RegTile<float, 16, 64> keys;
      warpgroup::load(keys, shared.keys_smem.template rows<kChunk>(role).template cols<64>(part));
      warp::map_cols(keys, keys, tk::part<64>(shared.rows[kQuery], part),
                     [](float k, float q) { return k * q; });
      warp::fold_row_sum(scores, keys);
    }
    warp::finish_row_sum(scores);
    warp::mul(scores, scores, params.scale);
  }

  __device__ __forceinline__ void attend(const PerRow<16>& scores, const Square& mapped, int64 row,
                                         float beta) const {
    PerRow<16> kind, near, far, largest;
    kinds(kind);
    warp::zip(near, scores, kind, [](float s, float k) { return k > 0 ? s : -kInfinity; });
    warp::store(shared.scores[warp_of_block()], near);
    far_weights(far, mapped);
    block::sync();
    warp::fill(largest, -kInfinity);
    for_each_row_vec(shared.scores, [&](const RegTile<float, 16, 16>& rows) {
      warp::fold_row_max(largest, rows);
    });
    warp::finish_row_max(largest);
    warp::zip(near, near, largest,
              [=](float s, float m) { return beta * math::exp2((s - m) * kLog2E); });
    warp::zip(near, near, kind, [](float p, float k) { return k > 0 ? p : 0.0f; });
    warp::zip(far, far, kind, [](float p, float k) { return k > 0 ? 0.0f : k < 0 ? -1.0f : p; });
    // Weights, which are not negative, or -1 for tokens that are none.
    warp::zip(near, near, far, [](float x, float y) { return x + y; });
    warp::store(shared.weights[warp_of_block()], near);
#pragma unroll 1
    for (int part = 0; part < kValueParts; ++part) {
      RegTile<float, 16, 64> values;
      warpgroup::load(values,
                      shared.values_smem.template rows<kChunk>(role).template cols<64>(part));
      warp::map_rows(values, values, near, [](float v, float p) { return p < 0 ? 0.0f : v * p; });
      warp::store_col_sum(shared.totals[part][warp_of_block()], values);
    }
    block::sync();
    finish(row);
  }

  // phi(query) phi(key) for each key of a window, from the products of keys and the map.
  __device__ __forceinline__ void far_weights(PerRow<16>& weights, const Square& mapped) const {
    warp::zero(weights);
#pragma unroll
    for (int sign = 0; sign < 2; ++sign) {
      Square keys;
      PerRow<16> inverse, product;
      exponentials(keys, inverse, mapped, sign);
      warp::map_cols(keys, keys, shared.features[sign], [](float k, float q) { return k * q; });
      warp::row_sum(product, keys);
      warp::zip(product, product, inverse, [](float x, float y) { return x * y; });
      warp::zip(weights, weights, product, [](float x, float y) { return x + y; });
    }
  }

  // Calls f(tile) for tiles whose rows are all what warps have stored of their rows.
  template <typename F>
  __device__ __forceinline__ static void for_each_row_vec(const RowVec (&vecs)[kWarps], F&& f) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      PerCol<16> cols;
      RegTile<float, 16, 16> rows;
      warp::load(cols, vecs[w]);
      warp::zero(rows);
      warp::map_cols(rows, rows, cols, [](float, float x) { return x; });
      f(rows);
    }
  }

  // A warpgroup: sixty-four of the numerators, if there are so many, and one of both the divisor.
  __device__ __forceinline__ void finish(int64 row) const {
    if (role < kValueParts) {
      PerRow<16> total, added;
      warp::zero(total);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        warpgroup::load(added, shared.totals[role][w]);
        warp::zip(total, total, added, [](float x, float y) { return x + y; });
      }
      const int size = params.value_dim;
      warpgroup::store(GlobalVec<float>{params.numerators + row * size, size}, total, 64 * role);
    }
    if (role == kQuery) return;
    PerRow<16> divisor;
    warp::zero(divisor);
    for_each_row_vec(shared.weights, [&](RegTile<float, 16, 16>& rows) {
      warp::map(rows, rows, [](float p) { return p < 0 ? 0.0f : p; });
      warp::fold_row_sum(divisor, rows);
    });
    warp::finish_row_sum(divisor);
    warpgroup::store(GlobalVec<float>{params.divisors + row, 1}, divisor, 0);
  }
};

template <typename Traits>
__device__ __forceinline__ void step(const StepParams& params) {
  using Kernel = Step<Traits>;
  Kernel(params, block::shared_memory<typename Kernel::Shared>()).run();
}

}  // namespace tk::hedgehog_attention
