// Matrix products of a warpgroup: acc (64 x N, fp32, in registers) = or += A B.
//
// Each warp computes its sixteen rows, and reads those rows of A and all of B. The product is
// computed when the engine says so, between being issued and being waited for.
#pragma once

#include <array>

#include "tk/interpreter/map.h"
#include "tk/interpreter/shared_access.h"

namespace tk::warpgroup {
namespace detail_mma {

// Four columns: host compilers make one instruction of it, also without optimising much, as kernels
// are that are compiled when they are asked for. This is where the interpreter spends its time.
using Columns = float __attribute__((vector_size(16)));

// acc += A B with B stored [kDepth, kN], sixteen of the depth at a time, in fp32.
template <int kDepth, int kN>
void add_product(float (&acc)[16][kN], const float* a, const float* b) {
  constexpr int kWidth = kN % 32 == 0 ? 8 : kN % 16 == 0 ? 4 : 2;
  static_assert(kN % (4 * kWidth) == 0);
  for (int first = 0; first < kDepth; first += 16) {
    for (int row = 0; row < 16; ++row) {
      for (int col = 0; col < kN; col += 4 * kWidth) {
        Columns sums[kWidth], y[kWidth];
        __builtin_memcpy(sums, &acc[row][col], sizeof(sums));
        for (int k = first; k < first + 16; ++k) {
          const float x = a[row * kDepth + k];
          __builtin_memcpy(y, b + k * kN + col, sizeof(y));
          for (int i = 0; i < kWidth; ++i) sums[i] += x * y[i];
        }
        __builtin_memcpy(&acc[row][col], sums, sizeof(sums));
      }
    }
  }
}

template <int kRows, int kCols>
void transpose(float* to, const float* from) {
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCols; ++c) to[c * kRows + r] = from[r * kCols + c];
  }
}

template <bool kAt, bool kBt, int kN, typename A, typename B>
void multiply(RegTile<float, 16, kN>& acc, const A& a, const B& b, bool accumulate, Location at) {
  using T = typename B::T;
  static_assert(kSame<T, typename A::T>, "both operands have one type");
  static_assert(kN <= 256, "a product is at most 256 columns wide");
  constexpr int kDepth = kBt ? B::kCols : B::kRows;
  static_assert((kBt ? B::kRows : B::kCols) == kN, "B has as many columns as acc");
  const auto b_view = tk::detail::as_view(b);
  const std::byte* base = interpreter::shared_pointer(0);
  interpreter::Product product;
  product.acc = acc.range();
  product.operand = {};
  product.shared = interpreter::chunks_of(b_view, 0, B::kRows, 0, B::kCols);
  const auto run = [=, acc = &acc.data](const float* a_values) {
    std::vector<float> stored(kDepth * kN), b_values;
    interpreter::widen(stored.data(), b_view, base, 0, B::kRows, 0, B::kCols);
    if constexpr (kBt) {
      b_values.resize(kDepth * kN);
      transpose<kN, kDepth>(b_values.data(), stored.data());
    } else {
      b_values.swap(stored);
    }
    if (!accumulate) __builtin_memset(*acc, 0, sizeof(*acc));
    add_product<kDepth, kN>(*acc, a_values, b_values.data());
  };
  if constexpr (tk::detail::kIsTile<A>) {
    static_assert(!kAt, "an operand in registers is not transposed");
    static_assert(A::kRows == 16 && A::kCols == kDepth, "A is 64 x K");
    // Another product may still read these registers; none may be writing them.
    if (!a.written) tk::detail::reading(a, at);
    product.operand = a.range();
    product.compute = [run, a = &a.data] {
      std::vector<float> values(16 * kDepth);
      for (int i = 0; i < 16 * kDepth; ++i) values[i] = interpreter::to_float((&(*a)[0][0])[i]);
      run(values.data());
    };
  } else {
    static_assert((kAt ? A::kCols : A::kRows) == 64, "A has 64 rows");
    static_assert((kAt ? A::kRows : A::kCols) == kDepth, "A is as deep as B");
    const auto a_view = tk::detail::as_view(a);
    const int first = 16 * (interpreter::warp_index() & 3);
    const auto rectangle =
        kAt ? std::array{0, kDepth, first, 16} : std::array{first, 16, 0, kDepth};
    const auto chunks =
        interpreter::chunks_of(a_view, rectangle[0], rectangle[1], rectangle[2], rectangle[3]);
    product.shared.insert(product.shared.end(), chunks.begin(), chunks.end());
    product.compute = [=] {
      std::vector<float> values(16 * kDepth);
      if constexpr (kAt) {
        std::vector<float> stored(16 * kDepth);
        interpreter::widen(stored.data(), a_view, base, 0, kDepth, first, 16);
        transpose<kDepth, 16>(values.data(), stored.data());
      } else {
        interpreter::widen(values.data(), a_view, base, first, 16, 0, kDepth);
      }
      run(values.data());
    };
  }
  if (accumulate && !acc.written) tk::detail::reading(acc, at);
  acc.written = true;
  interpreter::issue_product(std::move(product), at);
}

}  // namespace detail_mma

#define TK_PRODUCT(letters, at_, bt_)                                                             \
  template <int kN, typename A, typename B>                                                       \
  void mm_##letters(RegTile<float, 16, kN>& acc, const A& a, const B& b, Location at = {}) {      \
    detail_mma::multiply<at_, bt_>(acc, a, b, false, at);                                         \
  }                                                                                               \
  template <int kN, typename A, typename B>                                                       \
  void mma_##letters(RegTile<float, 16, kN>& acc, const A& a, const B& b, bool accumulate = true, \
                     Location at = {}) {                                                          \
    detail_mma::multiply<at_, bt_>(acc, a, b, accumulate, at);                                    \
  }

TK_PRODUCT(AB, false, false)
TK_PRODUCT(ABt, false, true)
TK_PRODUCT(AtB, true, false)
TK_PRODUCT(AtBt, true, true)
#undef TK_PRODUCT

inline void mma_commit(Location at = {}) { interpreter::commit_products(at); }

// A parameter pack cannot be followed by a location: one overload for each number of tiles.
namespace detail_mma {
template <typename... Tiles>
void wait(int pending, Location at, const Tiles&... tiles) {
  const std::array<const void*, sizeof...(Tiles)> named = {&tiles...};
  interpreter::wait_products(pending, named, at);
}
}  // namespace detail_mma
template <int kPending>
void mma_wait(Location at = {}) {
  detail_mma::wait(kPending, at);
}
template <int kPending, typename A>
void mma_wait(A& a, Location at = {}) {
  detail_mma::wait(kPending, at, a);
}
template <int kPending, typename A, typename B>
void mma_wait(A& a, B& b, Location at = {}) {
  detail_mma::wait(kPending, at, a, b);
}
template <int kPending, typename A, typename B, typename C>
void mma_wait(A& a, B& b, C& c, Location at = {}) {
  detail_mma::wait(kPending, at, a, b, c);
}
template <int kPending, typename A, typename B, typename C, typename D>
void mma_wait(A& a, B& b, C& c, D& d, Location at = {}) {
  detail_mma::wait(kPending, at, a, b, c, d);
}
template <int kPending, typename A, typename B, typename C, typename D, typename E>
void mma_wait(A& a, B& b, C& c, D& d, E& e, Location at = {}) {
  detail_mma::wait(kPending, at, a, b, c, d, e);
}

// Only compilers for the GPU keep descriptors.
template <typename Tile>
auto afresh(const Tile& tile) {
  return detail::as_view(tile);
}

}  // namespace tk::warpgroup
