// What the sums of weights change of gradients, where outputs are divided by them.
//
// A change of a query's divisor, `changes`, changes all of its weights alike: it is a value more,
// of v always one. In the chunk that is `changes` beside each of the query's dout v^T. Of the
// tokens before the chunk, with first the sum of k and second that of k k^T (normalizer.cuh):
//   dq += changes (s first + s^2 second q),   s = scale
// and of those after it, with first the sum of s changes q and second that of s^2 changes q q^T:
//   dk += first + second k
// Sums are fp32; what a product adds to `second` or reads of it is rounded, as for S.
#pragma once

#include "kernels/based_attention/normalizer.cuh"

namespace tk::based_attention {

template <typename Traits, bool kReverse>
struct NormalizerGradients : Normalizer<Traits> {
  using Base = Normalizer<Traits>;
  using T = typename Traits::T;
  using typename Base::Keys;
  using typename Base::Square;
  using Changes = SharedVec<float, kChunk>;  // of a chunk's divisors

  // As Normalizer's, but for the count, which no gradient depends on.
  __device__ __forceinline__ void share(typename Base::Shared& shared) const {
    if (warp::index() % 4 != 0) return;
    warp::store(shared.second, this->second);
    warp::store(shared.first, this->first);
  }

  // The sums after (reverse: before) a chunk: issues a product that reads keys_t. Reads what
  // `share` has left.
  template <typename Documents, typename KeyTile>
  __device__ __forceinline__ void add(Keys& keys_t, const KeyTile& keys_smem,
                                      const typename Base::Shared& shared,
                                      const Documents& documents, const Changes& changes,
                                      float scale) {
    if constexpr (!kReverse) {
      Base::add(keys_t, keys_smem, shared, documents);
    } else {
      warp::load_transposed(keys_t, keys_smem);
      documents.keep_cols_before(keys_t);
      RegTile<float, 16, kChunk> weighted;
      warp::map_cols(weighted, keys_t, changes,
                     [=](float x, float change) { return x * (change * scale); });
      PerRow<16> sum;
      warp::zero(sum);
      warp::fold_row_sum(sum, weighted);
      warp::finish_row_sum(sum);
      warp::load(this->first, shared.first);
      documents.keep_state(this->first);
      warp::add(this->first, this->first, sum);
      documents.keep_state(this->second);
      warp::mul(weighted, weighted, scale);
      warp::convert(keys_t, weighted);
      warpgroup::mma_AB(this->second, keys_t, keys_smem);
    }
  }

  // sum = what they change of dq (reverse: of dk), `products` being q (k) times `second`.
  template <typename Documents>
  __device__ __forceinline__ void start_sum(Square& sum, const Square& products,
                                            const typename Base::Shared& shared,
                                            const Documents& documents, const Changes& changes,
                                            float scale) const {
    if constexpr (kReverse) {
      warp::map_cols(sum, products, shared.first, [](float x, float first) { return x + first; });
      documents.keep_rows_after(sum);
    } else {
      PerRow<16> factors;
      warpgroup::load(factors, changes);
      documents.keep_rows_before(factors);
      warp::map(factors, factors, [=](float x) { return x * scale; });
      warp::map_cols(sum, products, shared.first,
                     [=](float x, float first) { return math::fma(x, scale, first); });
      warp::mul_rows(sum, sum, factors);
    }
  }

  // A query's change beside all of its dp, of which it has a row (reverse: a column).
  template <typename Dp>
  __device__ __forceinline__ static void change(Dp& dp, const Changes& changes) {
    const auto plus = [](float x, float change) { return x + change; };
    if constexpr (kReverse) {
      warp::map_cols(dp, dp, changes, plus);
    } else {
      PerRow<16> rows;
      warpgroup::load(rows, changes);
      warp::map_rows(dp, dp, rows, plus);
    }
  }
};

}  // namespace tk::based_attention
