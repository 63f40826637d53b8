// Bits of a tile's places: from an array of words in global memory to what a mask keeps.
#pragma once

#include "tk/global_view.cuh"
#include "tk/interpreter/copy.h"

namespace tk {

template <int kCols_>
struct RegBits {
  static_assert(kCols_ % 16 == 0, "columns are those of a register tile");
  static constexpr int kCols = kCols_;
  static constexpr bool kHalves = kCols % 32 != 0;
  static constexpr int kWords = kCols / 32 + (kHalves ? 1 : 0);
  bool data[16][kCols];
  bool written = false;
};

namespace warpgroup {

template <int kCols>
void load(RegBits<kCols>& dst, const BitView& src, int first_row, int first_col, Location at = {}) {
  constexpr int kStep = RegBits<kCols>::kHalves ? 16 : 32;
  if (first_col % kStep != 0) {
    interpreter::fail(interpreter::FaultKind::kOutOfBounds,
                      "loads bits from column " + std::to_string(first_col) +
                          ", which is not a multiple of " + std::to_string(kStep),
                      at);
  }
  const int row = first_row + 16 * detail::warp_of_group(), first_word = first_col / 32;
  std::vector<interpreter::GlobalSpan> spans;
  for (int r = 0; r < 16; ++r) {
    for (int w = 0; w < RegBits<kCols>::kWords; ++w) {
      spans.push_back({src.at(row + r, first_word + w), sizeof(uint32)});
    }
  }
  interpreter::read_global(spans, at);
  detail::writing(dst, at);
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < kCols; ++c) {
      const int col = first_col + c;
      dst.data[r][c] = (*src.at(row + r, col / 32) >> col % 32 & 1) != 0;
    }
  }
}

}  // namespace warpgroup

namespace warp {

template <typename Tile>
void keep_where(Tile& tile, const RegBits<Tile::kCols>& bits, float value, Location at = {}) {
  static_assert(Tile::kRows == 16, "bits are of sixteen rows");
  detail::reading(bits, at);
  for_each(tile, [&](int row, int col, float x) { return bits.data[row][col] ? x : value; }, at);
}

}  // namespace warp
}  // namespace tk
