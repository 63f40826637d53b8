// Matrix products of a warpgroup: acc (64 x N, fp32, in registers) = or += A B.
//
// A is 64 x K, in shared memory or in registers; B comes from shared memory. The letters say how
// the operands are stored: A or At (A stored K x 64), B (stored K x N) or Bt (stored N x K). mm_
// starts from zero, mma_ adds to what acc holds.
//
// Products run asynchronously. mma_commit closes a group, mma_wait<n>(tiles...) waits until at most
// n groups are open; until then nobody may touch acc, the register operand or the shared operands.
// Name in mma_wait every register tile that becomes free by it.
#pragma once

#include "tk/shared_tile.cuh"
#include "tk/sm90/ptx/thread.cuh"
#include "tk/sm90/ptx/wgmma.cuh"
#include "tk/sm90/register_tile.cuh"

namespace tk::warpgroup {
namespace detail_mma {

// The descriptor of an operand's first depth-step (sixteen of K), which is stored with K along its
// rows or its columns.
template <bool kDepthAlongRows, typename View>
__device__ __forceinline__ uint64 first_descriptor(const View& view) {
  return ptx::matrix_descriptor(view.base, kDepthAlongRows ? View::kPanelBytes : 16,
                                8 * View::kSwizzle, View::kSwizzle);
}
// Of depth-step k: one addition each, where making it afresh takes four instructions.
template <bool kDepthAlongRows, typename View>
__device__ __forceinline__ uint64 descriptor(uint64 first, int k) {
  if constexpr (kDepthAlongRows) return ptx::moved_descriptor(first, 16 * k * View::kSwizzle);
  const int panel = 16 * k / View::kPanelCols;
  const int within = 16 * k % View::kPanelCols * 2;
  return ptx::moved_descriptor(first, panel * View::kPanelBytes + within);
}

template <typename Tile>
constexpr bool kInRegisters = false;
template <typename T, int kRows, int kCols>
constexpr bool kInRegisters<RegTile<T, kRows, kCols>> = true;

template <bool kAt, bool kBt, int kN, typename A, typename B>
__device__ __forceinline__ void multiply(RegTile<float, 16, kN>& acc, const A& a, const B& b,
                                         bool accumulate) {
  using T = typename B::T;
  static_assert(kSame<T, typename A::T>, "both operands have one type");
  constexpr int kDepth = kBt ? B::kCols : B::kRows;
  static_assert((kBt ? B::kRows : B::kCols) == kN, "B has as many columns as acc");
  const auto b_view = detail::as_view(b);
  using BView = decltype(detail::as_view(b));
  const uint64 b_first = first_descriptor<!kBt>(b_view);
  ptx::wgmma_fence();
  if constexpr (kInRegisters<A>) {
    static_assert(!kAt, "an operand in registers is not transposed");
    static_assert(A::kRows == 16 && A::kCols == kDepth, "A is 64 x K");
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      const uint32 fragment[4] = {a.data[0][4 * k], a.data[0][4 * k + 1], a.data[0][4 * k + 2],
                                  a.data[0][4 * k + 3]};
      ptx::Wgmma<kN>::template rs<T, !kBt>(
          acc.data[0], fragment, descriptor<!kBt, BView>(b_first, k), accumulate || k > 0);
    }
  } else {
    static_assert((kAt ? A::kCols : A::kRows) == 64, "A has 64 rows");
    static_assert((kAt ? A::kRows : A::kCols) == kDepth, "A is as deep as B");
    using AView = decltype(detail::as_view(a));
    const uint64 a_first = first_descriptor<kAt>(detail::as_view(a));
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      ptx::Wgmma<kN>::template ss<T, kAt, !kBt>(acc.data[0], descriptor<kAt, AView>(a_first, k),
                                                descriptor<!kBt, BView>(b_first, k),
                                                accumulate || k > 0);
    }
  }
}

template <typename Tile>
__device__ __forceinline__ void hold(Tile& tile) {
#pragma unroll
  for (int s = 0; s < Tile::kRowSquares; ++s) {
#pragma unroll
    for (int i = 0; i < Tile::kRegisters; ++i) ptx::hold(tile.data[s][i]);
  }
}

}  // namespace detail_mma

#define TK_PRODUCT(letters, at, bt)                                                      \
  template <int kN, typename A, typename B>                                              \
  __device__ __forceinline__ void mm_##letters(RegTile<float, 16, kN>& acc, const A& a,  \
                                               const B& b) {                             \
    detail_mma::multiply<at, bt>(acc, a, b, false);                                      \
  }                                                                                      \
  template <int kN, typename A, typename B>                                              \
  __device__ __forceinline__ void mma_##letters(RegTile<float, 16, kN>& acc, const A& a, \
                                                const B& b, bool accumulate = true) {    \
    detail_mma::multiply<at, bt>(acc, a, b, accumulate);                                 \
  }

TK_PRODUCT(AB, false, false)
TK_PRODUCT(ABt, false, true)
TK_PRODUCT(AtB, true, false)
TK_PRODUCT(AtBt, true, true)
#undef TK_PRODUCT

__device__ __forceinline__ void mma_commit() { ptx::wgmma_commit(); }

template <int kPending, typename... Tiles>
__device__ __forceinline__ void mma_wait(Tiles&... tiles) {
  ptx::wgmma_wait<kPending>();
  (detail_mma::hold(tiles), ...);
}

// The tile as a view that shares nothing with others of it: descriptors and addresses made from it
// are made where they are used, not kept in registers from before a loop.
template <typename Tile>
__device__ __forceinline__ auto afresh(const Tile& tile) {
  auto view = detail::as_view(tile);
  ptx::hold(view.base);
  return view;
}

}  // namespace tk::warpgroup

namespace tk::warp {

// Computes these values, none of them negative, and all that they were made of, before whatever
// follows. The compiler moves waits up as far as data allow, before the very arithmetic that was to
// run beside what they wait for; it moves nothing across a branch, though, and this is one.
template <int kN>
__device__ __forceinline__ void pin(const PerRow<kN>& rows) {
  uint32 signs = 0;
#pragma unroll
  for (int s = 0; s < kN / 16; ++s)
    signs |= __float_as_uint(rows.data[s][0]) | __float_as_uint(rows.data[s][1]);
  ptx::branch_on(signs & 0x80000000u);
}
template <int kRows, int kCols>
__device__ __forceinline__ void pin(const RegTile<float, kRows, kCols>& tile) {
  uint32 signs = 0;
#pragma unroll
  for (int s = 0; s < tile.kRowSquares; ++s) {
#pragma unroll
    for (int i = 0; i < tile.kRegisters; ++i) signs |= __float_as_uint(tile.data[s][i]);
  }
  ptx::branch_on(signs & 0x80000000u);
}

}  // namespace tk::warp
