// Reductions and running sums over the rows and columns of a register tile.
//
// Values are folded in the order in which lanes hold and exchange them, so that rounding is that of
// the hardware.
#pragma once

#include "tk/interpreter/copy.h"
#include "tk/interpreter/map.h"

namespace tk::warp {

template <int kN, typename Src, typename Op>
void fold_rows(PerRow<kN>& rows, const Src& src, Op&& op, Location at = {}) {
  static_assert(Src::kRows == kN, "fold_rows needs a value for each row of the tile");
  detail::reading(src, at);
  detail::reading(rows, at);
  for (int r = 0; r < kN; ++r) {
    for (int c = 0; c < Src::kCols; c += 2) {
      float& part = rows.data[r][detail::part_of_col(c)];
      part = op(part, op(detail_map::value(src, r, c), detail_map::value(src, r, c + 1)));
    }
  }
}

template <int kN, typename A, typename B>
void fold_row_dot(PerRow<kN>& rows, const A& a, const B& b, Location at = {}) {
  static_assert(detail::kSameShape<A, B> && A::kRows == kN,
                "fold_row_dot needs tiles of one shape and a value for each row");
  detail::reading(a, at);
  detail::reading(b, at);
  detail::reading(rows, at);
  for (int r = 0; r < kN; ++r) {
    for (int c = 0; c < A::kCols; ++c) {
      float& part = rows.data[r][detail::part_of_col(c)];
      part = math::fma(detail_map::value(a, r, c), detail_map::value(b, r, c), part);
    }
  }
}

namespace detail_reduce {
// Brings the parts together as exchanges with the lane 1, 2, 4 .. away do.
template <int kParts, typename Op>
void exchange(float (&parts)[kParts], Op&& op) {
  for (int distance = 1; distance < kParts; distance *= 2) {
    float whole[kParts];
    for (int i = 0; i < kParts; ++i) whole[i] = op(parts[i], parts[i ^ distance]);
    for (int i = 0; i < kParts; ++i) parts[i] = whole[i];
  }
}
}  // namespace detail_reduce

template <int kN, typename Op>
void finish_rows(PerRow<kN>& rows, Op&& op, Location at = {}) {
  detail::reading(rows, at);
  for (auto& parts : rows.data) detail_reduce::exchange(parts, op);
}
template <int kN, typename Src, typename Op>
void reduce_rows(PerRow<kN>& rows, const Src& src, float start, Op&& op, Location at = {}) {
  fill(rows, start, at);
  fold_rows(rows, src, op, at);
  finish_rows(rows, op, at);
}

template <int kN, typename F>
bool any_row(const PerRow<kN>& a, const PerRow<kN>& b, F&& f, Location at = {}) {
  detail::reading(a, at);
  detail::reading(b, at);
  for (int r = 0; r < kN; ++r) {
    for (int part = 0; part < PerRow<kN>::kParts; ++part) {
      if (f(a.data[r][part], b.data[r][part])) return true;
    }
  }
  return false;
}

template <int kN, typename Src, typename Op>
void fold_cols(PerCol<kN>& cols, const Src& src, Op&& op, Location at = {}) {
  static_assert(Src::kCols == kN, "fold_cols needs a value for each column of the tile");
  detail::reading(src, at);
  detail::reading(cols, at);
  for (int r = 0; r < Src::kRows; ++r) {
    for (int c = 0; c < kN; ++c) {
      float& part = cols.data[c][detail::part_of_row(r)];
      part = op(part, detail_map::value(src, r, c));
    }
  }
}
template <int kN, typename Op>
void finish_cols(PerCol<kN>& cols, Op&& op, Location at = {}) {
  detail::reading(cols, at);
  for (auto& parts : cols.data) detail_reduce::exchange(parts, op);
}
template <int kN, typename Src, typename Op>
void reduce_cols(PerCol<kN>& cols, const Src& src, float start, Op&& op, Location at = {}) {
  fill(cols, start, at);
  fold_cols(cols, src, op, at);
  finish_cols(cols, op, at);
}

template <typename Src>
void store_col_sum(SharedVec<float, 64>& dst, const Src& src, Location at = {}) {
  PerCol<64> cols;
  fill(cols, 0.0f, at);
  fold_cols(cols, src, [](float x, float y) { return x + y; }, at);
  // Exchanges with the parts 4, 2 and 1 away.
  for (auto& parts : cols.data) {
    for (int distance = 4; distance > 0; distance /= 2) {
      for (int i = 0; i < distance; ++i) parts[i] += parts[i + distance];
    }
    for (float& part : parts) part = parts[0];
  }
  store(dst, cols, at);
}

template <int kN, int kParts>
void add_parts(SharedVec<float, kN>& dst, const SharedVec<float, kN>& src,
               const SharedVec<float, kN> (&parts)[kParts], Location at = {}) {
  static_assert(kN % 32 == 0, "add_parts has as many elements in every lane");
  PerCol<kN> sums, part;
  load(sums, src, at);
  for (const auto& each : parts) {
    load(part, each, at);
    zip(sums, sums, part, [](float x, float y) { return x + y; }, at);
  }
  store(dst, sums, at);
}

template <typename Dst, typename Src>
void cumsum_cols(Dst& dst, const Src& src, Location at = {}) {
  static_assert(detail::kSameShape<Dst, Src>, "cumsum_cols needs tiles of one shape");
  detail::reading(src, at);
  detail::writing(dst, at);
  for (int r = 0; r < Src::kRows; ++r) {
    float sum = 0.0f;
    for (int c = 0; c < Src::kCols; ++c) {
      sum += detail_map::value(src, r, c);
      dst.data[r][c] = interpreter::from_float<typename Dst::T>(sum);
    }
  }
}

template <typename Dst, typename Src>
void reverse_cols(Dst& dst, const Src& src, Location at = {}) {
  static_assert(detail::kSameShape<Dst, Src>, "reverse_cols needs tiles of one shape");
  detail::reading(src, at);
  Dst result = {};
  detail::writing(result, at);
  detail_map::assign(result,
                     [&](int r, int c) { return detail_map::value(src, r, Src::kCols - 1 - c); });
  detail::writing(dst, at);
  dst = result;
}

template <typename Dst, typename Src>
void cumsum_rows(Dst& dst, const Src& src, Location at = {}) {
  static_assert(detail::kSameShape<Dst, Src>, "cumsum_rows needs tiles of one shape");
  detail::reading(src, at);
  detail::writing(dst, at);
  for (int c = 0; c < Src::kCols; ++c) {
    float sum = 0.0f;
    for (int r = 0; r < Src::kRows; ++r) {
      sum += detail_map::value(src, r, c);
      dst.data[r][c] = interpreter::from_float<typename Dst::T>(sum);
    }
  }
}

template <typename T, int kN>
void transpose(RegTile<T, kN, kN>& dst, const RegTile<T, kN, kN>& src, Location at = {}) {
  static_assert(kIsHalf<T>, "transpose moves 16-bit values");
  detail::reading(src, at);
  RegTile<T, kN, kN> result;
  detail::writing(result, at);
  for (int r = 0; r < kN; ++r) {
    for (int c = 0; c < kN; ++c) result.data[c][r] = src.data[r][c];
  }
  detail::writing(dst, at);
  dst = result;
}

}  // namespace tk::warp

namespace tk::warpgroup {

inline void store_row_sums(const GlobalVec<float>& dst, const PerRow<16>& src, Location at = {}) {
  PerRow<16> whole = src;
  warp::finish_rows(whole, [](float x, float y) { return x + y; }, at);
  store(dst, whole, 0, at);
}
inline void store_row_sums(const GlobalVec<float>& dst, const PerRow<16>& src,
                           const GlobalVec<float>& other_dst, const PerRow<16>& other,
                           Location at = {}) {
  store_row_sums(dst, src, at);
  store_row_sums(other_dst, other, at);
}

}  // namespace tk::warpgroup
