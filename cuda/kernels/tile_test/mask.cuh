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
  load(),
      warpgroup::keep_before(tile, [=](int row) { return first + row * (row % 3); }, value), put();
}

// A tile of threes at (scalar 0, scalar 1) of arrays. Buffers: integers of rows and of columns;
// bytes; numbers. Then what is kept where integers are equal, scalar 2 elsewhere; threes with the
// bytes added, and with the numbers transposed.
template <typename T>
__device__ __forceinline__ void array_masks(const KernelParams& params) {
  const int row = scalar(params, 0), col = scalar(params, 1);
  const float value = params.scalars[2];
  const auto integers = [&](int buffer) {
    return GlobalVec<const int>{data<const int>(params, buffer),
                                static_cast<int>(params.buffers[buffer].shape[0])};
  };
  const GlobalView<uint8> bytes = matrix<uint8>(params, 2);
  const GlobalView<const uint8> kept{bytes.data, bytes.rows, bytes.cols, bytes.cols, 1};
  RegTile<T, 16, 48> tile;
  const auto load = [&] { warp::fill(tile, 3.0f); };
  int next = 0;
  const auto put = [&] { warpgroup::store(matrix<T>(params, 4, next++), tile, 0, 0); };
  load(), warpgroup::keep_equal(tile, integers(0), row, integers(1), col, value), put();
  load();
  warpgroup::zip_global(tile, kept, row, col, [](float x, uint8 byte) { return x + byte; });
  put();
  load();
  const GlobalView<T> numbers = matrix<T>(params, 3);
  warpgroup::zip_global(
      tile, GlobalView<const T>{numbers.data, numbers.cols, numbers.rows, 1, numbers.cols}, row,
      col, [](float x, float number) { return x + number; });
  put();
}

// A tile of threes at (scalar 0, scalar 1) of an array of bits [words, rows], kept where a bit is
// set, scalar 2 elsewhere; of the array's first words where scalar 3 is 1, of its first row where
// it is 2.
template <typename T, int kCols>
__device__ __forceinline__ void bit_masks(const KernelParams& params) {
  const GlobalView<uint32> words = matrix<uint32>(params, 0);
  const int shared = scalar(params, 3);
  const BitView bits = {words.data, shared == 2 ? 0 : 1, shared == 1 ? 0 : words.row_stride};
  RegBits<kCols> kept;
  warpgroup::load(kept, bits, scalar(params, 0), scalar(params, 1));
  RegTile<T, 16, kCols> tile;
  warp::fill(tile, 3.0f);
  warp::keep_where(tile, kept, params.scalars[2]);
  warpgroup::store(matrix<T>(params, 1), tile, 0, 0);
}

}  // namespace tk::tile_test
