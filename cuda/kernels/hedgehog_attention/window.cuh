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

// Of one: weights of the keys of the last chunk and of this one. Their sums join the lanes' parts
// of divisors.
template <typename T, typename TokensOf>
__device__ __forceinline__ void weigh_keys(RegTile<T, 16, 64>& last_weights,
                                           RegTile<T, 16, 64>& weights, PerRow<16>& divisors,
                                           const Square& last_scores, const Square& scores,
                                           float scale_log2, float beta, const TokensOf& tokens) {
  Square last, own;
  scale_last_scores(last, last_scores, scale_log2, tokens);
  scale_own_scores(own, scores, scale_log2, tokens);
  PerRow<16> largest;
  largest_score(largest, last, own);
  weigh_near(last, largest, beta);
  weigh_near(own, largest, beta);
  warp::fold_row_sum(divisors, last);
  warp::fold_row_sum(divisors, own);
  warp::convert(last_weights, last);
  warp::convert(weights, own);
}

// 1 / divisors; 0 where there is nothing to divide. Divisors are sums of weights, of which what is
// below 2^-126 is dropped already.
__device__ __forceinline__ void invert(PerRow<16>& rows) {
  warp::map(rows, rows, [](float x) { return x == 0.0f ? 0.0f : math::reciprocal(x); });
}

}  // namespace tk::hedgehog_attention
