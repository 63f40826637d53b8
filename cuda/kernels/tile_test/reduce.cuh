// Reductions, running sums and transposition, by one warp.
#pragma once

#include "kernels/tile_test/common.cuh"

namespace tk::tile_test {

// Of x and y (32 x 48): reductions of x, then of both tiles into a vector that holds `start`, each
// spread over sixteen columns or rows.
template <typename T>
__device__ __forceinline__ void row_reductions(const KernelParams& params) {
  RegTile<T, 32, 48> x, y;
  PerRow<32> rows;
  warp::load(x, matrix<T>(params, 0), 0, 0);
  warp::load(y, matrix<T>(params, 1), 0, 0);
  const float start = params.scalars[0];
  const auto larger = [](float a, float b) { return math::max(math::abs(a), math::abs(b)); };
  Stack<float> out{params, 2};
  warp::row_sum(rows, x), out.put(spread<16>(rows));
  warp::row_max(rows, x), out.put(spread<16>(rows));
  warp::row_min(rows, x), out.put(spread<16>(rows));
  warp::row_prod(rows, x), out.put(spread<16>(rows));
  warp::reduce_rows(rows, x, start, larger), out.put(spread<16>(rows));
  warp::zero(rows), warp::fold_row_sum(rows, x), warp::fold_row_sum(rows, y);
  warp::finish_row_sum(rows), out.put(spread<16>(rows));
  warp::fill(rows, start), warp::fold_row_max(rows, x), warp::fold_row_max(rows, y);
  warp::finish_row_max(rows), out.put(spread<16>(rows));
  warp::fill(rows, start), warp::fold_row_min(rows, x), warp::fold_row_min(rows, y);
  warp::finish_row_min(rows), out.put(spread<16>(rows));
  warp::fill(rows, 1.0f), warp::fold_row_prod(rows, x), warp::fold_row_prod(rows, y);
  warp::finish_row_prod(rows), out.put(spread<16>(rows));
  warp::fill(rows, start), warp::fold_rows(rows, x, larger), warp::fold_rows(rows, y, larger);
  warp::finish_rows(rows, larger), out.put(spread<16>(rows));
  PerRow<32> sums;
  warp::zero(rows), warp::fold_row_dot(rows, x, y), warp::fold_row_dot(rows, x, x);
  warp::finish_row_sum(rows), out.put(spread<16>(rows));
  warp::row_max(rows, x), warp::row_max(sums, y);
  const bool any = warp::any_row(rows, sums, [](float a, float b) { return a < b; });
  RegTile<float, 32, 48> sizes;
  warp::abs(sizes, x), warp::pin(sizes);
  warp::fill(rows, any ? 1.0f : 0.0f), warp::pin(rows), out.put(spread<16>(rows));
}

template <typename T>
__device__ __forceinline__ void col_reductions(const KernelParams& params) {
  RegTile<T, 32, 48> x, y;
  PerCol<48> cols;
  warp::load(x, matrix<T>(params, 0), 0, 0);
  warp::load(y, matrix<T>(params, 1), 0, 0);
  const float start = params.scalars[0];
  const auto larger = [](float a, float b) { return math::max(math::abs(a), math::abs(b)); };
  Stack<float> out{params, 2};
  warp::col_sum(cols, x), out.put(spread<16>(cols));
  warp::col_max(cols, x), out.put(spread<16>(cols));
  warp::col_min(cols, x), out.put(spread<16>(cols));
  warp::col_prod(cols, x), out.put(spread<16>(cols));
  warp::reduce_cols(cols, x, start, larger), out.put(spread<16>(cols));
  warp::zero(cols), warp::fold_col_sum(cols, x), warp::fold_col_sum(cols, y);
  warp::finish_col_sum(cols), out.put(spread<16>(cols));
  warp::fill(cols, start), warp::fold_col_max(cols, x), warp::fold_col_max(cols, y);
  warp::finish_col_max(cols), out.put(spread<16>(cols));
  warp::fill(cols, start), warp::fold_col_min(cols, x), warp::fold_col_min(cols, y);
  warp::finish_col_min(cols), out.put(spread<16>(cols));
  warp::fill(cols, 1.0f), warp::fold_col_prod(cols, x), warp::fold_col_prod(cols, y);
  warp::finish_col_prod(cols), out.put(spread<16>(cols));
  warp::fill(cols, start), warp::fold_cols(cols, x, larger), warp::fold_cols(cols, y, larger);
  warp::finish_cols(cols, larger), out.put(spread<16>(cols));
}

// Along the rows, along the columns, and each in place.
template <typename T>
__device__ __forceinline__ void running_sums(const KernelParams& params) {
  RegTile<T, 32, 48> x;
  RegTile<float, 32, 48> sums;
  Stack<float> out{params, 1};
  warp::load(x, matrix<T>(params, 0), 0, 0);
  warp::cumsum_cols(sums, x), out.put(sums);
  warp::cumsum_rows(sums, x), out.put(sums);
  warp::cumsum_cols(x, x), out.put(x);
  warp::load(x, matrix<T>(params, 0), 0, 0);
  warp::cumsum_rows(x, x), out.put(x);
}

// Rows of x and y (64 x 48), whose sums lanes start with a half and with one: x's; and both, of
// which y's go to every third element.
template <typename T>
__device__ __forceinline__ void stored_row_sums(const KernelParams& params) {
  RegTile<T, 16, 48> x, y;
  PerRow<16> rows, others;
  warpgroup::load(x, matrix<T>(params, 0), 0, 0);
  warpgroup::load(y, matrix<T>(params, 1), 0, 0);
  warp::fill(rows, 0.5f), warp::fold_row_sum(rows, x);
  warp::fill(others, 1.0f), warp::fold_row_sum(others, y);
  warpgroup::store_row_sums(GlobalVec<float>{data<float>(params, 2), 64}, rows);
  warpgroup::store_row_sums(GlobalVec<float>{data<float>(params, 3), 64}, rows,
                            GlobalVec<float>{data<float>(params, 4), 64, 3}, others);
}

// x's columns in the reverse order; and in place, twice.
template <typename T>
__device__ __forceinline__ void reversed(const KernelParams& params) {
  RegTile<T, 32, 48> x, y;
  Stack<T> out{params, 1};
  warp::load(x, matrix<T>(params, 0), 0, 0);
  warp::reverse_cols(y, x), out.put(y);
  warp::reverse_cols(y, y), out.put(y);
}

// x^T, x^T made in place, and x's columns sixteen at a time.
template <typename T, int kN>
__device__ __forceinline__ void transposed(const KernelParams& params) {
  RegTile<T, kN, kN> x, y;
  warp::load(x, matrix<T>(params, 0), 0, 0);
  Stack<T> out{params, 1};
  warp::transpose(y, x), out.put(y);
  warp::convert(y, x), warp::transpose(y, y), out.put(y);
  Stack<T> parts{params, 2};
#pragma unroll
  for (int i = 0; i < kN / 16; ++i) parts.put(warp::cols<16>(x, i));
}

}  // namespace tk::tile_test
