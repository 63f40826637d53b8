// Products of a row's values, of degree two and below, each once: where they lie.
//
// Of d values x, d a multiple of 8, column by column:
//   a              x[a]
//   d (1 + c) + a  x[a] x[(a + c) mod d]    for c from 0 to d / 2
// where the second half of the last row of these, which would say the first again, holds a one and
// then zeros. Both factors of a column lie equally far apart for all lanes of a warp: what makes
// this the order that registers like, rather than a triangle's. Plain C++, for host and device.
#pragma once

namespace tk {

// What multiplies them: values x[a], their squares (c = 0), and products of two.
struct ProductFactors {
  float values, squares, pairs;
};
// The same of which each is a power of two: no 16-bit number is rounded where it is multiplied.
struct PowerFactors : ProductFactors {};

constexpr int product_columns(int dim) { return dim * (dim + 4) / 2; }

// Column `col`: the values `first` and `second` multiplied. -1 is a one; there may be no product.
struct ProductColumn {
  int first, second;
  bool empty;
};
constexpr ProductColumn product_column(int dim, int col) {
  const int distance = col / dim - 1, first = col % dim;
  if (distance < 0) return {first, -1, false};
  if (distance > dim / 2) return {-1, -1, true};
  if (distance == dim / 2 && first >= dim / 2) return {-1, -1, first > dim / 2};
  return {first, (first + distance) % dim, false};
}

}  // namespace tk
