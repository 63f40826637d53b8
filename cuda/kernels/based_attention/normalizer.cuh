// What a query's output is divided by: the sum of its weights.
//
// Of the tokens before the chunk it is
//   count + s q . first + (s^2 / 2) q . (second q),   s = scale
// with first the sum of k and second that of k k^T: the state of values that are one, in the form
// that small products of matrices make it, without a column of ones that would be a slice of its
// own. Sums are fp32; `second` is rounded to the type of its products, as S is.
#pragma once

#include "kernels/based_attention/parts.cuh"

namespace tk::based_attention {

template <typename Traits>
struct Normalizer {
  using T = typename Traits::T;
  static constexpr int kWidth = tile_columns(Traits::kDim);
  static_assert(kWidth == 16, "a warp has all rows of the sums");
  using Square = RegTile<float, 16, kWidth>;
  using Keys = RegTile<T, 16, kChunk>;  // a row for each value of a key

  // What products and queries read, for all warps.
  struct Shared {
    SharedTile<T, 16, kWidth> second;
    SharedVec<float, 16> first, count;
  };

  Square second;            // in every warp
  PerRow<16> first, count;  // from `add` to `share`; the count is the same in every row

  // From sums [18, 16]: second, first, and the count as the first number of the last row.
  __device__ __forceinline__ void start(const float* sums) {
    if (sums == nullptr) {
      warp::zero(second);
      warp::zero(first);
      warp::zero(count);
      return;
    }
    Square column;
    warp::load(second, GlobalView<const float>{sums, 16, 16, 16}, 0, 0);
    warp::load(column, GlobalView<const float>{sums + 16 * 16, 16, 1, 1}, 0, 0);
    warp::row_sum(first, column);
    warp::fill(count, load_scalar(sums + 17 * 16));
  }

  // Before a publish_shared and a sync.
  __device__ __forceinline__ void share(Shared& shared) const {
    if (warp::index() % 4 != 0) return;  // all have the same
    warp::store(shared.second, second);
    warp::store(shared.first, first);
    warp::store(shared.count, count);
  }

  // The sums but the count after a chunk: issues a product that reads keys_t, which are the chunk's
  // keys as far as they are left.
  template <typename Documents, typename KeyTile>
  __device__ __forceinline__ void add(Keys& keys_t, const KeyTile& k_smem, const Shared& shared,
                                      const Documents& documents) {
    warp::load_transposed(keys_t, k_smem);
    documents.keep_cols_after(keys_t);
    warp::load(first, shared.first);
    PerRow<16> sum;
    warp::zero(sum);
    warp::fold_row_sum(sum, keys_t);
    warp::finish_row_sum(sum);
    documents.keep_state(first);
    warp::add(first, first, sum);
    documents.keep_state(second);
    warpgroup::mma_AB(second, keys_t, k_smem);
  }
  template <typename Documents>
  __device__ __forceinline__ void add_count(const Shared& shared, const Documents& documents) {
    warp::load(count, shared.count);
    documents.keep_state(count);
    documents.add_count(count);
  }

  // totals = the sums of weights: of those before the chunk, `products` being q second, and of the
  // weights of the chunk.
  template <typename Documents, typename KeyTile, typename Weights>
  __device__ __forceinline__ void total(PerRow<16>& totals, const Square& products,
                                        const Weights& weights, const KeyTile& q_smem,
                                        const Shared& shared, const Documents& documents,
                                        const ProductFactors& factors) const {
    RegTile<T, 16, kWidth> q;
    warpgroup::load(q, q_smem);
    warp::zero(totals);
    warp::fold_row_dot(totals, q, products);
    warp::mul(totals, totals, factors.squares);
    Square linear;
    const float scale = factors.values;
    warp::map_cols(linear, q, shared.first, [=](float x, float k) { return x * k * scale; });
    warp::fold_row_sum(totals, linear);
    documents.keep_rows_before(totals);
    warp::fold_row_sum(totals, weights);
    warp::finish_row_sum(totals);
    PerRow<16> counts;
    warp::load(counts, shared.count);
    documents.keep_rows_before(counts);
    warp::add(totals, totals, counts);
  }
};

}  // namespace tk::based_attention
