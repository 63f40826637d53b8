// Tiles and vectors in registers: a warp's whole tile is an array.
//
// Tiles know whether anybody wrote them, and the engine knows which of them a product in flight
// owns. Vectors keep the parts that lanes hold until a reduction is finished: four of each row, of
// the columns 2 i and 2 i + 1 of every eight, and eight of each column, of the rows i and i + 8 of
// every sixteen.
#pragma once

#include <type_traits>

#include "tk/interpreter/convert.h"
#include "tk/interpreter/engine.h"

namespace tk {

template <typename T_, int kRows_, int kCols_>
struct RegTile {
  static_assert(kRows_ % 16 == 0 && kCols_ % 16 == 0, "a register tile is made of 16 x 16 squares");
  static_assert(kSame<T_, float> || kIsHalf<T_>, "register tiles hold float, bf16 or fp16");
  using T = T_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kThreadRegisters = kRows * kCols * static_cast<int>(sizeof(T)) / 128;

  T data[kRows][kCols];
  bool written = false;

  RegTile() {}
  RegTile(const RegTile& other, Location at = {}) { copy(other, at); }
  RegTile& operator=(const RegTile& other) {
    copy(other, {});
    return *this;
  }
  ~RegTile() { interpreter::forget_registers(this); }

  interpreter::RegisterRange range() const { return {this, sizeof(*this), kThreadRegisters}; }

 private:
  void copy(const RegTile& other, Location at) {
    interpreter::check_registers(&other, "are copied", at);
    interpreter::check_registers(this, "are overwritten", at);
    written = other.written;
    __builtin_memcpy(data, other.data, sizeof(data));
  }
};

template <int kN_>
struct PerRow {
  static constexpr int kN = kN_;
  static constexpr int kParts = 4;
  float data[kN][kParts];
  bool written = false;
};

template <int kN_>
struct PerCol {
  static constexpr int kN = kN_;
  static constexpr int kParts = 8;
  float data[kN][kParts];
  bool written = false;
};

namespace detail {

template <typename A, typename B>
constexpr bool kSameShape = A::kRows == B::kRows && A::kCols == B::kCols;

// The part of a row that holds column `col`, and of a column that holds row `row`.
constexpr int part_of_col(int col) { return col % 8 / 2; }
constexpr int part_of_row(int row) { return row % 8; }

template <typename Value>
constexpr bool kIsTile = false;
template <typename T, int kRows, int kCols>
constexpr bool kIsTile<RegTile<T, kRows, kCols>> = true;

// Before values are read.
template <typename Value>
void reading(const Value& value, Location at) {
  if constexpr (kIsTile<Value>) interpreter::check_registers(&value, "are read", at);
  if (!value.written) {
    interpreter::fail(interpreter::FaultKind::kUndefinedRegisters,
                      "reads registers that nobody has written", at);
  }
}
// Before values are written, all of them.
template <typename Value>
void writing(Value& value, Location at) {
  if constexpr (kIsTile<Value>) interpreter::check_registers(&value, "are overwritten", at);
  value.written = true;
}
// The GPU has one NaN where this processor has many.
inline bool same_bits(float x, float y) {
  return (x != x && y != y) || __builtin_bit_cast(uint32, x) == __builtin_bit_cast(uint32, y);
}
// Before one value of each row or column leaves the registers.
template <typename Vector>
void leaving(const Vector& vector, Location at) {
  reading(vector, at);
  for (const auto& parts : vector.data) {
    for (const float part : parts) {
      if (!same_bits(part, parts[0])) {
        interpreter::fail(interpreter::FaultKind::kUnfinishedVector,
                          "stores a vector whose lanes hold different parts of a reduction: "
                          "finish_rows or finish_cols is missing",
                          at);
      }
    }
  }
}

}  // namespace detail

namespace warp {
template <int kCount, typename T, int kRows, int kCols>
RegTile<T, kRows, kCount> cols(const RegTile<T, kRows, kCols>& tile, int index, Location at = {}) {
  static_assert(kCols % kCount == 0, "a tile is cut into equal parts");
  detail::reading(tile, at);
  if (index < 0 || index >= kCols / kCount) {
    interpreter::fail(interpreter::FaultKind::kOutOfBounds,
                      "takes part " + std::to_string(index) + " of a register tile that has " +
                          std::to_string(kCols / kCount),
                      at);
  }
  RegTile<T, kRows, kCount> part;
  detail::writing(part, at);
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCount; ++c) part.data[r][c] = tile.data[r][index * kCount + c];
  }
  return part;
}
template <int kFirst, int kCount, typename T, int kRows, int kCols>
RegTile<T, kRows, kCount> part(const RegTile<T, kRows, kCols>& tile, Location at = {}) {
  static_assert(kFirst % 16 == 0 && kFirst + kCount <= kCols, "a part is made of whole squares");
  detail::reading(tile, at);
  RegTile<T, kRows, kCount> part;
  detail::writing(part, at);
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCount; ++c) part.data[r][c] = tile.data[r][kFirst + c];
  }
  return part;
}
template <int kFirst, typename T, int kRows, int kCols, int kCount>
void set_part(RegTile<T, kRows, kCols>& tile, const RegTile<T, kRows, kCount>& part,
              Location at = {}) {
  static_assert(kFirst % 16 == 0 && kFirst + kCount <= kCols, "a part is made of whole squares");
  detail::reading(part, at);
  if (!tile.written) detail::reading(tile, at);
  interpreter::check_registers(&tile, "are overwritten", at);
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCount; ++c) tile.data[r][kFirst + c] = part.data[r][c];
  }
}
}  // namespace warp
}  // namespace tk
