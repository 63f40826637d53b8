// One token and the latest two windows: they move on by it, and its queries see them.
//
//   windows <- [windows[1:], token],  p as hedgehog_attention.h has it for the keys in them
//   out = (sum p v + what is older) / (sum p + what that has for a divisor)
//
// (Zhang et al., "LoLCATs", 2024, section 3.2, for one query.) What is older, the sums of linear
// attention, is state_step/columns.cuh's. Grid: heads of keys, 1, batch; a block of one warpgroup.
// The copy engine brings both windows from their second token on, and takes them back to their
// first place once the token stands behind them: each is read and written once, in place. Features
// of the keys are a product with the map on the tensor cores, of which only weights are made.
// Budget at D = V = 128: 88 KB of shared memory, so that two blocks share a multiprocessor and 128
// KB are in flight; 64 registers of products with the map. Limit: memory.
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

  using Vec = SharedVec<float, 64>;
  using RowVec = SharedVec<float, 16>;  // of a warp's rows of a chunk
  struct Shared {
    SharedTile<T, kTokens, kKeyDim> keys_smem;
    SharedTile<T, kTokens, kValueDim> values_smem;
    SharedTile<T, kKeyDim, kMap> map_smem;
    Vec token_key[kKeyParts], token_value[kValueParts];
    Vec query[kKeyParts];
    MapVec features[2];
    RowVec scores[2][kWarps], weights[2][kWarps];
    Vec totals[kValueParts][kWarps];
    Barrier windows_full, query_full;
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
    shared.query_full.init(1);
    publish_barriers();
    shared.windows_full.expect(sizeof(shared.keys_smem.data) + sizeof(shared.values_smem.data) +
                               sizeof(shared.map_smem.data) +
                               (kKeyParts + kValueParts) * Vec::kBytes);
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk) {
      // From the second token on: the last row is none, and comes as zeros.
      const int row = chunk * kChunk + 1;
      tma::load(shared.keys_smem.template rows<kChunk>(chunk), params.keys, shared.windows_full,
                tma::Keep::kBriefly, 0, row, head, batch);
      tma::load(shared.values_smem.template rows<kChunk>(chunk), params.values, shared.windows_full,
                tma::Keep::kBriefly, 0, row, head, batch);
    }
    tma::load(shared.map_smem, params.k_map, shared.windows_full, tma::Keep::kLong, 0, 0, head);
    const int64 token = static_cast<int64>(batch) * params.num_kv_heads + head;
    load_vector(shared.token_key, params.token_key + token * kKeyDim, shared.windows_full);
    load_vector(shared.token_value, params.token_value + token * kValueDim, shared.windows_full);
  }
  // One thread.
  __device__ __forceinline__ void load_query(int64 row) const {
    shared.query_full.expect(kKeyParts * Vec::kBytes + 2 * MapVec::kBytes);
    load_vector(shared.query, params.query + row * kKeyDim, shared.query_full);
    load_vector(shared.features, params.features + row * kFeatures, shared.query_full);
  }
  template <int kParts>
  __device__ __forceinline__ static void load_vector(Vec (&dst)[kParts], const float* src,
                                                     Barrier& barrier) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) tma::load(dst[part], src + 64 * part, barrier);
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
    const int64 first = static_cast<int64>(batch) * params.num_heads + head * queries;
    if (warpgroup::leader()) {
      load_windows();
      load_query(first);
    }
    block::sync();
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
                       shared.map_smem);
    }
    warpgroup::mma_commit();
    warpgroup::mma_wait<0>(mapped[0], mapped[1]);
#pragma unroll 1
    for (int r = 0; r < queries; ++r) {
      shared.query_full.wait(r & 1);
      attend(mapped, first + r, load_scalar(params.beta + head * queries + r));
      // All have read the query: they have met since.
      if (r + 1 < queries && warpgroup::leader()) load_query(first + r + 1);
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
    const float older = load_scalar(params.divisors + row);
    warp::map(divisor, divisor, [=](float x) { return x + older; });
    const int size = params.value_dim;
#pragma unroll
    for (int part = 0; part < kValueParts; ++part) {
      PerRow<16> total, added;
      warpgroup::load(total, GlobalVec<const float>{params.sums + row * size, size}, 64 * part,
                      0.0f);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        warpgroup::load(added, shared.totals[part][w]);
        warp::zip(total, total, added, [](float x, float y) { return x + y; });
      }
      warp::zip(total, total, divisor, [](float x, float z) { return z == 0.0f ? 0.0f : x / z; });
      warpgroup::store(GlobalVec<T>{static_cast<T*>(params.out) + row * size, size}, total,
                       64 * part);
    }
  }
};

template <typename Traits>
__device__ __forceinline__ void step(const StepParams& params) {
  using Kernel = Step<Traits>;
  Kernel(params, block::shared_memory<typename Kernel::Shared>()).run();
}

}  // namespace tk::hedgehog_attention
