// Maps of a triangle of a warpgroup's square tile, sums over one, and its diagonal.
#pragma once

#include "tk/sm90/copy.cuh"

namespace tk::warpgroup {
namespace detail_triangle {

// The lane's values of a group of eight columns.
__device__ __forceinline__ float2 load_pair(const SharedVec<float, 64>& vec, int group) {
  const uint32 first = ptx::shared_address(vec.data) + 4 * detail::col_of(0, 0);
  float2 pair;
  ptx::load_shared_f32x2(pair.x, pair.y, first + 32 * group);
  return pair;
}

__device__ __forceinline__ float2 load_pair(const PerCol<64>& vec, int group) {
  return make_float2(vec.data[group][0], vec.data[group][1]);
}

// Of what a lane holds of eight columns and half of the rows: whether it lies in the triangle.
enum class Side { kInside, kAcross, kOutside };

// Calls inside(group, side_of_half) for every group of eight columns that reaches into the triangle
// and outside(group) for the others, sixteen columns at a time: a whole warp skips what lies beyond
// its rows, and only in the square on the diagonal must a lane ask where its values lie.
template <bool kLower, typename Inside, typename Outside>
__device__ __forceinline__ void walk(Inside&& inside, Outside&& outside) {
  const int warp = ptx::warp_index() & 3;
#pragma unroll
  for (int square = 0; square < 4; ++square) {
    if (square == warp) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        inside(2 * square + i, [i](int half) {
          if (i == half) return Side::kAcross;
          return kLower == (i < half) ? Side::kInside : Side::kOutside;
        });
      }
    } else if (kLower ? square < warp : square > warp) {
#pragma unroll
      for (int i = 0; i < 2; ++i) inside(2 * square + i, [](int) { return Side::kInside; });
    } else {
      outside(2 * square), outside(2 * square + 1);
    }
  }
}
// The same in one place for each warp, for what is short: no warp waits at every square for a
// branch to be taken.
template <bool kLower, int kWarp, typename Inside, typename Outside>
__device__ __forceinline__ void walk_warp(Inside&& inside, Outside&& outside) {
#pragma unroll
  for (int g = 0; g < 8; ++g) {
    if (g / 2 == kWarp) {
      inside(g, [g](int half) {
        if (g % 2 == half) return Side::kAcross;
        return kLower == (g % 2 < half) ? Side::kInside : Side::kOutside;
      });
    } else if (kLower ? g / 2 < kWarp : g / 2 > kWarp) {
      inside(g, [](int) { return Side::kInside; });
    } else {
      outside(g);
    }
  }
}
template <bool kLower, typename Inside, typename Outside>
__device__ __forceinline__ void walk_at_once(Inside&& inside, Outside&& outside) {
  const int warp = ptx::warp_index() & 3;
  if (warp == 0) {
    walk_warp<kLower, 0>(inside, outside);
  } else if (warp == 1) {
    walk_warp<kLower, 1>(inside, outside);
  } else if (warp == 2) {
    walk_warp<kLower, 2>(inside, outside);
  } else {
    walk_warp<kLower, 3>(inside, outside);
  }
}
// Where values lie across the diagonal, how far beyond it the lane's first of two lies.
__device__ __forceinline__ int columns_beyond() {
  return detail::col_of(0, 0) - detail::row_of(0, 0);
}

template <bool kLower, typename Dst, typename Src, typename F, typename... Cols>
__device__ __forceinline__ void map(Dst& dst, const Src& src, F&& f, const PerRow<16>& rows,
                                    const Cols&... cols) {
  static_assert(detail::kSameShape<Dst, Src> && Dst::kRows == 16 && Dst::kCols == 64,
                "a triangle is one of a 64 x 64 tile");
  const int beyond = columns_beyond();
  const auto assign = [&](int g, auto&& side_of, auto... values) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Side side = side_of(h);
      float x = 0.0f, y = 0.0f;
      if (side != Side::kOutside) {
        x = f(detail::get(src, 0, g, 2 * h), rows.data[0][h], values.x...);
        y = f(detail::get(src, 0, g, 2 * h + 1), rows.data[0][h], values.y...);
      }
      if (side == Side::kAcross) {
        x = (kLower ? beyond <= 0 : beyond >= 0) ? x : 0.0f;
        y = (kLower ? beyond < 0 : beyond >= -1) ? y : 0.0f;
      }
      detail::set_pair(dst, 0, g, h, x, y);
    }
  };
  const auto outside = [&](int g) {
    detail::set_pair(dst, 0, g, 0, 0.0f, 0.0f);
    detail::set_pair(dst, 0, g, 1, 0.0f, 0.0f);
  };
  const auto inside = [&](int g, auto&& side_of) { assign(g, side_of, load_pair(cols, g)...); };
  if constexpr (sizeof...(Cols) == 0) {
    walk_at_once<kLower>(inside, outside);
  } else {
    walk<kLower>(inside, outside);
  }
}

template <bool kLower, typename Dst, typename A, typename B, typename F, int kRowVecs, int kColVecs>
__device__ __forceinline__ void fold(Dst& dst, PerRow<16>& sums, PerRow<16>& diagonal, const A& a,
                                     const B& b, const PerRow<16>* const (&rows)[kRowVecs],
                                     const SharedVec<float, 64>* const (&cols)[kColVecs], F&& f) {
  static_assert(detail::kSameShape<Dst, A> && detail::kSameShape<Dst, B> && Dst::kRows == 16 &&
                    Dst::kCols == 64,
                "a triangle is one of a 64 x 64 tile");
  const int beyond = columns_beyond();
  const auto inside = [&](int g, auto&& side_of) {
    float col_values[2][kColVecs];
#pragma unroll
    for (int i = 0; i < kColVecs; ++i) {
      const float2 pair = load_pair(*cols[i], g);
      col_values[0][i] = pair.x, col_values[1][i] = pair.y;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Side side = side_of(h);
      if (side == Side::kOutside) continue;
      float row_values[kRowVecs];
#pragma unroll
      for (int i = 0; i < kRowVecs; ++i) row_values[i] = rows[i]->data[0][h];
      float pair[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float old = detail::get(dst, 0, g, 2 * h + e);
        float x = old;
        const float term = f(x, detail::get(a, 0, g, 2 * h + e), detail::get(b, 0, g, 2 * h + e),
                             row_values, col_values[e]);
        if (side == Side::kInside) {
          sums.data[0][h] += term;
        } else {
          const int place = beyond + e;
          sums.data[0][h] += (kLower ? place < 0 : place > 0) ? term : 0.0f;
          diagonal.data[0][h] += place == 0 ? term : 0.0f;
          x = (kLower ? place <= 0 : place >= 0) ? x : old;
        }
        pair[e] = x;
      }
      detail::set_pair(dst, 0, g, h, pair[0], pair[1]);
    }
  };
  walk<kLower>(inside, [](int) {});
}

}  // namespace detail_triangle

// dst(r, c) = f(src(r, c), rows(r), cols(c)) where c <= r (map_upper: c >= r), zero elsewhere; f is
// not asked there. With two vectors of columns, f takes a value of each; without any, src(r, c).
// Vectors of columns are in shared memory, or in registers where several maps read them.
template <typename Dst, typename Src, typename F>
__device__ __forceinline__ void map_lower(Dst& dst, const Src& src, F&& f, Location = {}) {
  const auto without_row = [&](float x, float) { return f(x); };
  detail_triangle::map<true>(dst, src, without_row, PerRow<16>{});
}
template <typename Dst, typename Src, typename Cols, typename F>
__device__ __forceinline__ void map_lower(Dst& dst, const Src& src, const PerRow<16>& rows,
                                          const Cols& cols, F&& f, Location = {}) {
  detail_triangle::map<true>(dst, src, f, rows, cols);
}
template <typename Dst, typename Src, typename Cols, typename F>
__device__ __forceinline__ void map_lower(Dst& dst, const Src& src, const PerRow<16>& rows,
                                          const Cols& cols, const Cols& more, F&& f,
                                          Location = {}) {
  detail_triangle::map<true>(dst, src, f, rows, cols, more);
}
template <typename Dst, typename Src, typename F>
__device__ __forceinline__ void map_upper(Dst& dst, const Src& src, F&& f, Location = {}) {
  const auto without_row = [&](float x, float) { return f(x); };
  detail_triangle::map<false>(dst, src, without_row, PerRow<16>{});
}
template <typename Dst, typename Src, typename Cols, typename F>
__device__ __forceinline__ void map_upper(Dst& dst, const Src& src, const PerRow<16>& rows,
                                          const Cols& cols, F&& f, Location = {}) {
  detail_triangle::map<false>(dst, src, f, rows, cols);
}
template <typename Dst, typename Src, typename Cols, typename F>
__device__ __forceinline__ void map_upper(Dst& dst, const Src& src, const PerRow<16>& rows,
                                          const Cols& cols, const Cols& more, F&& f,
                                          Location = {}) {
  detail_triangle::map<false>(dst, src, f, rows, cols, more);
}

// Where c <= r (fold_upper: c >= r), term = f(x, a(r, c), b(r, c), rows, cols), of which rows and
// cols are the values of row r and column c in each of the vectors, and x is dst(r, c), which f may
// change. Terms are added to the lanes' parts of diagonal(r) where c = r and of sums(r) elsewhere:
// both are whole only after finish_row_sum. Beyond the diagonal dst stays as it is.
template <typename Dst, typename A, typename B, int kRowVecs, int kColVecs, typename F>
__device__ __forceinline__ void fold_lower(Dst& dst, PerRow<16>& sums, PerRow<16>& diagonal,
                                           const A& a, const B& b,
                                           const PerRow<16>* const (&rows)[kRowVecs],
                                           const SharedVec<float, 64>* const (&cols)[kColVecs],
                                           F&& f, Location = {}) {
  detail_triangle::fold<true>(dst, sums, diagonal, a, b, rows, cols, f);
}
template <typename Dst, typename A, typename B, int kRowVecs, int kColVecs, typename F>
__device__ __forceinline__ void fold_upper(Dst& dst, PerRow<16>& sums, PerRow<16>& diagonal,
                                           const A& a, const B& b,
                                           const PerRow<16>* const (&rows)[kRowVecs],
                                           const SharedVec<float, 64>* const (&cols)[kColVecs],
                                           F&& f, Location = {}) {
  detail_triangle::fold<false>(dst, sums, diagonal, a, b, rows, cols, f);
}

// dst(r) = src(r, r).
__device__ __forceinline__ void diagonal(PerRow<16>& dst, const RegTile<float, 16, 64>& src,
                                         Location = {}) {
  const int thread = ptx::fresh_thread_index();
  const int warp = thread >> 5 & 3, lane = thread & 31, row = lane >> 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float pair[2] = {};
#pragma unroll
    for (int square = 0; square < 4; ++square) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float x = detail::get(src, 0, 2 * square + h, 2 * h + e);
        pair[e] = square == warp ? x : pair[e];
      }
    }
    dst.data[0][h] = ptx::shuffle((row & 1) != 0 ? pair[1] : pair[0], (lane & ~3) | (row >> 1));
  }
}

}  // namespace tk::warpgroup
