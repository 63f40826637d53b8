// Moves of float tiles and of vectors of columns in runs of four.
#pragma once

#include "kernels/tile_test/common.cuh"

namespace tk::tile_test {

// A warpgroup's 64 x kCols tile at (scalar 0, scalar 1) of an array of floats, and a vector of
// another type from scalar 1 on (scalar 2 beyond its end). Buffers: x; y; 7s with x times y at its
// place, with scalar 2 in the columns from scalar 3 of the tile on; the same by four warps, each
// for itself; 7s with twice y; with the sums of the first sixteen rows; y in the tile's order.
template <typename T, int kCols, bool kWhole>
__device__ __forceinline__ void runs(const KernelParams& params) {
  const int row = scalar(params, 0), col = scalar(params, 1), end = scalar(params, 3);
  const float other = params.scalars[2];
  const int size = static_cast<int>(params.buffers[1].shape[0]);
  if (warp::index() == 0) {
    fill_array<float>(params, 2, 7.0f);
    fill_array<float>(params, 3, 7.0f);
  }
  block::sync();

  PerCol<kCols> y;
  warp::load_runs<kWhole>(y, GlobalVec<const T>{data<T>(params, 1), size}, col, other);
  RegTile<float, 16, kCols> x;
  warpgroup::load_runs<kWhole>(x, matrix<float>(params, 0), row, col);
  warp::mul_cols(x, x, y);
  warp::keep_runs_before(x, end, other);
  warpgroup::store_runs<kWhole>(matrix<float>(params, 2), x, row, col);

  const int warp_row = row + 16 * warp::index();
  warp::load_runs<kWhole>(x, matrix<float>(params, 0), warp_row, col);
  if (warp::index() == 0) {
    PerCol<kCols> sums, twice;
    warp::col_sum(sums, x);
    warp::store_runs<kWhole>(GlobalVec<float>{data<float>(params, 5), size}, sums, col);
    warp::map(twice, y, [](float value) { return 2.0f * value; });
    warp::store_runs<kWhole>(GlobalVec<T>{data<T>(params, 4), size}, twice, col);
    warp::store(matrix<float>(params, 6), spread<16>(y), 0, 0);
  }
  warp::mul_cols(x, x, y);
  warp::keep_runs_before(x, end, other);
  warp::store_runs<kWhole>(matrix<float>(params, 3), x, warp_row, col);
}

// A warp's 16 x 32 tile at (scalar 0, scalar 1) of an array of floats, moved in pairs. Buffers: x;
// 7s with the tile at its place; the tile.
__device__ __forceinline__ void pairs(const KernelParams& params) {
  const int row = scalar(params, 0), col = scalar(params, 1);
  fill_array<float>(params, 1, 7.0f);
  RegTile<float, 16, 32> x;
  warp::load_pairs(x, matrix<float>(params, 0), row, col);
  warp::store_pairs(matrix<float>(params, 1), x, row, col);
  warp::store(matrix<float>(params, 2), x, 0, 0);
}

// A warpgroup's 64 x kCols tile at (scalar 0, scalar 1) of an array of the tile's type, moved in
// pairs. Buffers: x; the tile.
template <typename T, int kCols>
__device__ __forceinline__ void group_pairs(const KernelParams& params) {
  const GlobalView<T> x_gmem = matrix<T>(params, 0);
  RegTile<T, 16, kCols> x;
  warpgroup::load_pairs(
      x, GlobalView<const T>{x_gmem.data, x_gmem.rows, x_gmem.cols, x_gmem.row_stride},
      scalar(params, 0), scalar(params, 1));
  warpgroup::store(matrix<float>(params, 1), x, 0, 0);
}

// A warpgroup's 64 x kCols tile at (scalar 0, scalar 1) of an array of floats, rounded. Buffers: x;
// 7s with the tile's roundings at its place.
template <typename T, int kCols>
__device__ __forceinline__ void rounded(const KernelParams& params) {
  const int row = scalar(params, 0), col = scalar(params, 1);
  if (warp::index() == 0) fill_array<T>(params, 1, 7.0f);
  block::sync();
  RegTile<float, 16, kCols> x;
  warpgroup::load(x, matrix<float>(params, 0), row, col);
  warpgroup::store_rounded(matrix<T>(params, 1), x, row, col);
}

}  // namespace tk::tile_test
