// Reductions and running sums over the rows and columns of a register tile.
//
// A row's values sit in the four lanes of a quad, a column's in eight lanes of the warp; each
// reduction first folds what a lane holds, then exchanges. Where a loop folds many tiles, fold_rows
// keeps the lane's part and finish_rows exchanges once at the end.
#pragma once

#include "tk/global_view.cuh"
#include "tk/shared_tile.cuh"
#include "tk/sm90/map.cuh"
#include "tk/sm90/ptx/matrix.cuh"

namespace tk::warp {

// rows = op(rows, the lane's part of each row of src). Complete only after finish_rows.
template <int kN, typename Src, typename Op>
__device__ __forceinline__ void fold_rows(PerRow<kN>& rows, const Src& src, Op&& op,
                                          Location = {}) {
  static_assert(Src::kRows == kN, "fold_rows needs a value for each row of the tile");
  detail::for_each_pair<Src>([&](int s, int g, int h) {
    rows.data[s][h] =
        op(rows.data[s][h], op(detail::get(src, s, g, 2 * h), detail::get(src, s, g, 2 * h + 1)));
  });
}
// The same of a sum of products: rows += the lane's part of each row of a * b.
template <int kN, typename A, typename B>
__device__ __forceinline__ void fold_row_dot(PerRow<kN>& rows, const A& a, const B& b,
                                             Location = {}) {
  static_assert(detail::kSameShape<A, B> && A::kRows == kN,
                "fold_row_dot needs tiles of one shape and a value for each row");
  detail::for_each_pair<A>([&](int s, int g, int h) {
    float& sum = rows.data[s][h];
    sum = math::fma(detail::get(a, s, g, 2 * h), detail::get(b, s, g, 2 * h), sum);
    sum = math::fma(detail::get(a, s, g, 2 * h + 1), detail::get(b, s, g, 2 * h + 1), sum);
  });
}
// Brings together the lanes' parts, so that every lane of a quad holds the whole.
template <int kN, typename Op>
__device__ __forceinline__ void finish_rows(PerRow<kN>& rows, Op&& op, Location = {}) {
  map(rows, rows, [&](float x) {
    x = op(x, ptx::shuffle_xor(x, 1));
    return op(x, ptx::shuffle_xor(x, 2));
  });
}
template <int kN, typename Src, typename Op>
__device__ __forceinline__ void reduce_rows(PerRow<kN>& rows, const Src& src, float start, Op&& op,
                                            Location = {}) {
  fill(rows, start);
  fold_rows(rows, src, op);
  finish_rows(rows, op);
}

// Whether f(a, b) holds for any row of the warp, the same answer in every lane.
template <int kN, typename F>
__device__ __forceinline__ bool any_row(const PerRow<kN>& a, const PerRow<kN>& b, F&& f,
                                        Location = {}) {
  bool any = false;
#pragma unroll
  for (int s = 0; s < kN / 16; ++s) {
    any = any || f(a.data[s][0], b.data[s][0]) || f(a.data[s][1], b.data[s][1]);
  }
  return ptx::any(any);
}

template <int kN, typename Src, typename Op>
__device__ __forceinline__ void fold_cols(PerCol<kN>& cols, const Src& src, Op&& op,
                                          Location = {}) {
  static_assert(Src::kCols == kN, "fold_cols needs a value for each column of the tile");
  detail::for_each_pair<Src>([&](int s, int g, int h) {
    cols.data[g][0] = op(cols.data[g][0], detail::get(src, s, g, 2 * h));
    cols.data[g][1] = op(cols.data[g][1], detail::get(src, s, g, 2 * h + 1));
  });
}
template <int kN, typename Op>
__device__ __forceinline__ void finish_cols(PerCol<kN>& cols, Op&& op, Location = {}) {
  map(cols, cols, [&](float x) {
    x = op(x, ptx::shuffle_xor(x, 4));
    x = op(x, ptx::shuffle_xor(x, 8));
    return op(x, ptx::shuffle_xor(x, 16));
  });
}
template <int kN, typename Src, typename Op>
__device__ __forceinline__ void reduce_cols(PerCol<kN>& cols, const Src& src, float start, Op&& op,
                                            Location = {}) {
  fill(cols, start);
  fold_cols(cols, src, op);
  finish_cols(cols, op);
}

// dst = the sums of src's columns. Every exchange halves what a lane still has, until it has two
// columns of its own, in fourteen shuffles where col_sum, whole in every lane, takes 48.
template <typename Src>
__device__ __forceinline__ void store_col_sum(SharedVec<float, 64>& dst, const Src& src,
                                              Location = {}) {
  const auto sum = [](float x, float y) { return x + y; };
  const int lane = ptx::lane_index();
  PerCol<64> cols;
  fill(cols, 0.0f);
  fold_cols(cols, src, sum);
#pragma unroll
  for (int kept = 4; kept > 0; kept /= 2) {
    const bool keeps_upper = (lane & (4 * kept)) != 0;
#pragma unroll
    for (int g = 0; g < kept; ++g) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float lower = cols.data[g][e], upper = cols.data[g + kept][e];
        const float other = ptx::shuffle_xor(keeps_upper ? lower : upper, 4 * kept);
        cols.data[g][e] = sum(keeps_upper ? upper : lower, other);
      }
    }
  }
  ptx::store_shared_f32x2(ptx::shared_address(dst.data) + 8 * lane, cols.data[0][0],
                          cols.data[0][1]);
}

// dst = src + parts[0] + parts[1] + ..., of vectors in shared memory.
template <int kN, int kParts>
__device__ __forceinline__ void add_parts(SharedVec<float, kN>& dst,
                                          const SharedVec<float, kN>& src,
                                          const SharedVec<float, kN> (&parts)[kParts],
                                          Location = {}) {
  static_assert(kN % 32 == 0, "add_parts has as many elements in every lane");
  const uint32 place = 4 * ptx::lane_index();
#pragma unroll
  for (int i = 0; i < kN; i += 32) {
    float sum = ptx::load_shared_f32(ptx::shared_address(src.data) + place + 4 * i);
#pragma unroll
    for (const auto& part : parts) {
      sum += ptx::load_shared_f32(ptx::shared_address(part.data) + place + 4 * i);
    }
    ptx::store_shared_f32(ptx::shared_address(dst.data) + place + 4 * i, sum);
  }
}

// dst(r, c) = src(r, 0) + ... + src(r, c).
template <typename Dst, typename Src>
__device__ __forceinline__ void cumsum_cols(Dst& dst, const Src& src, Location = {}) {
  static_assert(detail::kSameShape<Dst, Src>, "cumsum_cols needs tiles of one shape");
  const int place = ptx::lane_index() & 3;
#pragma unroll
  for (int s = 0; s < Src::kRowSquares; ++s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float before = 0.0f;
#pragma unroll
      for (int g = 0; g < Src::kColGroups; ++g) {
        const float x = detail::get(src, s, g, 2 * h);
        const float pair = x + detail::get(src, s, g, 2 * h + 1);
        float upto = pair;
#pragma unroll
        for (int d = 1; d < 4; d *= 2) {
          const float y = ptx::shuffle(upto, (ptx::lane_index() & ~3) | ((place - d) & 3));
          if (place >= d) upto += y;
        }
        // What the lanes to the left hold, not upto - pair: no sum knows of what comes after it.
        const float left = ptx::shuffle(upto, (ptx::lane_index() & ~3) | ((place - 1) & 3));
        const float start = place > 0 ? before + left : before;
        detail::set_pair(dst, s, g, h, start + x, start + pair);
        before += ptx::shuffle(upto, ptx::lane_index() | 3);
      }
    }
  }
}

// dst = src with its columns in the reverse order.
template <typename Dst, typename Src>
__device__ __forceinline__ void reverse_cols(Dst& dst, const Src& src, Location = {}) {
  static_assert(detail::kSameShape<Dst, Src>, "reverse_cols needs tiles of one shape");
  Dst result;
  detail::for_each_pair<Src>([&](int s, int g, int h) {
    // Lane i of a quad has columns 2 i and 2 i + 1: of the reverse, lane 3 - i has them.
    const float first = ptx::shuffle_xor(detail::get(src, s, g, 2 * h), 3);
    const float second = ptx::shuffle_xor(detail::get(src, s, g, 2 * h + 1), 3);
    detail::set_pair(result, s, Src::kColGroups - 1 - g, h, second, first);
  });
  dst = result;
}

// dst(r, c) = src(0, c) + ... + src(r, c), over the warp's rows.
template <typename Dst, typename Src>
__device__ __forceinline__ void cumsum_rows(Dst& dst, const Src& src, Location = {}) {
  static_assert(detail::kSameShape<Dst, Src>, "cumsum_rows needs tiles of one shape");
  const int place = ptx::lane_index() >> 2;
#pragma unroll
  for (int g = 0; g < Src::kColGroups; ++g) {
    float before[2] = {0.0f, 0.0f};
#pragma unroll
    for (int s = 0; s < Src::kRowSquares; ++s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float upto[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          upto[e] = detail::get(src, s, g, 2 * h + e);
#pragma unroll
          for (int d = 1; d < 8; d *= 2) {
            const float y = ptx::shuffle_up(upto[e], 4 * d);
            if (place >= d) upto[e] += y;
          }
          upto[e] += before[e];
          before[e] = ptx::shuffle(upto[e], 28 + (ptx::lane_index() & 3));
        }
        detail::set_pair(dst, s, g, h, upto[0], upto[1]);
      }
    }
  }
}

// dst = src with rows and columns exchanged, for square tiles of 16-bit values.
template <typename T, int kN>
__device__ __forceinline__ void transpose(RegTile<T, kN, kN>& dst, const RegTile<T, kN, kN>& src,
                                          Location = {}) {
  static_assert(kIsHalf<T>, "transpose moves 16-bit values");
  RegTile<T, kN, kN> result;
#pragma unroll
  for (int s = 0; s < kN / 16; ++s) {
#pragma unroll
    for (int g = 0; g < kN / 8; ++g) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        result.data[g / 2][2 * (2 * s + h) + (g & 1)] =
            ptx::transpose_matrix(src.data[s][2 * g + h]);
      }
    }
  }
  dst = result;
}

}  // namespace tk::warp

namespace tk::warpgroup {
namespace detail_reduce {

// Of the two rows that a lane has parts of, an even one keeps the first and an odd one the second:
// the sum of its own part and its neighbour's.
__device__ __forceinline__ float sum_with_neighbour(const PerRow<16>& rows, int thread) {
  const bool second = (thread & 1) != 0;
  const float kept = second ? rows.data[0][1] : rows.data[0][0];
  const float given = second ? rows.data[0][0] : rows.data[0][1];
  return kept + ptx::shuffle_xor(given, 1);
}
// That row, of the warpgroup's.
__device__ __forceinline__ int row_kept(int thread) {
  return 16 * (thread >> 5 & 3) + ((thread & 31) >> 2) + 8 * (thread & 1);
}

}  // namespace detail_reduce

// Rows of which lanes hold parts of sums (fold_row_sum and the like), finished and stored: dst has
// an element for each of the warpgroup's 64 rows.
__device__ __forceinline__ void store_row_sums(const GlobalVec<float>& dst, const PerRow<16>& src,
                                               Location = {}) {
  const int thread = ptx::fresh_thread_index();
  const float sum = detail_reduce::sum_with_neighbour(src, thread);
  const float whole = sum + ptx::shuffle_xor(sum, 2);
  if ((thread & 2) == 0) *dst.at(detail_reduce::row_kept(thread)) = whole;
}
// The same of two, with three exchanges instead of eight.
__device__ __forceinline__ void store_row_sums(const GlobalVec<float>& dst, const PerRow<16>& src,
                                               const GlobalVec<float>& other_dst,
                                               const PerRow<16>& other, Location = {}) {
  const int thread = ptx::fresh_thread_index();
  const bool is_other = (thread & 2) != 0;
  const float sum = detail_reduce::sum_with_neighbour(src, thread);
  const float other_sum = detail_reduce::sum_with_neighbour(other, thread);
  const float whole =
      (is_other ? other_sum : sum) + ptx::shuffle_xor(is_other ? sum : other_sum, 2);
  *(is_other ? other_dst : dst).at(detail_reduce::row_kept(thread)) = whole;
}

}  // namespace tk::warpgroup
