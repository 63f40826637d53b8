// Products of the values of a row, and the gradients of the values.
//
// A lane holds every row that it works on from its own first column on and around: its columns of
// every eight, and what lies `c` further, then have the same index in all lanes.
#pragma once

#include "tk/product_columns.h"
#include "tk/sm90/copy.cuh"

namespace tk::warpgroup {
namespace detail_products {

// pairs[i] are the values of columns (first + 2 i) mod kDim and after, where `first` is the lane's,
// of the lane's row in half `half` of its warp's.
template <int kDim, typename View>
__device__ __forceinline__ void load_row_pairs(uint32 (&pairs)[kDim / 2], const View& src,
                                               int half) {
  static_assert(kDim % 8 == 0 && kDim <= View::kPanelCols, "a row is one panel's");
  constexpr bool kIsPower = (kDim & (kDim - 1)) == 0;
  const int row = 16 * (ptx::warp_index() & 3) + detail::row_of(0, 0);
  const int first = detail::col_of(0, 0);
  uint32 places[kDim / 2];
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) {
    const int col = first + 2 * i;
    // Half a row on and around is one bit of the place.
    places[i] = kIsPower && i >= kDim / 4 ? places[i - kDim / 4] ^ kDim
                                          : src.address(row, col < kDim ? col : col - kDim);
    // Swizzles repeat every eight rows.
    pairs[i] = ptx::load_shared_u32(places[i] + half * 8 * View::kSwizzle);
  }
}
// x[r] is the value of column (first + r) mod kDim.
template <int kDim, typename View>
__device__ __forceinline__ void load_row(float (&x)[kDim], const View& src, int half) {
  uint32 pairs[kDim / 2];
  load_row_pairs<kDim>(pairs, src, half);
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) {
    ptx::unpack<typename View::T>(pairs[i], x[2 * i], x[2 * i + 1]);
  }
}

// The columns first.. of a lane's pair `e` (0 or 1) of column group `group`, as if known at compile
// time: which values are multiplied, in the lane's own numbers.
template <int kDim>
struct Group {
  int distance, at;  // x[at] x[at + distance]; -1: x[at]
  __device__ __forceinline__ Group(int first, int group)
      : distance((first / 8 + group) / (kDim / 8) - 1),
        at(8 * ((first / 8 + group) % (kDim / 8))) {}
  __device__ __forceinline__ bool is_empty() const {
    return distance > kDim / 2 || (distance == kDim / 2 && at > kDim / 2);
  }
  // Whether some of the columns of the group hold no product.
  __device__ __forceinline__ bool is_last() const {
    return distance == kDim / 2 && at + 8 > kDim / 2;
  }
  __device__ __forceinline__ float factor(const ProductFactors& factors) const {
    return distance < 0 ? factors.values : distance == 0 ? factors.squares : factors.pairs;
  }
};

// A lane's `sums`, of the columns from its first on and around, become those of its columns of
// every eight over the four lanes that share the row.
template <int kDim>
__device__ __forceinline__ void bring_together(float (&dst)[kDim / 4], const float (&sums)[kDim]) {
  const int place = ptx::lane_index() & 3;
  const bool odd = (place & 1) != 0, high = (place & 2) != 0;
  float turned[kDim], by_col[kDim];
#pragma unroll
  for (int r = 0; r < kDim; ++r) turned[r] = odd ? sums[(r + kDim - 2) % kDim] : sums[r];
#pragma unroll
  for (int r = 0; r < kDim; ++r) by_col[r] = high ? turned[(r + kDim - 4) % kDim] : turned[r];
#pragma unroll
  for (int first = 0; first < kDim; first += 8) {
    float half[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low_part = by_col[first + i], high_part = by_col[first + 4 + i];
      half[i] = (high ? high_part : low_part) + ptx::shuffle_xor(high ? low_part : high_part, 2);
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      dst[first / 4 + e] =
          (odd ? half[2 + e] : half[e]) + ptx::shuffle_xor(odd ? half[e] : half[2 + e], 1);
    }
  }
}

}  // namespace detail_products

// dst(r, c) is column first + c of the products of the first kDim values of row r, times their
// factors; zero beyond the last. `first` is a multiple of 16, and known at compile time.
template <int kDim, typename T, int kCols, typename Shared>
__device__ __forceinline__ void load_products(RegTile<T, 16, kCols>& dst, const Shared& src,
                                              int first, const ProductFactors& factors,
                                              Location = {}) {
  const auto view = detail::as_view(src);
  const int lane_col = detail::col_of(0, 0);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float x[kDim];
    detail_products::load_row(x, view, h);
#pragma unroll
    for (int g = 0; g < kCols / 8; ++g) {
      const detail_products::Group<kDim> group(first, g);
      float y[2] = {};
      if (!group.is_empty()) {
        const float factor = group.factor(factors);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = group.at + e;
          y[e] = x[at] * factor;
          if (group.distance >= 0) y[e] *= x[(at + group.distance) % kDim];
          if (group.is_last()) {
            const int col = at + lane_col;
            y[e] = col < kDim / 2 ? y[e] : col == kDim / 2 ? 1.0f : 0.0f;
          }
        }
      }
      detail::set_pair(dst, 0, g, h, y[0], y[1]);
    }
  }
}

namespace detail_products {

// What pairs of values are multiplied by before they are multiplied.
struct NoFactors {
  template <typename T>
  __device__ __forceinline__ uint32 of(int, uint32 pair) const {
    return pair;
  }
};
template <typename T_>
struct PairFactors {
  uint32 values, squares, pairs;

  __device__ __forceinline__ explicit PairFactors(const PowerFactors& x)
      : values(ptx::pack<T_>(x.values, x.values)),
        squares(ptx::pack<T_>(x.squares, x.squares)),
        pairs(ptx::pack<T_>(x.pairs, x.pairs)) {}
  template <typename T>
  __device__ __forceinline__ uint32 of(int distance, uint32 pair) const {
    return ptx::multiply_pairs<T>(pair, distance < 0 ? values : distance == 0 ? squares : pairs);
  }
};

// `one` is the pair of one and zero.
template <int kDim, typename T, int kCols, typename Shared, typename Factors>
__device__ __forceinline__ void load_rounded(RegTile<T, 16, kCols>& dst, const Shared& src,
                                             int first, const Factors& factors, uint32 one) {
  static_assert(kSame<T, typename Shared::T>, "products of pairs keep the type");
  const auto view = detail::as_view(src);
  const int lane_col = detail::col_of(0, 0);
  constexpr int kPairs = kDim / 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32 pairs[kPairs], shifted[kPairs];  // from even columns on, from odd ones
    load_row_pairs<kDim>(pairs, view, h);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      shifted[i] = ptx::middle_pair(pairs[i], pairs[(i + 1) % kPairs]);
    }
#pragma unroll
    for (int g = 0; g < kCols / 8; ++g) {
      const Group<kDim> group(first, g);
      uint32 pair = 0;
      if (!group.is_empty()) {
        pair = factors.template of<T>(group.distance, pairs[group.at / 2]);
        if (group.distance >= 0) {
          const int other = (group.at + group.distance) % kDim;
          pair =
              ptx::multiply_pairs<T>(pair, other % 2 == 0 ? pairs[other / 2] : shifted[other / 2]);
        }
        if (group.is_last()) {
          const int col = group.at + lane_col;
          pair = col < kDim / 2 ? pair : col == kDim / 2 ? one : 0u;
        }
      }
      dst.data[0][2 * g + h] = pair;
    }
  }
}

}  // namespace detail_products

// The same without factors, in the type of the values: products are rounded once, too.
template <int kDim, typename T, int kCols, typename Shared>
__device__ __forceinline__ void load_products(RegTile<T, 16, kCols>& dst, const Shared& src,
                                              int first, Location = {}) {
  detail_products::load_rounded<kDim>(dst, src, first, detail_products::NoFactors{},
                                      ptx::one_pair_register<T>());
}
// The same to shared memory.
template <int kDim, typename Dst, typename Src>
__device__ __forceinline__ void store_products(const Dst& dst, const Src& src, int first,
                                               Location = {}) {
  using T = typename Dst::T;
  RegTile<T, 16, Dst::kCols> products;
  detail_products::load_rounded<kDim>(products, src, first, detail_products::NoFactors{},
                                      ptx::kOnePair<T>);
  store(dst, products);
}
// The same with factors that do not round: two products at a time. In bf16, whose exponents are
// fp32's.
template <int kDim, int kCols, typename Shared>
__device__ __forceinline__ void load_products(RegTile<bf16, 16, kCols>& dst, const Shared& src,
                                              int first, const PowerFactors& factors,
                                              Location = {}) {
  detail_products::load_rounded<kDim>(dst, src, first, detail_products::PairFactors<bf16>(factors),
                                      ptx::one_pair_register<bf16>());
}

// dst(r, c) = src(r, c) times the factor of column first + c of products (pairs', where there is
// none): for what is multiplied by products without factors.
template <int kDim, typename Dst, typename Src>
__device__ __forceinline__ void scale_products(Dst& dst, const Src& src, int first,
                                               const ProductFactors& factors, Location = {}) {
  static_assert(detail::kSameShape<Dst, Src>, "scale_products needs tiles of one shape");
  const int lane_col = detail::col_of(0, 0);
  detail::for_each_pair<Src>([&](int s, int g, int h) {
    const detail_products::Group<kDim> group(first, g);
    float y[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float factor = group.factor(factors);
      if (group.is_last() && group.at + e + lane_col == kDim / 2) factor = 1.0f;
      y[e] = detail::get(src, s, g, 2 * h + e) * factor;
    }
    detail::set_pair(dst, s, g, h, y[0], y[1]);
  });
}

// dst(r, a) += the gradient of value a of row r, where `dproducts` are the gradients of what
// load_products makes.
template <int kDim, int kWidth, int kCols, typename Shared>
__device__ __forceinline__ void fold_products(RegTile<float, 16, kWidth>& dst,
                                              const RegTile<float, 16, kCols>& dproducts,
                                              const Shared& src, int first,
                                              const ProductFactors& factors, Location = {}) {
  static_assert(kDim <= kWidth, "every value has a column");
  const auto view = detail::as_view(src);
  const int lane_col = detail::col_of(0, 0);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float x[kDim], sums[kDim] = {};
    detail_products::load_row(x, view, h);
#pragma unroll
    for (int g = 0; g < kCols / 8; ++g) {
      const detail_products::Group<kDim> group(first, g);
      if (group.is_empty()) continue;
      const float factor = group.factor(factors);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = group.at + e;
        float gradient = detail::get(dproducts, 0, g, 2 * h + e) * factor;
        if (group.is_last()) gradient = at + lane_col < kDim / 2 ? gradient : 0.0f;
        if (group.distance < 0) {
          sums[at] += gradient;
        } else {
          const int other = (at + group.distance) % kDim;
          sums[at] = ptx::fma(gradient, x[other], sums[at]);
          sums[other] = ptx::fma(gradient, x[at], sums[other]);
        }
      }
    }
    float found[kDim / 4];
    detail_products::bring_together<kDim>(found, sums);
#pragma unroll
    for (int g = 0; g < kDim / 8; ++g) {
      detail::set_pair(dst, 0, g, h, detail::get(dst, 0, g, 2 * h) + found[2 * g],
                       detail::get(dst, 0, g, 2 * h + 1) + found[2 * g + 1]);
    }
  }
}

}  // namespace tk::warpgroup
