// Elementwise operations on register tiles and vectors: destination first, then operands.
//
// map and zip take any function of floats; tk/elementwise.cuh has the named operations. Operands
// may be tiles of another type than the destination: values are fp32 on the way.
#pragma once

#include "tk/sm90/ptx/math.cuh"
#include "tk/sm90/register_tile.cuh"

// Functions of single values, for use in maps. Most are approximations: see ptx/math.cuh.
namespace tk::math {
using ptx::abs, ptx::exp2, ptx::fma, ptx::log, ptx::log2, ptx::max, ptx::max_nan, ptx::min,
    ptx::mul, ptx::reciprocal, ptx::rsqrt, ptx::tanh;
using ptx::count_bits, ptx::highest_bit, ptx::lowest_bit;
}  // namespace tk::math

namespace tk::warp {

// dst = f(src), value by value.
template <typename Dst, typename Src, typename F>
__device__ __forceinline__ void map(Dst& dst, const Src& src, F&& f, Location = {}) {
  static_assert(detail::kSameShape<Dst, Src>, "map needs tiles of one shape");
  detail::for_each_pair<Dst>([&](int s, int g, int h) {
    detail::set_pair(dst, s, g, h, f(detail::get(src, s, g, 2 * h)),
                     f(detail::get(src, s, g, 2 * h + 1)));
  });
}

// Whether none of a warp's values is larger than limit, whatever its sign. NaN is not larger.
template <typename Src>
__device__ __forceinline__ bool all_within(const Src& src, float limit, Location = {}) {
  float largest[4] = {};  // four, as each waits for the one before
  detail::for_each_pair<Src>([&](int s, int g, int h) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float& so_far = largest[2 * h + i];
      so_far = ptx::max(so_far, ptx::abs(detail::get(src, s, g, 2 * h + i)));
    }
  });
  return !ptx::any(ptx::max(ptx::max(largest[0], largest[1]), ptx::max(largest[2], largest[3])) >
                   limit);
}

// Of every 16 x 16 square, dst = f(src) if none of its values is larger than limit, whatever its
// sign, otherwise dst = g(src). Lanes decide together, first for the whole tile, so the two should
// differ in nothing but their cost. NaN is not larger.
template <typename Dst, typename Src, typename F, typename G>
__device__ __forceinline__ void map_within(Dst& dst, const Src& src, float limit, F&& f, G&& g,
                                           Location = {}) {
  static_assert(detail::kSameShape<Dst, Src>, "map_within needs tiles of one shape");
  const auto square = [&](int s, int c, auto&& function) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      function(s, 2 * c + (i >> 1), i & 1);
    }
  };
  const auto each_square = [&](auto&& function) {
#pragma unroll
    for (int s = 0; s < Src::kRowSquares; ++s) {
#pragma unroll
      for (int c = 0; c < Src::kCols / 16; ++c) {
        function(s, c);
      }
    }
  };
  const auto assign = [&](int s, int c, auto&& function) {
    square(s, c, [&](int s, int group, int h) {
      detail::set_pair(dst, s, group, h, function(detail::get(src, s, group, 2 * h)),
                       function(detail::get(src, s, group, 2 * h + 1)));
    });
  };
  const auto raise = [&](float& largest, int s, int c) {
    square(s, c, [&](int s, int group, int h) {
      largest = ptx::max(largest, ptx::abs(detail::get(src, s, group, 2 * h)));
      largest = ptx::max(largest, ptx::abs(detail::get(src, s, group, 2 * h + 1)));
    });
  };
  float largest[2] = {};  // two, as each waits for the one before
  each_square([&](int s, int c) { raise(largest[c & 1], s, c); });
  if (!ptx::any(ptx::max(largest[0], largest[1]) > limit)) {
    each_square([&](int s, int c) { assign(s, c, f); });
    return;
  }
  each_square([&](int s, int c) {
    float largest = 0.0f;
    raise(largest, s, c);
    if (ptx::any(largest > limit)) {
      assign(s, c, g);
    } else {
      assign(s, c, f);
    }
  });
}

// dst = f(a, b), value by value.
template <typename Dst, typename A, typename B, typename F>
__device__ __forceinline__ void zip(Dst& dst, const A& a, const B& b, F&& f, Location = {}) {
  static_assert(detail::kSameShape<Dst, A> && detail::kSameShape<Dst, B>,
                "zip needs tiles of one shape");
  detail::for_each_pair<Dst>([&](int s, int g, int h) {
    detail::set_pair(dst, s, g, h, f(detail::get(a, s, g, 2 * h), detail::get(b, s, g, 2 * h)),
                     f(detail::get(a, s, g, 2 * h + 1), detail::get(b, s, g, 2 * h + 1)));
  });
}

// dst = f(src, rows), where rows has a value for each row.
template <typename Dst, typename Src, int kN, typename F>
__device__ __forceinline__ void map_rows(Dst& dst, const Src& src, const PerRow<kN>& rows, F&& f,
                                         Location = {}) {
  static_assert(detail::kSameShape<Dst, Src> && Dst::kRows == kN,
                "map_rows needs a value for each row of the tile");
  detail::for_each_pair<Dst>([&](int s, int g, int h) {
    detail::set_pair(dst, s, g, h, f(detail::get(src, s, g, 2 * h), rows.data[s][h]),
                     f(detail::get(src, s, g, 2 * h + 1), rows.data[s][h]));
  });
}

// dst = f(src, cols), where cols has a value for each column.
template <typename Dst, typename Src, int kN, typename F>
__device__ __forceinline__ void map_cols(Dst& dst, const Src& src, const PerCol<kN>& cols, F&& f,
                                         Location = {}) {
  static_assert(detail::kSameShape<Dst, Src> && Dst::kCols == kN,
                "map_cols needs a value for each column of the tile");
  detail::for_each_pair<Dst>([&](int s, int g, int h) {
    detail::set_pair(dst, s, g, h, f(detail::get(src, s, g, 2 * h), cols.data[g][0]),
                     f(detail::get(src, s, g, 2 * h + 1), cols.data[g][1]));
  });
}

// dst(r, c) = f(rows(r), cols(c)): outer differences, products and decays.
template <typename Dst, int kR, int kC, typename F>
__device__ __forceinline__ void outer(Dst& dst, const PerRow<kR>& rows, const PerCol<kC>& cols,
                                      F&& f, Location = {}) {
  static_assert(Dst::kRows == kR && Dst::kCols == kC, "outer needs vectors of the tile's shape");
  detail::for_each_pair<Dst>([&](int s, int g, int h) {
    detail::set_pair(dst, s, g, h, f(rows.data[s][h], cols.data[g][0]),
                     f(rows.data[s][h], cols.data[g][1]));
  });
}

// tile(r, c) = f(r, c, tile(r, c)): the one door to coordinates, here within the warp's rows.
template <typename Tile, typename F>
__device__ __forceinline__ void for_each(Tile& tile, F&& f, Location = {}) {
  detail::for_each_pair<Tile>([&](int s, int g, int h) {
    const int row = detail::row_of(s, 2 * h);
    const int col = detail::col_of(g, 2 * h);
    detail::set_pair(tile, s, g, h, f(row, col, detail::get(tile, s, g, 2 * h)),
                     f(row, col + 1, detail::get(tile, s, g, 2 * h + 1)));
  });
}

template <typename Tile>
__device__ __forceinline__ void fill(Tile& dst, float value, Location = {}) {
  detail::for_each_pair<Tile>(
      [&](int s, int g, int h) { detail::set_pair(dst, s, g, h, value, value); });
}

// Rounds, widens or copies, as the types ask.
template <typename Dst, typename Src>
__device__ __forceinline__ void convert(Dst& dst, const Src& src, Location = {}) {
  if constexpr (kSame<typename Dst::T, typename Src::T>) {
    static_assert(detail::kSameShape<Dst, Src>, "convert needs tiles of one shape");
#pragma unroll
    for (int s = 0; s < Src::kRowSquares; ++s) {
#pragma unroll
      for (int i = 0; i < Src::kRegisters; ++i) dst.data[s][i] = src.data[s][i];
    }
  } else {
    map(dst, src, [](float x) { return x; });
  }
}

// Vectors: the same verbs, value by value.
template <int kN, typename F>
__device__ __forceinline__ void map(PerRow<kN>& dst, const PerRow<kN>& src, F&& f, Location = {}) {
#pragma unroll
  for (int s = 0; s < kN / 16; ++s) {
    dst.data[s][0] = f(src.data[s][0]);
    dst.data[s][1] = f(src.data[s][1]);
  }
}
template <int kN, typename F>
__device__ __forceinline__ void zip(PerRow<kN>& dst, const PerRow<kN>& a, const PerRow<kN>& b,
                                    F&& f, Location = {}) {
#pragma unroll
  for (int s = 0; s < kN / 16; ++s) {
    dst.data[s][0] = f(a.data[s][0], b.data[s][0]);
    dst.data[s][1] = f(a.data[s][1], b.data[s][1]);
  }
}
template <int kN>
__device__ __forceinline__ void fill(PerRow<kN>& dst, float value, Location = {}) {
  map(dst, dst, [value](float) { return value; });
}
template <int kN, typename F>
__device__ __forceinline__ void map(PerCol<kN>& dst, const PerCol<kN>& src, F&& f, Location = {}) {
#pragma unroll
  for (int g = 0; g < kN / 8; ++g) {
    dst.data[g][0] = f(src.data[g][0]);
    dst.data[g][1] = f(src.data[g][1]);
  }
}
template <int kN, typename F>
__device__ __forceinline__ void zip(PerCol<kN>& dst, const PerCol<kN>& a, const PerCol<kN>& b,
                                    F&& f, Location = {}) {
#pragma unroll
  for (int g = 0; g < kN / 8; ++g) {
    dst.data[g][0] = f(a.data[g][0], b.data[g][0]);
    dst.data[g][1] = f(a.data[g][1], b.data[g][1]);
  }
}
template <int kN>
__device__ __forceinline__ void fill(PerCol<kN>& dst, float value, Location = {}) {
  map(dst, dst, [value](float) { return value; });
}
// f(row, value): a vector's door to coordinates, within the warp's rows.
template <int kN, typename F>
__device__ __forceinline__ void for_each(PerRow<kN>& dst, F&& f, Location = {}) {
#pragma unroll
  for (int s = 0; s < kN / 16; ++s) {
    dst.data[s][0] = f(detail::row_of(s, 0), dst.data[s][0]);
    dst.data[s][1] = f(detail::row_of(s, 2), dst.data[s][1]);
  }
}
template <int kN, typename F>
__device__ __forceinline__ void for_each(PerCol<kN>& dst, F&& f, Location = {}) {
#pragma unroll
  for (int g = 0; g < kN / 8; ++g) {
    dst.data[g][0] = f(detail::col_of(g, 0), dst.data[g][0]);
    dst.data[g][1] = f(detail::col_of(g, 1), dst.data[g][1]);
  }
}

}  // namespace tk::warp

namespace tk::warpgroup {

// Coordinates within the 64 rows of a warpgroup's tile.
template <typename Tile, typename F>
__device__ __forceinline__ void for_each(Tile& tile, F&& f, Location = {}) {
  const int first = Tile::kRows * (ptx::warp_index() & 3);
  warp::for_each(tile, [&](int row, int col, float x) { return f(first + row, col, x); });
}
template <int kN, typename F>
__device__ __forceinline__ void for_each(PerRow<kN>& rows, F&& f, Location = {}) {
  const int first = kN * (ptx::warp_index() & 3);
  warp::for_each(rows, [&](int row, float x) { return f(first + row, x); });
}

// Keeps of every row the columns before limit(row). What a lane's columns differ by is taken from
// the limits, of which it has few, so that all columns are numbers that instructions hold.
template <typename Tile, typename F>
__device__ __forceinline__ void keep_before(Tile& tile, F&& limit, float value, Location = {}) {
  // Not kept in registers from before a loop.
  const int thread = ptx::fresh_thread_index();
  const int first = Tile::kRows * (thread >> 5 & 3) + ((thread & 31) >> 2);
  const int first_col = 2 * (thread & 3);
#pragma unroll
  for (int s = 0; s < Tile::kRowSquares; ++s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int end = limit(first + 16 * s + 8 * h) - first_col;
#pragma unroll
      for (int g = 0; g < Tile::kColGroups; ++g) {
        detail::set_pair(tile, s, g, h, 8 * g < end ? detail::get(tile, s, g, 2 * h) : value,
                         8 * g + 1 < end ? detail::get(tile, s, g, 2 * h + 1) : value);
      }
    }
  }
}

}  // namespace tk::warpgroup
