// Masks of a warpgroup's 64 x 48 tile.
#pragma once

#include "kernels/tile_test/common.cuh"

namespace tk::tile_test {

// Scalars: two bounds and the value of what a mask does not let through.
template <typename T>
__device__ __forceinline__ void masks(const KernelParams& params) {
  const int first = scalar(params, 0), second = scalar(params, 1);
  const float value = params.scalars[2];
  RegTile<T, 16, 48> tile;
  int next = 0;
  const auto load = [&] { warpgroup::load(tile, matrix<T>(params, 0), 0, 0); };
  const auto put = [&] { warpgroup::store(matrix<T>(params, 1, next++), tile, 0, 0); };
  load(), warpgroup::keep_cols_before(tile, first, value), put();
  load(), warpgroup::keep_rows_before(tile, first, value), put();
  load(), warpgroup::keep_lower(tile, first, value), put();
  load(), warpgroup::keep_upper(tile, first, value), put();
  load(), warpgroup::keep_band(tile, first, second, value), put();
  load(), warpgroup::keep_lower_before(tile, first, second, value), put();
  load(), warpgroup::keep_upper_before(tile, first, second, value), put();
}

}  // namespace tk::tile_test
