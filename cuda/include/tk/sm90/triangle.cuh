// Maps of a triangle of a warpgroup's square tile.
#pragma once

#include "tk/sm90/copy.cuh"

namespace tk::warpgroup {
namespace detail_triangle {

__device__ __forceinline__ float2 load_pair(const SharedVec<float, 64>& vec, int first) {
  float2 pair;
  ptx::load_shared_f32x2(pair.x, pair.y, ptx::shared_address(vec.data) + 4 * first);
  return pair;
}

// What lies beyond a warp's rows is skipped by the whole warp, sixteen columns at a time.
template <bool kLower, typename Dst, typename Src, typename F, typename... Cols>
__device__ __forceinline__ void map(Dst& dst, const Src& src, F&& f, const PerRow<16>& rows,
                                    const Cols&... cols) {
  static_assert(detail::kSameShape<Dst, Src> && Dst::kRows == 16 && Dst::kCols == 64,
                "a triangle is one of a 64 x 64 tile");
  const int warp = ptx::warp_index() & 3;
  const auto group = [&](int g, auto... values) {
    const int col = detail::col_of(g, 0);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 16 * warp + detail::row_of(0, 2 * h);
      const float x = f(detail::get(src, 0, g, 2 * h), rows.data[0][h], values.x...);
      const float y = f(detail::get(src, 0, g, 2 * h + 1), rows.data[0][h], values.y...);
      detail::set_pair(dst, 0, g, h, (kLower ? col <= row : col >= row) ? x : 0.0f,
                       (kLower ? col < row : col + 1 >= row) ? y : 0.0f);
    }
  };
#pragma unroll
  for (int square = 0; square < Dst::kCols / 16; ++square) {
    const bool reached = kLower ? square <= warp : square >= warp;
#pragma unroll
    for (int g = 2 * square; g < 2 * square + 2; ++g) {
      if (reached) {
        group(g, load_pair(cols, detail::col_of(g, 0))...);
      } else {
        detail::set_pair(dst, 0, g, 0, 0.0f, 0.0f);
        detail::set_pair(dst, 0, g, 1, 0.0f, 0.0f);
      }
    }
  }
}

}  // namespace detail_triangle

// dst(r, c) = f(src(r, c), rows(r), cols(c)) where c <= r (map_upper: c >= r), zero elsewhere; f is
// not asked there. With two vectors of columns, f takes a value of each; without any, src(r, c).
template <typename Dst, typename Src, typename F>
__device__ __forceinline__ void map_lower(Dst& dst, const Src& src, F&& f, Location = {}) {
  const auto without_row = [&](float x, float) { return f(x); };
  detail_triangle::map<true>(dst, src, without_row, PerRow<16>{});
}
template <typename Dst, typename Src, typename F>
__device__ __forceinline__ void map_lower(Dst& dst, const Src& src, const PerRow<16>& rows,
                                          const SharedVec<float, 64>& cols, F&& f, Location = {}) {
  detail_triangle::map<true>(dst, src, f, rows, cols);
}
template <typename Dst, typename Src, typename F>
__device__ __forceinline__ void map_lower(Dst& dst, const Src& src, const PerRow<16>& rows,
                                          const SharedVec<float, 64>& cols,
                                          const SharedVec<float, 64>& more, F&& f, Location = {}) {
  detail_triangle::map<true>(dst, src, f, rows, cols, more);
}
template <typename Dst, typename Src, typename F>
__device__ __forceinline__ void map_upper(Dst& dst, const Src& src, F&& f, Location = {}) {
  const auto without_row = [&](float x, float) { return f(x); };
  detail_triangle::map<false>(dst, src, without_row, PerRow<16>{});
}
template <typename Dst, typename Src, typename F>
__device__ __forceinline__ void map_upper(Dst& dst, const Src& src, const PerRow<16>& rows,
                                          const SharedVec<float, 64>& cols, F&& f, Location = {}) {
  detail_triangle::map<false>(dst, src, f, rows, cols);
}
template <typename Dst, typename Src, typename F>
__device__ __forceinline__ void map_upper(Dst& dst, const Src& src, const PerRow<16>& rows,
                                          const SharedVec<float, 64>& cols,
                                          const SharedVec<float, 64>& more, F&& f, Location = {}) {
  detail_triangle::map<false>(dst, src, f, rows, cols, more);
}

}  // namespace tk::warpgroup
