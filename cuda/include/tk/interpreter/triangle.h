// Maps of a triangle of a warpgroup's square tile, sums over one, and its diagonal.
#pragma once

#include "tk/interpreter/copy.h"

namespace tk::warpgroup {
namespace detail_triangle {

inline PerCol<64> load_all(const SharedVec<float, 64>& vec, Location at) {
  PerCol<64> values;
  warp::load(values, vec, at);
  return values;
}
inline PerCol<64> load_all(const PerCol<64>& values, Location at) {
  detail::reading(values, at);
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

template <bool kLower, typename Dst, typename A, typename B, int kRowVecs, int kColVecs, typename F>
void fold(Dst& dst, PerRow<16>& sums, PerRow<16>& diagonal, const A& a, const B& b,
          const PerRow<16>* const (&rows)[kRowVecs],
          const SharedVec<float, 64>* const (&cols)[kColVecs], F&& f, Location at) {
  static_assert(detail::kSameShape<Dst, A> && detail::kSameShape<Dst, B> && Dst::kRows == 16 &&
                    Dst::kCols == 64,
                "a triangle is one of a 64 x 64 tile");
  detail::reading(dst, at);
  detail::reading(sums, at);
  detail::reading(diagonal, at);
  detail::reading(a, at);
  detail::reading(b, at);
  PerCol<64> all_cols[kColVecs];
  for (int i = 0; i < kRowVecs; ++i) detail::reading(*rows[i], at);
  for (int i = 0; i < kColVecs; ++i) all_cols[i] = load_all(*cols[i], at);
  const int first = 16 * detail::warp_of_group();
  warp::detail_map::assign(dst, [&](int r, int c) {
    float x = warp::detail_map::value(dst, r, c);
    if (kLower ? c > first + r : c < first + r) return x;
    const int part = detail::part_of_col(c);
    float row_values[kRowVecs], col_values[kColVecs];
    for (int i = 0; i < kRowVecs; ++i) row_values[i] = rows[i]->data[r][part];
    for (int i = 0; i < kColVecs; ++i) {
      col_values[i] = all_cols[i].data[c][detail::part_of_row(r)];
    }
    (c == first + r ? diagonal : sums).data[r][part] +=
        f(x, warp::detail_map::value(a, r, c), warp::detail_map::value(b, r, c), row_values,
          col_values);
    return x;
  });
}

}  // namespace detail_triangle

template <typename Dst, typename Src, typename F>
void map_lower(Dst& dst, const Src& src, F&& f, Location at = {}) {
  PerRow<16> rows;
  warp::fill(rows, 0.0f);
  detail_triangle::map<true>(dst, src, [&](float x, float) { return f(x); }, at, rows);
}
template <typename Dst, typename Src, typename Cols, typename F>
void map_lower(Dst& dst, const Src& src, const PerRow<16>& rows, const Cols& cols, F&& f,
               Location at = {}) {
  detail_triangle::map<true>(dst, src, f, at, rows, cols);
}
template <typename Dst, typename Src, typename Cols, typename F>
void map_lower(Dst& dst, const Src& src, const PerRow<16>& rows, const Cols& cols, const Cols& more,
               F&& f, Location at = {}) {
  detail_triangle::map<true>(dst, src, f, at, rows, cols, more);
}
template <typename Dst, typename Src, typename F>
void map_upper(Dst& dst, const Src& src, F&& f, Location at = {}) {
  PerRow<16> rows;
  warp::fill(rows, 0.0f);
  detail_triangle::map<false>(dst, src, [&](float x, float) { return f(x); }, at, rows);
}
template <typename Dst, typename Src, typename Cols, typename F>
void map_upper(Dst& dst, const Src& src, const PerRow<16>& rows, const Cols& cols, F&& f,
               Location at = {}) {
  detail_triangle::map<false>(dst, src, f, at, rows, cols);
}
template <typename Dst, typename Src, typename Cols, typename F>
void map_upper(Dst& dst, const Src& src, const PerRow<16>& rows, const Cols& cols, const Cols& more,
               F&& f, Location at = {}) {
  detail_triangle::map<false>(dst, src, f, at, rows, cols, more);
}

template <typename Dst, typename A, typename B, int kRowVecs, int kColVecs, typename F>
void fold_lower(Dst& dst, PerRow<16>& sums, PerRow<16>& diagonal, const A& a, const B& b,
                const PerRow<16>* const (&rows)[kRowVecs],
                const SharedVec<float, 64>* const (&cols)[kColVecs], F&& f, Location at = {}) {
  detail_triangle::fold<true>(dst, sums, diagonal, a, b, rows, cols, f, at);
}
template <typename Dst, typename A, typename B, int kRowVecs, int kColVecs, typename F>
void fold_upper(Dst& dst, PerRow<16>& sums, PerRow<16>& diagonal, const A& a, const B& b,
                const PerRow<16>* const (&rows)[kRowVecs],
                const SharedVec<float, 64>* const (&cols)[kColVecs], F&& f, Location at = {}) {
  detail_triangle::fold<false>(dst, sums, diagonal, a, b, rows, cols, f, at);
}

inline void diagonal(PerRow<16>& dst, const RegTile<float, 16, 64>& src, Location at = {}) {
  detail::reading(src, at);
  detail::writing(dst, at);
  const int first = 16 * detail::warp_of_group();
  warp::detail_map::assign_vector(
      dst, [&](int i, int) { return warp::detail_map::value(src, i, first + i); });
}

}  // namespace tk::warpgroup
