// Maps of a triangle of a warpgroup's square tile.
#pragma once

#include "tk/interpreter/copy.h"

namespace tk::warpgroup {
namespace detail_triangle {

inline PerCol<64> load_all(const SharedVec<float, 64>& vec, Location at) {
  PerCol<64> values;
  warp::load(values, vec, at);
  return values;
}

template <bool kLower, typename Dst, typename Src, typename F, typename... Cols>
void map(Dst& dst, const Src& src, F&& f, Location at, const PerRow<16>& rows,
         const Cols&... cols) {
  static_assert(detail::kSameShape<Dst, Src> && Dst::kRows == 16 && Dst::kCols == 64,
                "a triangle is one of a 64 x 64 tile");
  const auto assign = [&](const auto&... values) {
    detail::reading(src, at);
    detail::reading(rows, at);
    detail::writing(dst, at);
    const int first = 16 * detail::warp_of_group();
    warp::detail_map::assign(dst, [&](int r, int c) {
      if (kLower ? c > first + r : c < first + r) return 0.0f;
      return f(warp::detail_map::value(src, r, c), rows.data[r][detail::part_of_col(c)],
               values.data[c][detail::part_of_row(r)]...);
    });
  };
  assign(load_all(cols, at)...);
}

}  // namespace detail_triangle

template <typename Dst, typename Src, typename F>
void map_lower(Dst& dst, const Src& src, F&& f, Location at = {}) {
  PerRow<16> rows;
  warp::fill(rows, 0.0f);
  detail_triangle::map<true>(dst, src, [&](float x, float) { return f(x); }, at, rows);
}
template <typename Dst, typename Src, typename F>
void map_lower(Dst& dst, const Src& src, const PerRow<16>& rows, const SharedVec<float, 64>& cols,
               F&& f, Location at = {}) {
  detail_triangle::map<true>(dst, src, f, at, rows, cols);
}
template <typename Dst, typename Src, typename F>
void map_lower(Dst& dst, const Src& src, const PerRow<16>& rows, const SharedVec<float, 64>& cols,
               const SharedVec<float, 64>& more, F&& f, Location at = {}) {
  detail_triangle::map<true>(dst, src, f, at, rows, cols, more);
}
template <typename Dst, typename Src, typename F>
void map_upper(Dst& dst, const Src& src, F&& f, Location at = {}) {
  PerRow<16> rows;
  warp::fill(rows, 0.0f);
  detail_triangle::map<false>(dst, src, [&](float x, float) { return f(x); }, at, rows);
}
template <typename Dst, typename Src, typename F>
void map_upper(Dst& dst, const Src& src, const PerRow<16>& rows, const SharedVec<float, 64>& cols,
               F&& f, Location at = {}) {
  detail_triangle::map<false>(dst, src, f, at, rows, cols);
}
template <typename Dst, typename Src, typename F>
void map_upper(Dst& dst, const Src& src, const PerRow<16>& rows, const SharedVec<float, 64>& cols,
               const SharedVec<float, 64>& more, F&& f, Location at = {}) {
  detail_triangle::map<false>(dst, src, f, at, rows, cols, more);
}

}  // namespace tk::warpgroup
