// The near keys of a chunk's queries: those of the chunk before, and those up to their own in
// theirs.
//
// Scores are in base 2, scale / ln 2 times q k, and -inf where a key is not near.
#pragma once

#include "kernels/hedgehog_attention/features.cuh"
#include "tk/tk.cuh"

namespace tk::hedgehog_attention {

// Where a chunk is: its first token, and the first token that is one.
struct Tokens {
  int chunk_first, first;
};

// Of the keys of the chunk before.
__device__ __forceinline__ void scale_last_scores(Square& dst, const Square& src, float scale_log2,
                                                  const Tokens& tokens) {
  warp::mul(dst, src, scale_log2);
  const int start = tokens.first - (tokens.chunk_first - kChunk);
  if (start > 0) {
    warpgroup::for_each(dst, [=](int, int col, float x) { return col < start ? -kInfinity : x; });
  }
}
// Of the keys of the chunk itself.
__device__ __forceinline__ void scale_own_scores(Square& dst, const Square& src, float scale_log2,
                                                 const Tokens& tokens) {
  warp::mul(dst, src, scale_log2);
  warpgroup::keep_lower(dst, 0, -kInfinity);
  const int start = tokens.first - tokens.chunk_first;
  if (start > 0) {
    warpgroup::for_each(dst, [=](int, int col, float x) { return col < start ? -kInfinity : x; });
  }
}

// The largest of each row; 0 for a row that is no token, and sees nothing.
__device__ __forceinline__ void largest_score(PerRow<16>& largest, const Square& last,
                                              const Square& own) {
  warp::fill(largest, -kInfinity);
  warp::fold_row_max(largest, last);
  warp::fold_row_max(largest, own);
  warp::finish_row_max(largest);
  warp::map(largest, largest, [](float m) { return m == -kInfinity ? 0.0f : m; });
}

// exp2(scores - largest), in place.
__device__ __forceinline__ void weigh(Square& scores, const PerRow<16>& largest) {
  warp::map_rows(scores, scores, largest, [](float s, float m) { return math::exp2(s - m); });
}

// beta exp(s - m): beta joins the exponent, exp2(s - m + log2 beta), which is 0 where beta is.
__device__ __forceinline__ void weigh_near(Square& scores, const PerRow<16>& largest, float beta) {
  const float beta_log2 = math::log2(beta);
  PerRow<16> shift;
  warp::map(shift, largest, [=](float m) { return (m == -kInfinity ? 0.0f : m) - beta_log2; });
  weigh(scores, shift);
}

// Of two consumers: the scores of one chunk's keys, and their largest.
template <typename TokensOf>
__device__ __forceinline__ void scale_half(Square& dst, PerRow<16>& largest, const Square& scores,
                                           float scale_log2, const TokensOf& tokens, int consumer) {
  if (consumer == 0) {
    scale_last_scores(dst, scores, scale_log2, tokens);
  } else {
    scale_own_scores(dst, scores, scale_log2, tokens);
  }
  warp::row_max(largest, dst);
}

// Scores are scaled, and their largest subtracted, in one instruction: exp2(scale s - m) with m the
// rounded product of scale and the largest. That moves a row's near weights by up to m 2^-24 ln 2
// together, so where a score is beyond this, which is 1/16384 of a weight, they are scaled before.
constexpr float kLargestUnscaled = 1024.0f;

// Of one: weights of the keys of the last chunk and of this one, of which divisors are the sums.
template <typename T, typename TokensOf>
__device__ __forceinline__ void weigh_keys(RegTile<T, 16, 64>& last_weights,
                                           RegTile<T, 16, 64>& weights, PerRow<16>& divisors,
                                           const Square& last_scores, const Square& scores,
                                           float scale_log2, float beta, const TokensOf& tokens) {
  Square last = last_scores, own = scores;
  float scale = scale_log2;  // of what stands in both
  const auto apply_scale = [&] {
    warp::mul(last, last, scale);
    warp::mul(own, own, scale);
    scale = 1.0f;
  };
  if (!(scale > 0.0f)) apply_scale();  // which changes what is largest
  scale_last_scores(last, last, 1.0f, tokens);
  scale_own_scores(own, own, 1.0f, tokens);
  PerRow<16> largest;
  largest_score(largest, last, own);
  const auto is_large = [=](float m, float) { return math::abs(m) * scale > kLargestUnscaled; };
  if (scale != 1.0f && warp::any_row(largest, largest, is_large)) {
    warp::mul(largest, largest, scale);
    apply_scale();
  }
  // beta joins the exponent.
  const float beta_log2 = math::log2(beta);
  warp::map(largest, largest, [=](float m) { return math::fma(m, scale, -beta_log2); });
  const auto weight = [=](float s, float m) { return math::exp2(math::fma(s, scale, -m)); };
  warp::map_rows(last, last, largest, weight);
  warp::map_rows(own, own, largest, weight);
  warp::zero(divisors);
  warp::fold_row_sum(divisors, last);
  warp::fold_row_sum(divisors, own);
  warp::finish_row_sum(divisors);
  warp::convert(last_weights, last);
  warp::convert(weights, own);
}

// 1 / divisors; 0 where there is nothing to divide. Divisors are sums of weights, of which what is
// below 2^-126 is dropped already.
__device__ __forceinline__ void invert(PerRow<16>& rows) {
  warp::map(rows, rows, [](float x) { return x == 0.0f ? 0.0f : math::reciprocal(x); });
}

}  // namespace tk::hedgehog_attention
