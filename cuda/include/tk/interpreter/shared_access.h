// How shared tiles look to the engine (chunks) and to the interpreter's loops (elements).
#pragma once

#include "tk/interpreter/convert.h"
#include "tk/interpreter/engine.h"
#include "tk/shared_tile.cuh"

namespace tk::interpreter {

// The chunks of a rectangle of a tile.
template <typename View>
Chunks chunks_of(const View& view, int first_row, int rows, int first_col, int cols) {
  constexpr int kStep = kChunkBytes / static_cast<int>(sizeof(typename View::T));
  Chunks chunks;
  chunks.reserve(rows * ceil_div(cols, kStep));
  for (int row = first_row; row < first_row + rows; ++row) {
    for (int col = first_col; col < first_col + cols; col += kStep) {
      chunks.push_back(view.address(row, col) / kChunkBytes);
    }
  }
  return chunks;
}

template <typename View>
auto& element(const View& view, int row, int col) {
  return *reinterpret_cast<typename View::T*>(shared_pointer(view.address(row, col)));
}

// The rectangle as floats, row by row; `base` is the block's shared memory.
template <typename View>
void widen(float* to, const View& view, const std::byte* base, int first_row, int rows,
           int first_col, int cols) {
  using T = typename View::T;
  constexpr int kStep = kChunkBytes / static_cast<int>(sizeof(T));
  for (int row = first_row; row < first_row + rows; ++row) {
    for (int col = first_col; col < first_col + cols; col += kStep, to += kStep) {
      const T* from = reinterpret_cast<const T*>(base + view.address(row, col));
      for (int i = 0; i < kStep; ++i) to[i] = to_float(from[i]);
    }
  }
}

}  // namespace tk::interpreter
