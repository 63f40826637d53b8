// phi(x) = [softmax(x W), softmax(-x W)] of a chunk's tokens, from the scores x W; and the sums of
// features that divisors are made of.
#pragma once

#include "kernels/hedgehog_attention/hedgehog_attention.h"
#include "tk/tk.cuh"

namespace tk::hedgehog_attention {

using Square = RegTile<float, 16, 64>;  // of a warpgroup's 64 rows
using MapVec = SharedVec<float, kMap>;

// exp(sign y - the row's largest), and 1 over the sums of rows: the features of one sign, 0 for y
// and 1 for -y, before their division.
__device__ __forceinline__ void exponentials(Square& dst, PerRow<16>& inverse, const Square& y,
                                             int sign) {
  const float factor = sign == 0 ? kLog2E : -kLog2E;
  PerRow<16> largest;
  if (sign == 0) {
    warp::row_max(largest, y);
  } else {
    warp::row_min(largest, y);
  }
  warp::map(largest, largest, [=](float x) { return x * factor; });
  warp::map_rows(dst, y, largest,
                 [=](float x, float m) { return math::exp2(math::fma(x, factor, -m)); });
  warp::row_sum(inverse, dst);
  warp::map(inverse, inverse, [](float sum) { return math::reciprocal(sum); });
}
__device__ __forceinline__ void softmax(Square& dst, const Square& y, int sign) {
  PerRow<16> inverse;
  exponentials(dst, inverse, y, sign);
  warp::mul_rows(dst, dst, inverse);
}

// The sum of features over all tokens so far, for both signs, read at the end: a part for each
// warp's rows, and what the segment started with.
struct Normalizer {
  MapVec parts[2][4];
  MapVec before[2];

  // Each warp: nothing yet.
  __device__ __forceinline__ void clear(int sign) {
    PerCol<kMap> zeros;
    warp::zero(zeros);
    warp::store(parts[sign][warp::index() & 3], zeros);
  }
  // One warp: nothing before.
  __device__ __forceinline__ void clear_before(int sign) {
    PerCol<kMap> zeros;
    warp::zero(zeros);
    warp::store(before[sign], zeros);
  }
  // The warp's rows more.
  __device__ __forceinline__ void add(int sign, const Square& features) {
    PerCol<kMap> sums, added;
    MapVec& part = parts[sign][warp::index() & 3];
    warp::col_sum(added, features);
    warp::load(sums, part);
    warp::zip(sums, sums, added, [](float x, float y) { return x + y; });
    warp::store(part, sums);
  }
  __device__ __forceinline__ void load(PerCol<kMap>& sums, int sign) const {
    warp::load(sums, before[sign]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      PerCol<kMap> part;
      warp::load(part, parts[sign][i]);
      warp::zip(sums, sums, part, [](float x, float y) { return x + y; });
    }
  }
};

// The same read at every chunk: parts are of one chunk, and the warps of a consumer add each a
// quarter of their columns to the sum. Between add, gather and dot of a sign its warps meet.
struct RunningNormalizer {
  MapVec parts[2][4];
  MapVec total[2];

  // Each warp: its rows of a chunk.
  __device__ __forceinline__ void add(int sign, const Square& features) {
    warp::store_col_sum(parts[sign][warp::index() & 3], features);
  }
  // Each warp: its columns. Or nothing more of all before.
  __device__ __forceinline__ void gather(int sign, bool forget) {
    const int quarter = warp::index() & 3;
    auto& columns = part<16>(total[sign], quarter);
    PerRow<16> sum, added;
    warp::load(sum, columns);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      warp::load(added, part<16>(parts[sign][i], quarter));
      warp::zip(sum, sum, added, [](float x, float y) { return x + y; });
    }
    if (forget) warp::zero(sum);
    warp::store(columns, sum);
  }
  // Each lane's part of the products of rows with the sum.
  __device__ __forceinline__ void dot(PerRow<16>& dst, const Square& features, int sign) const {
    PerCol<kMap> sum;
    warp::load(sum, total[sign]);
    Square rows;  // all alike
    warp::zero(rows);
    warp::add_cols(rows, rows, sum);
    warp::zero(dst);
    warp::fold_row_dot(dst, features, rows);
  }
};

// The first token of a batch element that is one.
__device__ __forceinline__ int first_token(const int* first, int batch) {
  return first == nullptr ? 0 : load_scalar(first + batch);
}

// Tokens before `first`, of which the chunk's first row is `token`, have no features.
__device__ __forceinline__ void drop_rows(Square& features, int token, int first) {
  if (token >= first) return;
  warpgroup::for_each(features,
                      [=](int row, int, float x) { return token + row < first ? 0.0f : x; });
}

__device__ __forceinline__ float sign_of(int index) { return index == 0 ? 1.0f : -1.0f; }

// phi(k) of a sign from scores k W of tokens from `token` on: to shared memory, and to z.
template <typename FeatureTile, typename Sums>
__device__ __forceinline__ void key_features(const FeatureTile& phi_smem, Sums& normalizer,
                                             const Square& scores, int sign, int token, int first) {
  Square features;
  softmax(features, scores, sign);
  drop_rows(features, token, first);
  warpgroup::store(phi_smem.template cols<kMap>(sign), features);
  normalizer.add(sign, features);
}

}  // namespace tk::hedgehog_attention
