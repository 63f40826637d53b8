// Products of the values of a row, and the gradients of the values.
#pragma once

#include "tk/interpreter/copy.h"
#include "tk/product_columns.h"

namespace tk::warpgroup {
namespace detail_products {

// Calls f(row, values) for each of a warp's sixteen rows of a shared tile.
template <int kDim, typename View, typename F>
void for_each_row(const View& src, Location at, F&& f) {
  const int first = 16 * detail::warp_of_group();
  interpreter::read_shared(interpreter::chunks_of(src, first, 16, 0, kDim),
                           "loads values from shared memory", at);
  for (int row = 0; row < 16; ++row) {
    float values[kDim];
    for (int a = 0; a < kDim; ++a) {
      values[a] = interpreter::to_float(interpreter::element(src, first + row, a));
    }
    f(row, values);
  }
}

inline float factor(const ProductColumn& column, const ProductFactors& factors) {
  if (column.first < 0) return 1.0f;
  if (column.second < 0) return factors.values;
  return column.first == column.second ? factors.squares : factors.pairs;
}

}  // namespace detail_products

template <int kDim, typename T, int kCols, typename Shared>
void load_products(RegTile<T, 16, kCols>& dst, const Shared& src, int first,
                   const ProductFactors& factors, Location at = {}) {
  detail::writing(dst, at);
  detail_products::for_each_row<kDim>(detail::as_view(src), at, [&](int row, const float* x) {
    for (int c = 0; c < kCols; ++c) {
      const ProductColumn column = product_column(kDim, first + c);
      float value = column.empty ? 0.0f : detail_products::factor(column, factors);
      if (column.first >= 0) value *= x[column.first];
      if (column.second >= 0) value *= x[column.second];
      dst.data[row][c] = interpreter::from_float<T>(value);
    }
  });
}

template <int kDim, typename T, int kCols, typename Shared>
void load_products(RegTile<T, 16, kCols>& dst, const Shared& src, int first, Location at = {}) {
  static_assert(kSame<T, typename Shared::T>, "products without factors keep the type");
  load_products<kDim>(dst, src, first, ProductFactors{1.0f, 1.0f, 1.0f}, at);
}

template <int kDim, typename Dst, typename Src>
void store_products(Dst& dst, const Src& src, int first, Location at = {}) {
  RegTile<typename Dst::T, 16, Dst::kCols> products;
  load_products<kDim>(products, src, first, at);
  store(dst, products, at);
}

// Rounds where the hardware does: twice, should a factor be no power of two.
template <int kDim, int kCols, typename Shared>
void load_products(RegTile<bf16, 16, kCols>& dst, const Shared& src, int first,
                   const PowerFactors& factors, Location at = {}) {
  static_assert(kSame<bf16, typename Shared::T>, "products of pairs keep the type");
  detail::writing(dst, at);
  detail_products::for_each_row<kDim>(detail::as_view(src), at, [&](int row, const float* x) {
    for (int c = 0; c < kCols; ++c) {
      const ProductColumn column = product_column(kDim, first + c);
      float value = column.empty ? 0.0f : detail_products::factor(column, factors);
      if (column.first >= 0) {
        value = interpreter::to_float(interpreter::from_float<bf16>(value * x[column.first]));
      }
      if (column.second >= 0) value *= x[column.second];
      dst.data[row][c] = interpreter::from_float<bf16>(value);
    }
  });
}

template <int kDim, typename Dst, typename Src>
void scale_products(Dst& dst, const Src& src, int first, const ProductFactors& factors,
                    Location at = {}) {
  static_assert(detail::kSameShape<Dst, Src>, "scale_products needs tiles of one shape");
  detail::reading(src, at);
  detail::writing(dst, at);
  warp::detail_map::assign(dst, [&](int r, int c) {
    const ProductColumn column = product_column(kDim, first + c);
    return warp::detail_map::value(src, r, c) *
           (column.empty ? factors.pairs : detail_products::factor(column, factors));
  });
}

template <int kDim, int kWidth, int kCols, typename Shared>
void fold_products(RegTile<float, 16, kWidth>& dst, const RegTile<float, 16, kCols>& dproducts,
                   const Shared& src, int first, const ProductFactors& factors, Location at = {}) {
  static_assert(kDim <= kWidth, "every value has a column");
  detail::reading(dproducts, at);
  detail::reading(dst, at);
  detail::writing(dst, at);
  detail_products::for_each_row<kDim>(detail::as_view(src), at, [&](int row, const float* x) {
    for (int c = 0; c < kCols; ++c) {
      const ProductColumn column = product_column(kDim, first + c);
      if (column.first < 0) continue;
      const float gradient = dproducts.data[row][c] * detail_products::factor(column, factors);
      dst.data[row][column.first] += gradient * (column.second < 0 ? 1.0f : x[column.second]);
      if (column.second >= 0) dst.data[row][column.second] += gradient * x[column.first];
    }
  });
}

}  // namespace tk::warpgroup
