// Elementwise operations on register tiles and vectors: destination first, then operands.
#pragma once

#include "tk/interpreter/register_tile.h"

namespace tk::warp {

namespace detail_map {
// dst(r, c) = f(r, c).
template <typename Dst, typename F>
void assign(Dst& dst, F&& f) {
  using T = typename Dst::T;
  for (int r = 0; r < Dst::kRows; ++r) {
    for (int c = 0; c < Dst::kCols; ++c) {
      dst.data[r][c] = interpreter::from_float<T>(f(r, c));
    }
  }
}
template <typename Tile>
float value(const Tile& tile, int row, int col) {
  return interpreter::to_float(tile.data[row][col]);
}
// vector(i, part) = f(i, part).
template <typename Vector, typename F>
void assign_vector(Vector& dst, F&& f) {
  for (int i = 0; i < Vector::kN; ++i) {
    for (int part = 0; part < Vector::kParts; ++part) dst.data[i][part] = f(i, part);
  }
}
}  // namespace detail_map

template <typename Dst, typename Src, typename F>
void map(Dst& dst, const Src& src, F&& f, Location at = {}) {
  static_assert(detail::kSameShape<Dst, Src>, "map needs tiles of one shape");
  detail::reading(src, at);
  detail::writing(dst, at);
  detail_map::assign(dst, [&](int r, int c) { return f(detail_map::value(src, r, c)); });
}

template <typename Src>
bool all_within(const Src& src, float limit, Location at = {}) {
  detail::reading(src, at);
  bool all = true;
  for (int row = 0; row < Src::kRows; ++row) {
    for (int col = 0; col < Src::kCols; ++col) {
      all = all && !(std::abs(detail_map::value(src, row, col)) > limit);
    }
  }
  return all;
}

template <typename Dst, typename Src, typename F, typename G>
void map_within(Dst& dst, const Src& src, float limit, F&& f, G&& g, Location at = {}) {
  static_assert(detail::kSameShape<Dst, Src>, "map_within needs tiles of one shape");
  using T = typename Dst::T;
  detail::reading(src, at);
  detail::writing(dst, at);
  for (int first_row = 0; first_row < Dst::kRows; first_row += 16) {
    for (int first_col = 0; first_col < Dst::kCols; first_col += 16) {
      bool all = true;
      for (int i = 0; i < 256; ++i) {
        const float x = detail_map::value(src, first_row + i / 16, first_col + i % 16);
        all = all && !(std::abs(x) > limit);
      }
      for (int i = 0; i < 256; ++i) {
        const int row = first_row + i / 16, col = first_col + i % 16;
        const float x = detail_map::value(src, row, col);
        dst.data[row][col] = interpreter::from_float<T>(all ? f(x) : g(x));
      }
    }
  }
}

template <typename Dst, typename A, typename B, typename F>
void zip(Dst& dst, const A& a, const B& b, F&& f, Location at = {}) {
  static_assert(detail::kSameShape<Dst, A> && detail::kSameShape<Dst, B>,
                "zip needs tiles of one shape");
  detail::reading(a, at);
  detail::reading(b, at);
  detail::writing(dst, at);
  detail_map::assign(
      dst, [&](int r, int c) { return f(detail_map::value(a, r, c), detail_map::value(b, r, c)); });
}

template <typename Dst, typename Src, int kN, typename F>
void map_rows(Dst& dst, const Src& src, const PerRow<kN>& rows, F&& f, Location at = {}) {
  static_assert(detail::kSameShape<Dst, Src> && Dst::kRows == kN,
                "map_rows needs a value for each row of the tile");
  detail::reading(src, at);
  detail::reading(rows, at);
  detail::writing(dst, at);
  detail_map::assign(dst, [&](int r, int c) {
    return f(detail_map::value(src, r, c), rows.data[r][detail::part_of_col(c)]);
  });
}

template <typename Dst, typename Src, int kN, typename F>
void map_cols(Dst& dst, const Src& src, const PerCol<kN>& cols, F&& f, Location at = {}) {
  static_assert(detail::kSameShape<Dst, Src> && Dst::kCols == kN,
                "map_cols needs a value for each column of the tile");
  detail::reading(src, at);
  detail::reading(cols, at);
  detail::writing(dst, at);
  detail_map::assign(dst, [&](int r, int c) {
    return f(detail_map::value(src, r, c), cols.data[c][detail::part_of_row(r)]);
  });
}

template <typename Dst, int kR, int kC, typename F>
void outer(Dst& dst, const PerRow<kR>& rows, const PerCol<kC>& cols, F&& f, Location at = {}) {
  static_assert(Dst::kRows == kR && Dst::kCols == kC, "outer needs vectors of the tile's shape");
  detail::reading(rows, at);
  detail::reading(cols, at);
  detail::writing(dst, at);
  detail_map::assign(dst, [&](int r, int c) {
    return f(rows.data[r][detail::part_of_col(c)], cols.data[c][detail::part_of_row(r)]);
  });
}

template <typename Tile, typename F>
  requires detail::kIsTile<Tile>
void for_each(Tile& tile, F&& f, Location at = {}) {
  detail::reading(tile, at);
  detail_map::assign(tile, [&](int r, int c) { return f(r, c, detail_map::value(tile, r, c)); });
}

template <typename Tile>
  requires detail::kIsTile<Tile>
void fill(Tile& dst, float value, Location at = {}) {
  detail::writing(dst, at);
  detail_map::assign(dst, [=](int, int) { return value; });
}

template <typename Dst, typename Src>
void convert(Dst& dst, const Src& src, Location at = {}) {
  map(dst, src, [](float x) { return x; }, at);
}

// Vectors: the same verbs, value by value.
template <int kN, typename F>
void map(PerRow<kN>& dst, const PerRow<kN>& src, F&& f, Location at = {}) {
  detail::reading(src, at);
  detail::writing(dst, at);
  detail_map::assign_vector(dst, [&](int i, int part) { return f(src.data[i][part]); });
}
template <int kN, typename F>
void map(PerCol<kN>& dst, const PerCol<kN>& src, F&& f, Location at = {}) {
  detail::reading(src, at);
  detail::writing(dst, at);
  detail_map::assign_vector(dst, [&](int i, int part) { return f(src.data[i][part]); });
}
template <int kN, typename F>
void zip(PerRow<kN>& dst, const PerRow<kN>& a, const PerRow<kN>& b, F&& f, Location at = {}) {
  detail::reading(a, at);
  detail::reading(b, at);
  detail::writing(dst, at);
  detail_map::assign_vector(dst,
                            [&](int i, int part) { return f(a.data[i][part], b.data[i][part]); });
}
template <int kN, typename F>
void zip(PerCol<kN>& dst, const PerCol<kN>& a, const PerCol<kN>& b, F&& f, Location at = {}) {
  detail::reading(a, at);
  detail::reading(b, at);
  detail::writing(dst, at);
  detail_map::assign_vector(dst,
                            [&](int i, int part) { return f(a.data[i][part], b.data[i][part]); });
}
template <int kN>
void fill(PerRow<kN>& dst, float value, Location at = {}) {
  detail::writing(dst, at);
  detail_map::assign_vector(dst, [=](int, int) { return value; });
}
template <int kN>
void fill(PerCol<kN>& dst, float value, Location at = {}) {
  detail::writing(dst, at);
  detail_map::assign_vector(dst, [=](int, int) { return value; });
}
template <int kN, typename F>
void for_each(PerRow<kN>& dst, F&& f, Location at = {}) {
  detail::reading(dst, at);
  detail_map::assign_vector(dst, [&](int i, int part) { return f(i, dst.data[i][part]); });
}
template <int kN, typename F>
void for_each(PerCol<kN>& dst, F&& f, Location at = {}) {
  detail::reading(dst, at);
  detail_map::assign_vector(dst, [&](int i, int part) { return f(i, dst.data[i][part]); });
}

// Only compilers for the GPU move waits.
template <typename Values>
void pin(const Values&) {}

}  // namespace tk::warp

namespace tk::warpgroup {

template <typename Tile, typename F>
  requires detail::kIsTile<Tile>
void for_each(Tile& tile, F&& f, Location at = {}) {
  const int first = Tile::kRows * (interpreter::warp_index() & 3);
  warp::for_each(tile, [&](int row, int col, float x) { return f(first + row, col, x); }, at);
}
template <int kN, typename F>
void for_each(PerRow<kN>& rows, F&& f, Location at = {}) {
  const int first = kN * (interpreter::warp_index() & 3);
  warp::for_each(rows, [&](int row, float x) { return f(first + row, x); }, at);
}

template <typename Tile, typename F>
void keep_before(Tile& tile, F&& limit, float value, Location at = {}) {
  for_each(tile, [&](int row, int col, float x) { return col < limit(row) ? x : value; }, at);
}

}  // namespace tk::warpgroup
