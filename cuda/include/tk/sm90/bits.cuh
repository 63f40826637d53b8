// Bits of a tile's places: from an array of words in global memory to what a mask keeps.
//
// A lane has columns 2 i and 2 i + 1 of every eight of a tile: shifted once by 2 i, the bits of its
// columns are those that instructions name.
#pragma once

#include "tk/global_view.cuh"
#include "tk/sm90/ptx/math.cuh"
#include "tk/sm90/register_tile.cuh"

namespace tk {

// Of a warp's sixteen rows and kCols columns.
template <int kCols_>
struct RegBits {
  static_assert(kCols_ % 16 == 0, "columns are those of a register tile");
  static constexpr int kCols = kCols_;
  // Whether tiles side by side start in the middle of a word.
  static constexpr bool kHalves = kCols % 32 != 0;
  static constexpr int kWords = kCols / 32 + (kHalves ? 1 : 0);
  uint32 words[2][kWords];  // of rows g and g + 8
  int shift;                // to the lane's first column
};

namespace warpgroup {

// The bits at (first_row, first_col) on, all of which lie in the array. first_col is a multiple of
// 32, or of 16 where kCols is no multiple of 32.
template <int kCols>
__device__ __forceinline__ void load(RegBits<kCols>& dst, const BitView& src, int first_row,
                                     int first_col, Location = {}) {
  using Bits = RegBits<kCols>;
  const int thread = ptx::fresh_thread_index();
  const int row = first_row + 16 * (thread >> 5 & 3) + ((thread & 31) >> 2);
  dst.shift = 2 * (thread & 3) + (Bits::kHalves ? first_col & 16 : 0);
  const uint32* word = src.at(row, first_col >> 5);
#pragma unroll
  for (int w = 0; w < Bits::kWords; ++w) {
    dst.words[0][w] = word[w * src.word_stride];
    dst.words[1][w] = word[w * src.word_stride + 8 * src.row_stride];
  }
}

}  // namespace warpgroup

namespace warp {

// Keeps where a bit is set.
template <typename Tile>
__device__ __forceinline__ void keep_where(Tile& tile, const RegBits<Tile::kCols>& bits,
                                           float value, Location = {}) {
  using Bits = RegBits<Tile::kCols>;
  static_assert(Tile::kRowSquares == 1, "bits are of sixteen rows");
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int w = 0; w < (Tile::kCols + 31) / 32; ++w) {
      const uint32 low = bits.words[h][w];
      uint32 kept = low >> bits.shift;
      if constexpr (Bits::kHalves) {
        if (w + 1 < Bits::kWords) {
          kept = ptx::funnel_shift_right(low, bits.words[h][w + 1], bits.shift);
        }
      }
#pragma unroll
      for (int g = 4 * w; g < 4 * w + 4 && g < Tile::kColGroups; ++g) {
        const uint32 first = 1u << 8 * (g & 3);
        detail::set_pair(tile, 0, g, h,
                         (kept & first) != 0 ? detail::get(tile, 0, g, 2 * h) : value,
                         (kept & 2 * first) != 0 ? detail::get(tile, 0, g, 2 * h + 1) : value);
      }
    }
  }
}

}  // namespace warp
}  // namespace tk
