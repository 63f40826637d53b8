// Masks: replace the values of a tile that a rule does not let through.
//
// Rules speak of rows and columns of the warpgroup's 64-row tile; a kernel shifts them by where the
// tile lies. Offsets are uniform, so that each value costs one comparison and one selection.
#pragma once

#include "tk/backend.cuh"

namespace tk::warpgroup {

// Keeps columns before `end`.
template <typename Tile>
__device__ __forceinline__ void keep_cols_before(Tile& tile, int end, float value,
                                                 Location at = {}) {
  keep_before(tile, [=](int) { return end; }, value, at);
}
// Keeps rows before `end`.
template <typename Tile>
__device__ __forceinline__ void keep_rows_before(Tile& tile, int end, float value,
                                                 Location at = {}) {
  for_each(tile, [=](int row, int, float x) { return row < end ? x : value; }, at);
}
// Keeps col <= row + diagonal: the lower triangle.
template <typename Tile>
__device__ __forceinline__ void keep_lower(Tile& tile, int diagonal, float value,
                                           Location at = {}) {
  for_each(tile, [=](int row, int col, float x) { return col <= row + diagonal ? x : value; }, at);
}
// Keeps col >= row + diagonal: the upper triangle.
template <typename Tile>
__device__ __forceinline__ void keep_upper(Tile& tile, int diagonal, float value,
                                           Location at = {}) {
  for_each(tile, [=](int row, int col, float x) { return col >= row + diagonal ? x : value; }, at);
}
// Keeps col in [row + left, row + right]: a band.
template <typename Tile>
__device__ __forceinline__ void keep_band(Tile& tile, int left, int right, float value,
                                          Location at = {}) {
  for_each(
      tile,
      [=](int row, int col, float x) {
        return col >= row + left && col <= row + right ? x : value;
      },
      at);
}
// Keeps col < min(end, row + diagonal + 1): a lower triangle that ends at a column.
template <typename Tile>
__device__ __forceinline__ void keep_lower_before(Tile& tile, int diagonal, int end, float value,
                                                  Location at = {}) {
  keep_before(tile, [=](int row) { return tk::min(end, row + diagonal + 1); }, value, at);
}
// Keeps row < min(end, col - diagonal + 1): an upper triangle that ends at a row.
template <typename Tile>
__device__ __forceinline__ void keep_upper_before(Tile& tile, int diagonal, int end, float value,
                                                  Location at = {}) {
  for_each(
      tile,
      [=](int row, int col, float x) { return row < tk::min(end, col - diagonal + 1) ? x : value; },
      at);
}

// Keeps where an integer of the row, from element `first_row` of rows on, equals one of the column.
// What is outside of either array equals nothing.
template <typename Tile>
__device__ __forceinline__ void keep_equal(Tile& tile, const GlobalVec<const int>& rows,
                                           int first_row, const GlobalVec<const int>& cols,
                                           int first_col, float value, Location at = {}) {
  detail::before_group_reads<Tile::kRows>(rows, first_row, at);
  detail::before_reads(cols, first_col, Tile::kCols, at);
  for_each(
      tile,
      [&](int row, int col, float x) {
        const bool inside = first_row + row < rows.size && first_col + col < cols.size;
        return inside && *rows.at(first_row + row) == *cols.at(first_col + col) ? x : value;
      },
      at);
}

}  // namespace tk::warpgroup
