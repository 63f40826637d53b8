// Moves of float tiles between registers and global memory, sixteen bytes at a time.
//
// As on the GPU, the columns of every sixteen of a tile are others of the array: column 16 c + 8 e
// + 2 j + i of the tile is column 16 c + 4 j + 2 e + i of the array. A kernel that forgets it fails
// here too.
#pragma once

#include "tk/interpreter/copy.h"

namespace tk {
namespace detail {

// The array's column for a tile's.
constexpr int column_of_runs(int col) {
  const int within = col % 16;
  return col - within + within % 8 / 2 * 4 + within / 8 * 2 + within % 2;
}

// With kWhole, a run of four is moved at once: it may not be cut by the array's end.
template <bool kWhole, typename T>
void check_runs(const T* data, int64 row_stride, int rows, int cols, Location at) {
  if constexpr (kWhole) {
    const bool aligned = reinterpret_cast<uint64>(data) % (4 * sizeof(T)) == 0;
    if (aligned && cols % 4 == 0 && (rows <= 1 || row_stride % 4 == 0)) return;
    interpreter::fail(interpreter::FaultKind::kOutOfBounds,
                      "moves runs of four at once of rows that are not made of whole ones", at);
  }
}

// That an array is made of whole groups of kCount neighbours, which are moved at once.
template <int kCount, typename T>
void check_groups(const GlobalView<T>& view, int first_col, const char* otherwise, Location at) {
  const bool aligned = reinterpret_cast<uint64>(view.data) % (kCount * sizeof(T)) == 0;
  if (aligned && view.col_stride == 1 && view.cols % kCount == 0 && first_col % kCount == 0 &&
      (view.rows <= 1 || view.row_stride % kCount == 0)) {
    return;
  }
  interpreter::fail(interpreter::FaultKind::kOutOfBounds, otherwise, at);
}
template <typename T>
void check_pairs(const GlobalView<T>& view, int first_col, Location at) {
  check_groups<2>(view, first_col, "moves pairs at once of rows that are not made of whole ones",
                  at);
}
template <typename T>
void check_rounded(const GlobalView<T>& view, int first_col, Location at) {
  check_groups<8>(view, first_col,
                  "moves eight at once of rows that are not made of whole runs of eight", at);
}

template <bool kWhole, typename Dst, typename T>
void load_runs(Dst& dst, const GlobalView<T>& src, int first_row, int first_col, Location at) {
  check_runs<kWhole>(src.data, src.row_stride, src.rows, src.cols, at);
  interpreter::read_global(spans_of(src, first_row, Dst::kRows, first_col, Dst::kCols), at);
  writing(dst, at);
  for (int r = 0; r < Dst::kRows; ++r) {
    for (int c = 0; c < Dst::kCols; ++c) {
      const int row = first_row + r, col = first_col + column_of_runs(c);
      dst.data[r][c] = row < src.rows && col < src.cols ? *src.at(row, col) : 0.0f;
    }
  }
}
template <bool kWhole, typename Src>
void store_runs(const GlobalView<float>& dst, const Src& src, int first_row, int first_col,
                Location at) {
  check_runs<kWhole>(dst.data, dst.row_stride, dst.rows, dst.cols, at);
  interpreter::act_as_warp();
  reading(src, at);
  const auto store = [&] {
    for (int r = 0; r < Src::kRows; ++r) {
      for (int c = 0; c < Src::kCols; ++c) {
        const int row = first_row + r, col = first_col + column_of_runs(c);
        if (row < dst.rows && col < dst.cols) *dst.at(row, col) = src.data[r][c];
      }
    }
  };
  interpreter::write_global(spans_of(dst, first_row, Src::kRows, first_col, Src::kCols), store, at);
}

}  // namespace detail

namespace warp {

template <bool kWhole, int kRows, int kCols, typename T>
void load_runs(RegTile<float, kRows, kCols>& dst, const GlobalView<T>& src, int row, int col,
               Location at = {}) {
  detail::load_runs<kWhole>(dst, src, row, col, at);
}
template <bool kWhole, int kRows, int kCols>
void store_runs(const GlobalView<float>& dst, const RegTile<float, kRows, kCols>& src, int row,
                int col, Location at = {}) {
  detail::store_runs<kWhole>(dst, src, row, col, at);
}

template <int kRows, int kCols, typename T>
void load_pairs(RegTile<float, kRows, kCols>& dst, const GlobalView<T>& src, int row, int col,
                Location at = {}) {
  detail::check_pairs(src, col, at);
  load(dst, src, row, col, at);
}
template <int kRows, int kCols>
void store_pairs(const GlobalView<float>& dst, const RegTile<float, kRows, kCols>& src, int row,
                 int col, Location at = {}) {
  detail::check_pairs(dst, col, at);
  store(dst, src, row, col, at);
}

template <bool kWhole, int kN, typename T>
void load_runs(PerCol<kN>& dst, const GlobalVec<const T>& src, int first, float missing,
               Location at = {}) {
  detail::check_runs<kWhole>(src.data, 0, 1, src.size, at);
  interpreter::read_global(detail::spans_of(src, first, kN), at);
  detail::writing(dst, at);
  detail_map::assign_vector(dst, [&](int i, int) {
    const int col = first + detail::column_of_runs(i);
    return col < src.size ? interpreter::to_float(*src.at(col)) : missing;
  });
}
template <bool kWhole, int kN, typename T>
void store_runs(const GlobalVec<T>& dst, const PerCol<kN>& src, int first, Location at = {}) {
  detail::check_runs<kWhole>(dst.data, 0, 1, dst.size, at);
  interpreter::act_as_warp();
  detail::leaving(src, at);
  const auto store = [&] {
    for (int i = 0; i < kN; ++i) {
      const int col = first + detail::column_of_runs(i);
      if (col < dst.size) *dst.at(col) = interpreter::from_float<T>(src.data[i][0]);
    }
  };
  interpreter::write_global(detail::spans_of(dst, first, kN), store, at);
}

template <int kRows, int kCols>
void keep_runs_before(RegTile<float, kRows, kCols>& tile, int end, float value, Location at = {}) {
  for_each(
      tile, [=](int, int col, float x) { return detail::column_of_runs(col) < end ? x : value; },
      at);
}

}  // namespace warp

namespace warpgroup {

template <bool kWhole, int kRows, int kCols, typename T>
void load_runs(RegTile<float, kRows, kCols>& dst, const GlobalView<T>& src, int row, int col,
               Location at = {}) {
  detail::load_runs<kWhole>(dst, src, row + kRows * detail::warp_of_group(), col, at);
}
template <bool kWhole, int kRows, int kCols>
void store_runs(const GlobalView<float>& dst, const RegTile<float, kRows, kCols>& src, int row,
                int col, Location at = {}) {
  detail::store_runs<kWhole>(dst, src, row + kRows * detail::warp_of_group(), col, at);
}

template <typename T, int kRows, int kCols>
void load_pairs(RegTile<T, kRows, kCols>& dst, const GlobalView<const T>& src, int row, int col,
                Location at = {}) {
  detail::check_pairs(src, col, at);
  load(dst, src, row, col, at);
}

template <typename T, int kRows, int kCols>
void store_rounded(const GlobalView<T>& dst, const RegTile<float, kRows, kCols>& src, int row,
                   int col, Location at = {}) {
  static_assert(kIsHalf<T> && kCols % 32 == 0, "four runs of eight 16-bit values at a time");
  detail::check_rounded(dst, col, at);
  store(dst, src, row, col, at);
}

}  // namespace warpgroup
}  // namespace tk
