// Tiles and vectors in registers.
//
// A tile belongs to a warp and is made of 16 x 16 squares. Warpgroup operations see the tiles of
// four warps stacked: a RegTile<T, 16, C> is a warp's sixteen rows of a 64 x C tile.
//
// How a square is spread over the lanes is the layout of wgmma's accumulator, which for 16-bit
// types is also that of its A operand: lane 4 g + i holds rows g and g + 8, and of every eight
// columns 2 i and 2 i + 1. Only this library knows; kernels name rows and columns (for_each).
#pragma once

#include "tk/base.cuh"
#include "tk/sm90/ptx/convert.cuh"
#include "tk/sm90/ptx/thread.cuh"

namespace tk {

namespace detail {
// What registers hold: fp32 singly, 16-bit values in pairs of neighbouring columns.
template <typename T>
struct Register {
  static_assert(kIsHalf<T>, "register tiles hold float, bf16 or fp16");
  using Type = uint32;
  static constexpr int kValues = 2;
};
template <>
struct Register<float> {
  using Type = float;
  static constexpr int kValues = 1;
};
}  // namespace detail

// Rows and columns are multiples of 16. Registers run, for each 16 rows, over groups of eight
// columns: two values of row g, then two of row g + 8.
template <typename T_, int kRows_, int kCols_>
struct RegTile {
  static_assert(kRows_ % 16 == 0 && kCols_ % 16 == 0, "a register tile is made of 16 x 16 squares");
  using T = T_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kRowSquares = kRows / 16;
  static constexpr int kColGroups = kCols / 8;
  static constexpr int kValues = detail::Register<T>::kValues;
  static constexpr int kRegisters = kColGroups * 4 / kValues;  // of each 16 rows
  typename detail::Register<T>::Type data[kRowSquares][kRegisters];
};

// A value for every row of a tile of kN rows, as row reductions make it.
template <int kN_>
struct PerRow {
  static constexpr int kN = kN_;
  float data[kN / 16][2];
};

// A value for every column of a tile of kN columns, as column reductions make it.
template <int kN_>
struct PerCol {
  static constexpr int kN = kN_;
  float data[kN / 8][2];
};

namespace detail {

// Row and column, within the warp's tile, of value `e` (0..3) of column group `group`.
__device__ __forceinline__ int row_of(int square, int e) {
  return 16 * square + 8 * (e >> 1) + (ptx::lane_index() >> 2);
}
__device__ __forceinline__ int col_of(int group, int e) {
  return 8 * group + 2 * (ptx::lane_index() & 3) + (e & 1);
}

// Reads and writes value `e` of a group as fp32, whatever the tile holds.
template <typename Tile>
__device__ __forceinline__ float get(const Tile& tile, int square, int group, int e) {
  if constexpr (Tile::kValues == 1) {
    return tile.data[square][4 * group + e];
  } else {
    float low, high;
    ptx::unpack<typename Tile::T>(tile.data[square][2 * group + (e >> 1)], low, high);
    return (e & 1) ? high : low;
  }
}

// Calls f(square, group, half) for every pair of neighbouring values: half 0 is row g, half 1 is
// row g + 8.
template <typename Tile, typename F>
__device__ __forceinline__ void for_each_pair(F&& f) {
#pragma unroll
  for (int square = 0; square < Tile::kRowSquares; ++square) {
#pragma unroll
    for (int group = 0; group < Tile::kColGroups; ++group) {
#pragma unroll
      for (int half = 0; half < 2; ++half) f(square, group, half);
    }
  }
}

template <typename Tile>
__device__ __forceinline__ void set_pair(Tile& tile, int square, int group, int half, float x,
                                         float y) {
  if constexpr (Tile::kValues == 1) {
    tile.data[square][4 * group + 2 * half] = x;
    tile.data[square][4 * group + 2 * half + 1] = y;
  } else {
    tile.data[square][2 * group + half] = ptx::pack<typename Tile::T>(x, y);
  }
}

template <typename A, typename B>
constexpr bool kSameShape = A::kRows == B::kRows && A::kCols == B::kCols;

}  // namespace detail

namespace warp {
// Columns kCount * index and on of a tile, as a tile. Costs nothing where index is known at compile
// time.
template <int kCount, typename T, int kRows, int kCols>
__device__ __forceinline__ RegTile<T, kRows, kCount> cols(const RegTile<T, kRows, kCols>& tile,
                                                          int index, Location = {}) {
  static_assert(kCols % kCount == 0, "a tile is cut into equal parts");
  RegTile<T, kRows, kCount> part;
#pragma unroll
  for (int s = 0; s < part.kRowSquares; ++s) {
#pragma unroll
    for (int i = 0; i < part.kRegisters; ++i) {
      part.data[s][i] = tile.data[s][index * part.kRegisters + i];
    }
  }
  return part;
}
// Columns kFirst and on, kCount of them, as a tile, and a tile in their place.
template <int kFirst, int kCount, typename T, int kRows, int kCols>
__device__ __forceinline__ RegTile<T, kRows, kCount> part(const RegTile<T, kRows, kCols>& tile,
                                                          Location = {}) {
  static_assert(kFirst % 16 == 0 && kFirst + kCount <= kCols, "a part is made of whole squares");
  RegTile<T, kRows, kCount> part;
#pragma unroll
  for (int s = 0; s < part.kRowSquares; ++s) {
#pragma unroll
    for (int i = 0; i < part.kRegisters; ++i) {
      part.data[s][i] = tile.data[s][kFirst / 8 * 4 / tile.kValues + i];
    }
  }
  return part;
}
template <int kFirst, typename T, int kRows, int kCols, int kCount>
__device__ __forceinline__ void set_part(RegTile<T, kRows, kCols>& tile,
                                         const RegTile<T, kRows, kCount>& part, Location = {}) {
  static_assert(kFirst % 16 == 0 && kFirst + kCount <= kCols, "a part is made of whole squares");
#pragma unroll
  for (int s = 0; s < part.kRowSquares; ++s) {
#pragma unroll
    for (int i = 0; i < part.kRegisters; ++i) {
      tile.data[s][kFirst / 8 * 4 / tile.kValues + i] = part.data[s][i];
    }
  }
}
}  // namespace warp
}  // namespace tk
