// Elements of arrays and of shared tiles as operands where they are read, few in registers at once.
#pragma once

#include "tk/sm90/copy.cuh"

namespace tk {
namespace detail {

// What zip_global hands on of an array's element.
template <typename T>
__device__ __forceinline__ auto as_operand(T element) {
  if constexpr (kSame<T, uint8>) {
    return element;
  } else {
    return ptx::to_float(element);
  }
}

}  // namespace detail

namespace warpgroup {

// tile = f(tile, element) with a shared tile's elements, four times as many rows: few are in
// registers at once.
template <typename Tile, typename Shared, typename F>
__device__ __forceinline__ void zip_shared(Tile& tile, const Shared& src, F&& f, Location = {}) {
  static_assert(Tile::kRowSquares == 1, "a warpgroup's tile has 16 rows a warp");
  static_assert(Shared::kRows == 64 && Shared::kCols == Tile::kCols,
                "zip_shared needs tiles of one shape");
  const auto view = detail::as_view(src);
  const int first_row = 16 * (ptx::warp_index() & 3);
  const auto apply = [&](int g, int h, float x, float y) {
    detail::set_pair(tile, 0, g, h, f(detail::get(tile, 0, g, 2 * h), x),
                     f(detail::get(tile, 0, g, 2 * h + 1), y));
  };
  if constexpr (kIsHalf<typename Shared::T>) {
#pragma unroll
    for (int c = 0; c < Tile::kCols / 16; ++c) {
      uint32 r[4];
      ptx::load_matrix_x4(r, detail::matrix_address(view, first_row, 16 * c));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x, y;
        ptx::unpack<typename Shared::T>(r[i], x, y);
        apply(2 * c + (i >> 1), i & 1, x, y);
      }
    }
  } else {
    detail::for_each_pair<Tile>([&](int, int g, int h) {
      float x, y;
      ptx::load_shared_f32x2(
          x, y, view.address(first_row + detail::row_of(0, 2 * h), detail::col_of(g, 0)));
      apply(g, h, x, y);
    });
  }
}
// tile = f(tile, element) with the array's elements at (first_row, first_col) on, 0 outside of it.
// A number arrives as float, a byte as it is.
template <typename Tile, typename T, typename F>
__device__ __forceinline__ void zip_global(Tile& tile, const GlobalView<const T>& src,
                                           int first_row, int first_col, F&& f, Location = {}) {
  static_assert(Tile::kRowSquares == 1, "a warpgroup's tile has 16 rows a warp");
  const int row = first_row + Tile::kRows * (ptx::warp_index() & 3) + detail::row_of(0, 0);
  const int first = first_col + detail::col_of(0, 0);
  // Addresses follow from one another: computed afresh, they would take the tile's registers again.
  const T* upper = src.at(row, first);
#pragma unroll
  for (int g = 0; g < Tile::kCols / 8; ++g) {
    const int col = first + 8 * g;
    const T* place = upper;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool inside = row + 8 * h < src.rows;
      const auto x = detail::as_operand(inside && col < src.cols ? *place : T{});
      const auto y =
          detail::as_operand(inside && col + 1 < src.cols ? *(place + src.col_stride) : T{});
      detail::set_pair(tile, 0, g, h, f(detail::get(tile, 0, g, 2 * h), x),
                       f(detail::get(tile, 0, g, 2 * h + 1), y));
      place += 8 * src.row_stride;
    }
    upper += 8 * src.col_stride;
  }
}

}  // namespace warpgroup
}  // namespace tk
