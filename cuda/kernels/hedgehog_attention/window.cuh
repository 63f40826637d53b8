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

// 1 / divisors; 0 where there is nothing to divide. Divisors are sums of weights, of which what is
// below 2^-126 is dropped already.
__device__ __forceinline__ void invert(PerRow<16>& rows) {
  warp::map(rows, rows, [](float x) { return x == 0.0f ? 0.0f : math::reciprocal(x); });
}

}  // namespace tk::hedgehog_attention
