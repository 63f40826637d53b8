// One token and the latest two windows: they move on by it, and its queries see them.
//
//   windows <- [windows[1:], token],  p as hedgehog_attention.h has it for the keys in them
//   numerators = sum p v,  divisors = sum p
//   phi of the queries, and of the key that leaves the windows, which goes to the sums
//
// (Zhang et al., "LoLCATs", 2024, section 3.2, for one query.) What is older than the windows, the
// sums of linear attention, is state_step/columns.cuh's, which comes after and divides. Grid: heads
// of keys, 1, batch; a block of one warpgroup. The copy engine brings both windows from their
// second token on, and takes them back to their first place once the token stands behind them: each
// is read and written once, in place. Meanwhile, products with the maps on the tensor cores: first
// of a query and of the key that leaves, a row of a warp each, then of the windows' keys, of which
// only weights are made. Budget at D = V = 128: 101 KB of shared memory, so that two blocks share a
// multiprocessor and 128 KB of windows are in flight; 64 registers of products. Limit: memory.
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
  static constexpr int kQueryWarp = 0, kKeyWarp = 1;  // whose products have their features
  static constexpr int kKeyParts = kKeyDim / 64, kValueParts = kValueDim / 64;
  static constexpr int kWarps = kStepThreads / 32;

  using Vec = SharedVec<float, 64>;
  using RowVec = SharedVec<float, 16>;  // of a warp's rows of a chunk
  struct Shared {
    SharedTile<T, kTokens, kKeyDim> keys_smem;
    SharedTile<T, kTokens, kValueDim> values_smem;
    SharedTile<T, kKeyDim, kMap> k_map_smem, q_map_smem;
    Vec token_key[kKeyParts], token_value[kValueParts];
    Vec query[kKeyParts];
    MapVec features[2];
    RowVec scores[2][kWarps], weights[2][kWarps];
    Vec totals[kValueParts][kWarps];
    Barrier windows_full, k_map_full, q_map_full;
  };
  static_assert(sizeof(Shared) + 1024 <= step_shared_bytes(kKeyDim, kValueDim),
                "hedgehog_attention.h's step_shared_bytes covers the kernel's shared memory");

  const StepParams& params;
  Shared& shared;
  const int head, batch;  // of keys
  const int position;     // of the token in its sequence

  __device__ __forceinline__ Step(const StepParams& params, Shared& shared)
      : params(params),
        shared(shared),
        head(grid::block_x()),
        batch(grid::block_z()),
        position(load_scalar(params.length + batch)) {}

  // One thread.
  __device__ __forceinline__ void load_windows() const {
    shared.windows_full.init(1);
    shared.k_map_full.init(1);
    shared.q_map_full.init(1);
    publish_barriers();
    shared.windows_full.expect(sizeof(shared.keys_smem.data) + sizeof(shared.values_smem.data));
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk) {
      // From the second token on: the last row is none, and comes as zeros.
      const int row = chunk * kChunk + 1;
      tma::load(shared.keys_smem.template rows<kChunk>(chunk), params.keys, shared.windows_full,
                tma::Keep::kBriefly, 0, row, head, batch);
      tma::load(shared.values_smem.template rows<kChunk>(chunk), params.values, shared.windows_full,
                tma::Keep::kBriefly, 0, row, head, batch);
    }
    shared.k_map_full.expect(sizeof(shared.k_map_smem.data));
    tma::load(shared.k_map_smem, params.k_map, shared.k_map_full, tma::Keep::kLong, 0, 0, head);
  }
  // One thread.
  __device__ __forceinline__ void load_query_map(int query_head) const {
    shared.q_map_full.expect(sizeof(shared.q_map_smem.data));
    tma::load(shared.q_map_smem, params.q_map, shared.q_map_full, tma::Keep::kLong, 0, 0,
              query_head);
  }

  // A vector of an array [.., size] in rows.
  __device__ __forceinline__ static GlobalVec<const T> vector(const void* array, int64 row,
                                                              int size) {
    return {static_cast<const T*>(array) + row * size, size};
  }
  template <int kParts>
  __device__ __forceinline__ static void share(Vec (&dst)[kParts], const GlobalVec<const T>& src,
                                               float scale) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      PerRow<16> x;
      warpgroup::load(x, src, 64 * part, 0.0f);
      warp::mul(x, x, scale);
      warp::store(tk::part<16>(dst[part], warp::index()), x);
    }
  }
  // A token's vector as the first row of one warp's share of an operand.
  using Operand = RegTile<T, 16, kKeyDim>;
  __device__ __forceinline__ static void load_row(Operand& dst, const GlobalVec<const T>& src,
                                                  int of_warp) {
    const int rows = warp::index() == of_warp ? 1 : 0;
    warp::load(dst, GlobalView<const T>{src.data, rows, src.size, src.size}, 0, 0);
  }
  // A warp: features of one sign from its first row of scores; other rows become zeros.
  __device__ __forceinline__ static void first_row_features(Square& dst, const Square& scores,
                                                            int sign, float factor) {
    PerRow<16> inverse;
    exponentials(dst, inverse, scores, sign);
    warp::for_each(inverse, [=](int row, float x) { return row == 0 ? factor * x : 0.0f; });
    warp::mul_rows(dst, dst, inverse);
  }
  __device__ __forceinline__ static void store_features(float* dst, const Square& features,
                                                        int sign) {
    warp::store(GlobalView<float>{dst + sign * kMap, 1, kMap, kMap}, features, 0, 0);
  }

  // What leaves the windows, if anything does: to the sums, which are nothing before the first.
  __device__ __forceinline__ void pass_on() const {
    const bool leaves = position >= kTokens;
    const int64 token = static_cast<int64>(batch) * params.num_kv_heads + head;
    const int64 first = static_cast<int64>(batch) * kTokens * params.num_kv_heads + head;
    PerRow<16> x;
    const int values = leaves ? params.value_dim : 0;
    const GlobalVec<const T> value{
        static_cast<const T*>(params.old_values) + first * params.value_dim, values};
#pragma unroll
    for (int part = 0; part < kValueParts; ++part) {
      warpgroup::load(x, value, 64 * part, 0.0f);
      warpgroup::store(
          GlobalVec<T>{static_cast<T*>(params.value) + token * params.value_dim, params.value_dim},
          x, 64 * part);
    }
    warp::fill(x, position > kTokens ? 1.0f : 0.0f);
    warpgroup::store(GlobalVec<float>{params.decays + token, 1}, x, 0);

    Operand key;
    load_row(key, vector(params.old_keys, first, params.key_dim), leaves ? kKeyWarp : kWarps);
    shared.k_map_full.wait(0);
    Square scores, features;
    warpgroup::mm_AB(scores, key, shared.k_map_smem);
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(scores, key);
    if (warp::index() == kKeyWarp) {
#pragma unroll
      for (int sign = 0; sign < 2; ++sign) {
        first_row_features(features, scores, sign, leaves ? 1.0f : 0.0f);
        store_features(params.key_features + token * kFeatures, features, sign);
      }
    }
  }
  // The query's vector and features: the next sync of the block is before their use.
  __device__ __forceinline__ void make_query(int64 row, int query_head, int phase) const {
    const auto query = vector(params.query, row, params.key_dim);
    share(shared.query, query, params.scale);
    Operand operand;
    load_row(operand, query, kQueryWarp);
    shared.q_map_full.wait(phase);
    Square scores, features;
    warpgroup::mm_AB(scores, operand, shared.q_map_smem);
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(scores, operand);
    if (warp::index() == kQueryWarp) {
      const float alpha = load_scalar(params.alpha + query_head);
#pragma unroll
      for (int sign = 0; sign < 2; ++sign) {
        first_row_features(features, scores, sign, alpha);
        store_features(params.features + row * kFeatures, features, sign);
        PerCol<kMap> columns;
        warp::col_sum(columns, features);
        warp::store(shared.features[sign], columns);
      }
    }
  }

  // One warp: the token becomes the last row of a window.
  template <typename Window, int kParts>
  __device__ __forceinline__ static void insert(const Window& window, const Vec (&token)[kParts]) {
    PerRow<16> is_last;
    warp::zero(is_last);
    warp::for_each(is_last, [](int row, float) { return row == 15 ? 1.0f : 0.0f; });
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const auto place = window.template rows<16>(kTokens / 16 - 1).template cols<64>(part);
      PerCol<64> cols;
      RegTile<float, 16, 64> tile, added;
      warp::load(cols, token[part]);
      warp::load(tile, place);  // zeros in its last row
      warp::outer(added, is_last, cols, [](float last, float x) { return last > 0 ? x : 0.0f; });
      warp::add(tile, tile, added);
      warp::store(place, tile);
    }
  }

  __device__ __forceinline__ void run() const {
    const int queries = params.num_heads / params.num_kv_heads;
    const int first_head = head * queries;
    const int64 first = static_cast<int64>(batch) * params.num_heads + first_head;
    const int64 token = static_cast<int64>(batch) * params.num_kv_heads + head;
    if (warpgroup::leader()) {
      load_windows();
      load_query_map(first_head);
    }
    share(shared.token_key, vector(params.token_key, token, params.key_dim), 1.0f);
    share(shared.token_value, vector(params.token_value, token, params.value_dim), 1.0f);
    block::sync();
    pass_on();
    make_query(first, first_head, 0);
    shared.windows_full.wait(0);
    if (warp::index() == 0) insert(shared.keys_smem, shared.token_key);
    if (warp::index() == 1) insert(shared.values_smem, shared.token_value);
    publish_shared();
    block::sync();
    if (warpgroup::leader()) {
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk) {
        tma::store(params.keys, shared.keys_smem.template rows<kChunk>(chunk), 0, chunk * kChunk,
                   head, batch);
        tma::store(params.values, shared.values_smem.template rows<kChunk>(chunk), 0,
                   chunk * kChunk, head, batch);
      }
      tma::commit();
    }

    Square mapped[2];
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk) {
      warpgroup::mm_AB(mapped[chunk], shared.keys_smem.template rows<kChunk>(chunk),
                       shared.k_map_smem);
    }
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(mapped[0], mapped[1]);
#pragma unroll 1
    for (int r = 0;;) {
      attend(mapped, first + r, load_scalar(params.beta + first_head + r));
      if (++r == queries) break;
      // All have read the query before: they have met since.
      if (warpgroup::leader()) load_query_map(first_head + r);
      make_query(first + r, first_head + r, r & 1);
      block::sync();
    }
    if (warpgroup::leader()) tma::wait_read<0>();
  }

  // Of a chunk's tokens: 1 those near the new one, 0 those that are far, -1 those of no sequence.
  __device__ __forceinline__ void kinds(PerRow<16>& dst, int chunk) const {
    warp::zero(dst);
    warpgroup::for_each(dst, [=, this](int row, float) {
      const int back = kTokens - 1 - chunk * kChunk - row;
      if (back > position) return -1.0f;
      return position / kChunk - (position - back) / kChunk <= 1 ? 1.0f : 0.0f;
    });
  }

  __device__ __forceinline__ void attend(const Square (&mapped)[2], int64 row, float beta) const {
    const int warp = warp::index();
    PerRow<16> near[2], far[2], kind;
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk) {
      warp::zero(near[chunk]);
#pragma unroll
      for (int part = 0; part < kKeyParts; ++part) {
        PerCol<64> query;
        RegTile<float, 16, 64> keys;
        warp::load(query, shared.query[part]);
        warpgroup::load(keys,
                        shared.keys_smem.template rows<kChunk>(chunk).template cols<64>(part));
        warp::mul_cols(keys, keys, query);
        warp::fold_row_sum(near[chunk], keys);
      }
      warp::finish_row_sum(near[chunk]);
      kinds(kind, chunk);
      warp::zip(near[chunk], near[chunk], kind,
                [](float s, float k) { return k > 0 ? s : -kInfinity; });
      warp::store(shared.scores[chunk][warp], near[chunk]);
      far_weights(far[chunk], mapped[chunk]);
    }
    block::sync();
    PerRow<16> largest;
    warp::fill(largest, -kInfinity);
    for_each_row_vec(shared.scores, [&](const RegTile<float, 16, 16>& rows) {
      warp::fold_row_max(largest, rows);
    });
    warp::finish_row_max(largest);
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk) {
      kinds(kind, chunk);
      warp::zip(near[chunk], near[chunk], largest,
                [=](float s, float m) { return beta * math::exp2((s - m) * kLog2E); });
      warp::zip(near[chunk], near[chunk], kind, [](float p, float k) { return k > 0 ? p : 0.0f; });
      warp::zip(far[chunk], far[chunk], kind, [](float p, float k) {
        return k > 0 ? 0.0f : k < 0 ? -1.0f : p;
      });
      // Weights, which are not negative, or -1 for tokens that are none.
      warp::zip(near[chunk], near[chunk], far[chunk], [](float x, float y) { return x + y; });
      warp::store(shared.weights[chunk][warp], near[chunk]);
    }
#pragma unroll
    for (int part = 0; part < kValueParts; ++part) {
      PerCol<64> total;
      warp::zero(total);
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk) {
        RegTile<float, 16, 64> values;
        warpgroup::load(values,
                        shared.values_smem.template rows<kChunk>(chunk).template cols<64>(part));
        warp::map_rows(values, values, near[chunk],
                       [](float v, float p) { return p < 0 ? 0.0f : v * p; });
        warp::fold_col_sum(total, values);
      }
      warp::finish_col_sum(total);
      warp::store(shared.totals[part][warp], total);
    }
    block::sync();
    finish(row);
  }

  // phi(query) phi(key) for each key of a chunk, from the products of keys and the map.
  __device__ __forceinline__ void far_weights(PerRow<16>& weights, const Square& mapped) const {
    warp::zero(weights);
#pragma unroll
    for (int sign = 0; sign < 2; ++sign) {
      Square keys;
      PerRow<16> inverse, product;
      PerCol<kMap> query;
      exponentials(keys, inverse, mapped, sign);
      warp::load(query, shared.features[sign]);
      warp::mul_cols(keys, keys, query);
      warp::row_sum(product, keys);
      warp::zip(product, product, inverse, [](float x, float y) { return x * y; });
      warp::zip(weights, weights, product, [](float x, float y) { return x + y; });
    }
  }

  // Calls f(tile) for tiles whose rows are all what warps have stored of their rows.
  template <typename F>
  __device__ __forceinline__ static void for_each_row_vec(const RowVec (&vecs)[2][kWarps], F&& f) {
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        PerCol<16> cols;
        RegTile<float, 16, 16> rows;
        warp::load(cols, vecs[chunk][w]);
        warp::zero(rows);
        warp::map_cols(rows, rows, cols, [](float, float x) { return x; });
        f(rows);
      }
    }
  }

  __device__ __forceinline__ void finish(int64 row) const {
    PerRow<16> divisor;
    warp::zero(divisor);
    for_each_row_vec(shared.weights, [&](RegTile<float, 16, 16>& rows) {
      warp::map(rows, rows, [](float p) { return p < 0 ? 0.0f : p; });
      warp::fold_row_sum(divisor, rows);
    });
    warp::finish_row_sum(divisor);
    warpgroup::store(GlobalVec<float>{params.divisors + row, 1}, divisor, 0);
    const int size = params.value_dim;
#pragma unroll
    for (int part = 0; part < kValueParts; ++part) {
      PerRow<16> total, added;
      warp::zero(total);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        warpgroup::load(added, shared.totals[part][w]);
        warp::zip(total, total, added, [](float x, float y) { return x + y; });
      }
      warpgroup::store(GlobalVec<float>{params.numerators + row * size, size}, total, 64 * part);
    }
  }
};

template <typename Traits>
__device__ __forceinline__ void step(const StepParams& params) {
  using Kernel = Step<Traits>;
  Kernel(params, block::shared_memory<typename Kernel::Shared>()).run();
}

}  // namespace tk::hedgehog_attention
