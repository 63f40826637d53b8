// Elementwise operations, conversions and coordinates.
#pragma once

#include "kernels/tile_test/common.cuh"

namespace tk::tile_test {

// x -> a stack of y = op(x), 32 x 16, by one warp.
template <typename Src, typename Dst>
__device__ __forceinline__ void unary(const KernelParams& params) {
  RegTile<Src, 32, 16> x;
  RegTile<Dst, 32, 16> y;
  warp::load(x, matrix<Src>(params, 0), 0, 0);
  Stack<Dst> out{params, 1};
  warp::exp2(y, x), out.put(y);
  warp::exp(y, x), out.put(y);
  warp::log2(y, x), out.put(y);
  warp::log(y, x), out.put(y);
  warp::abs(y, x), out.put(y);
  warp::neg(y, x), out.put(y);
  warp::relu(y, x), out.put(y);
  warp::tanh(y, x), out.put(y);
  warp::rsqrt(y, x), out.put(y);
  warp::reciprocal(y, x), out.put(y);
  warp::convert(y, x), out.put(y);
  warp::map(y, x, [](float v) { return 2.0f * v + 1.0f; }), out.put(y);
  warp::map(y, x, [](float v) { return math::log(v); }), out.put(y);
  warp::map(y, x, [](float v) { return math::fma(v, v, 1.0f); }), out.put(y);
  warp::map(y, x, [](float v) { return math::mul(v, 0.3f) + 1.0f; }), out.put(y);
  warp::map(y, x, [](float v) { return math::max_nan(v, 1.0f); }), out.put(y);
  warp::map(y, x, [](float v) { return math::accurate_tanh(v); }), out.put(y);
  warp::map(y, x, [](float v) { return math::small_tanh(0.06f * v); }), out.put(y);
  warp::accurate_tanh(y, x, 0.5f), out.put(y);
  warp::accurate_tanh(y, x, 0.06f), out.put(y);
  warp::map(y, x, [](float v) { return math::softplus(v); }), out.put(y);
  warp::map(y, x, [](float v) { return math::sigmoid(v); }), out.put(y);
  // The first square of sixteen rows has an infinity, the second has not.
  const math::SmallTanhFactor of_x(0.06f, 3.0f), beyond_floats(1e-9f, 1.0f);
  warp::map(y, x, [=](float v) { return v * of_x.factor_of(v); }), out.put(y);
  warp::fill(y, of_x.limit), out.put(y);
  warp::fill(y, beyond_floats.limit), out.put(y);
  // An infinity is the largest, and then 8 in its place.
  warp::fill(y, warp::all_within(x, 9.0f) ? 1.0f : 0.0f), out.put(y);
  RegTile<Src, 32, 16> bounded;
  warp::map(bounded, x, [](float v) { return math::max(math::min(v, 8.0f), -8.0f); });
  warp::fill(y, warp::all_within(bounded, 8.0f) ? 1.0f : 0.0f), out.put(y);
  warp::fill(y, warp::all_within(bounded, 7.9f) ? 1.0f : 0.0f), out.put(y);
  warp::map_within(y, x, 9.0f, [](float v) { return v + 1.0f; }, [](float v) { return v - 1.0f; });
  out.put(y);
  warp::fill(y, params.scalars[0]), out.put(y);
  warp::zero(y), out.put(y);
  // In place.
  warp::neg(x, x), out.put(x);
}

// 32 x 64: columns 16 to 47, and all columns with the last sixteen where the first were.
template <typename T>
__device__ __forceinline__ void parts(const KernelParams& params) {
  RegTile<T, 32, 64> x;
  warp::load(x, matrix<T>(params, 0), 0, 0);
  warp::store(matrix<T>(params, 1), warp::part<16, 32>(x), 0, 0);
  warp::set_part<0>(x, warp::part<48, 16>(x));
  warp::store(matrix<T>(params, 2), x, 0, 0);
}

template <typename Dst, typename A, typename B>
__device__ __forceinline__ void binary(const KernelParams& params) {
  RegTile<A, 32, 16> a;
  RegTile<B, 32, 16> b;
  RegTile<Dst, 32, 16> y;
  PerRow<32> rows;
  PerCol<16> cols;
  warp::load(a, matrix<A>(params, 0), 0, 0);
  warp::load(b, matrix<B>(params, 1), 0, 0);
  const float* row_values = data<float>(params, 2);
  const float* col_values = data<float>(params, 3);
  warp::fill(rows, 0.0f);
  warp::fill(cols, 0.0f);
  warp::for_each(rows, [=](int row, float) { return row_values[row]; });
  warp::for_each(cols, [=](int col, float) { return col_values[col]; });
  const float number = params.scalars[0];
  Stack<Dst> out{params, 4};
  warp::add(y, a, b), out.put(y);
  warp::add(y, a, number), out.put(y);
  warp::add_rows(y, a, rows), out.put(y);
  warp::add_cols(y, a, cols), out.put(y);
  warp::sub(y, a, b), out.put(y);
  warp::sub(y, a, number), out.put(y);
  warp::sub_rows(y, a, rows), out.put(y);
  warp::sub_cols(y, a, cols), out.put(y);
  warp::mul(y, a, b), out.put(y);
  warp::mul(y, a, number), out.put(y);
  warp::mul_rows(y, a, rows), out.put(y);
  warp::mul_cols(y, a, cols), out.put(y);
  warp::div(y, a, b), out.put(y);
  warp::div(y, a, number), out.put(y);
  warp::div_rows(y, a, rows), out.put(y);
  warp::div_cols(y, a, cols), out.put(y);
  warp::max(y, a, b), out.put(y);
  warp::max(y, a, number), out.put(y);
  warp::max_rows(y, a, rows), out.put(y);
  warp::max_cols(y, a, cols), out.put(y);
  warp::min(y, a, b), out.put(y);
  warp::min(y, a, number), out.put(y);
  warp::min_rows(y, a, rows), out.put(y);
  warp::min_cols(y, a, cols), out.put(y);
  warp::zip(y, a, b, [](float u, float v) { return u - 2.0f * v; }), out.put(y);
  warp::map_rows(y, a, rows, [](float u, float v) { return v - 2.0f * u; }), out.put(y);
  warp::map_cols(y, a, cols, [](float u, float v) { return v - 2.0f * u; }), out.put(y);
  warp::outer(y, rows, cols, [](float r, float c) { return r - c; }), out.put(y);
}

// Vectors of 32 rows and 16 columns, each result spread over a tile.
__device__ __forceinline__ void vectors(const KernelParams& params) {
  PerRow<32> rows, more_rows;
  PerCol<16> cols, more_cols;
  const float* row_values = data<float>(params, 0);
  const float* col_values = data<float>(params, 1);
  warp::fill(rows, 0.0f);
  warp::fill(cols, 0.0f);
  warp::for_each(rows, [=](int row, float) { return row_values[row]; });
  warp::for_each(cols, [=](int col, float) { return col_values[col]; });
  Stack<float> out{params, 2};
  out.put(spread<16>(rows));
  out.put(spread<32>(cols));
  const auto square = [](float x) { return x * x; };
  const auto difference = [](float x, float y) { return x - 2.0f * y; };
  warp::map(more_rows, rows, square), out.put(spread<16>(more_rows));
  warp::map(more_cols, cols, square), out.put(spread<32>(more_cols));
  warp::zip(more_rows, rows, more_rows, difference), out.put(spread<16>(more_rows));
  warp::zip(more_cols, cols, more_cols, difference), out.put(spread<32>(more_cols));
  warp::fill(rows, params.scalars[0]), out.put(spread<16>(rows));
  warp::fill(cols, params.scalars[0]), out.put(spread<32>(cols));
  warp::zero(rows), out.put(spread<16>(rows));
  warp::zero(cols), out.put(spread<32>(cols));
}

// What each element's coordinates are said to be: 100 row + column, by warp and by warpgroup.
__device__ __forceinline__ void coordinates(const KernelParams& params) {
  constexpr int kRows = 32, kCols = 48;
  RegTile<float, kRows, kCols> tile;
  PerRow<kRows> rows;
  PerCol<kCols> cols;
  const auto place = [](int row, int col, float x) { return x + 100.0f * row + col; };
  const auto number = [](int index, float x) { return x + index; };
  int next = 0;
  const auto put = [&](const RegTile<float, kRows, kCols>& result) {
    warpgroup::store(matrix<float>(params, 0, next++), result, 0, 0);
  };
  warp::fill(tile, 0.5f), warp::for_each(tile, place), put(tile);
  warp::fill(tile, 0.5f), warpgroup::for_each(tile, place), put(tile);
  warp::fill(rows, 0.5f), warp::for_each(rows, number), put(spread<kCols>(rows));
  warp::fill(rows, 0.5f), warpgroup::for_each(rows, number), put(spread<kCols>(rows));
  warp::fill(cols, 0.5f), warp::for_each(cols, number), put(spread<kRows>(cols));
}

// dst = src, rounded or widened, for arrays of any number of 64 x 64 tiles.
template <typename Src, typename Dst>
__device__ __forceinline__ void convert(const KernelParams& params) {
  RegTile<Src, 16, 64> x;
  RegTile<Dst, 16, 64> y;
  const int row = 64 * grid::block_x();
  warpgroup::load(x, matrix<Src>(params, 0), row, 0);
  warp::convert(y, x);
  warpgroup::store(matrix<Dst>(params, 1), y, row, 0);
}

}  // namespace tk::tile_test
