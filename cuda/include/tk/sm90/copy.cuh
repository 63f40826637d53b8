// Moves between registers, shared memory and global memory that threads do themselves.
#pragma once

#include "tk/global_view.cuh"
#include "tk/shared_tile.cuh"
#include "tk/sm90/map.cuh"
#include "tk/sm90/ptx/fence.cuh"
#include "tk/sm90/ptx/matrix.cuh"

namespace tk {
namespace detail {

// The address that this lane gives to ldmatrix or stmatrix for a 16 x 16 square: lanes 0-7 rows
// 0-7, 8-15 rows 8-15, 16-31 the same rows eight columns on.
template <typename View>
__device__ __forceinline__ uint32 matrix_address(const View& view, int row, int col,
                                                 int lane = ptx::lane_index()) {
  return view.address(row + (lane & 15), col + 8 * (lane >> 4));
}
// The same with the middle two 8 x 8 matrices exchanged, as transposition needs.
template <typename View>
__device__ __forceinline__ uint32 matrix_address_transposed(const View& view, int row, int col) {
  const int lane = ptx::lane_index();
  return view.address(row + (lane & 7) + 8 * (lane >> 4), col + (lane & 8));
}

// A warp's tile from and to rows first_row.. of a shared tile.
template <typename Dst, typename View>
__device__ __forceinline__ void load_shared(Dst& dst, const View& src, int first_row) {
  using T = typename View::T;
  if constexpr (kIsHalf<T>) {
#pragma unroll
    for (int s = 0; s < Dst::kRowSquares; ++s) {
#pragma unroll
      for (int c = 0; c < Dst::kCols / 16; ++c) {
        uint32 r[4];
        ptx::load_matrix_x4(r, matrix_address(src, first_row + 16 * s, 16 * c));
        if constexpr (kSame<T, typename Dst::T>) {
#pragma unroll
          for (int i = 0; i < 4; ++i) dst.data[s][4 * c + i] = r[i];
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float x, y;
            ptx::unpack<T>(r[i], x, y);
            set_pair(dst, s, 2 * c + (i >> 1), i & 1, x, y);
          }
        }
      }
    }
  } else {
    for_each_pair<Dst>([&](int s, int g, int h) {
      float x, y;
      ptx::load_shared_f32x2(x, y, src.address(first_row + row_of(s, 2 * h), col_of(g, 0)));
      set_pair(dst, s, g, h, x, y);
    });
  }
}

template <typename View, typename Src>
__device__ __forceinline__ void store_shared(const View& dst, const Src& src, int first_row,
                                             int lane = ptx::lane_index()) {
  using T = typename View::T;
  if constexpr (kIsHalf<T>) {
    RegTile<T, Src::kRows, Src::kCols> rounded;
    warp::convert(rounded, src);
#pragma unroll
    for (int s = 0; s < Src::kRowSquares; ++s) {
#pragma unroll
      for (int c = 0; c < Src::kCols / 16; ++c) {
        const uint32* r = &rounded.data[s][4 * c];
        ptx::store_matrix_x4(matrix_address(dst, first_row + 16 * s, 16 * c, lane), r[0], r[1],
                             r[2], r[3]);
      }
    }
  } else {
    for_each_pair<Src>([&](int s, int g, int h) {
      ptx::store_shared_f32x2(dst.address(first_row + row_of(s, 2 * h), col_of(g, 0)),
                              get(src, s, g, 2 * h), get(src, s, g, 2 * h + 1));
    });
  }
}

// dst(col, row) = src(row, col): the warp's rows become columns first_row.. of the shared tile.
template <typename View, typename Src>
__device__ __forceinline__ void store_shared_transposed(const View& dst, const Src& src,
                                                        int first_row) {
  using T = typename View::T;
  static_assert(kIsHalf<T>, "transposed stores move 16-bit values");
  RegTile<T, Src::kRows, Src::kCols> rounded;
  warp::convert(rounded, src);
#pragma unroll
  for (int s = 0; s < Src::kRowSquares; ++s) {
#pragma unroll
    for (int c = 0; c < Src::kCols / 16; ++c) {
      const uint32* r = &rounded.data[s][4 * c];
      ptx::store_matrix_x4_transposed(matrix_address_transposed(dst, 16 * c, first_row + 16 * s),
                                      r[0], r[1], r[2], r[3]);
    }
  }
}

// dst(row, col) = src(col, row): columns first_row.. of the shared tile become the warp's rows.
template <typename Dst, typename View>
__device__ __forceinline__ void load_shared_transposed(Dst& dst, const View& src, int first_row) {
  using T = typename View::T;
  static_assert(kSame<T, typename Dst::T> && kIsHalf<T>,
                "transposed loads move 16-bit values of one type");
#pragma unroll
  for (int s = 0; s < Dst::kRowSquares; ++s) {
#pragma unroll
    for (int c = 0; c < Dst::kCols / 16; ++c) {
      uint32 r[4];
      ptx::load_matrix_x4_transposed(r, matrix_address_transposed(src, 16 * c, first_row + 16 * s));
#pragma unroll
      for (int i = 0; i < 4; ++i) dst.data[s][4 * c + i] = r[i];
    }
  }
}

// Elements outside the array read as zero.
template <typename Dst, typename T>
__device__ __forceinline__ void load_global(Dst& dst, const GlobalView<T>& src, int first_row,
                                            int first_col) {
  // One address for each row, moved on from column to column: there are many values.
  const T* places[Dst::kRowSquares][2];
#pragma unroll
  for (int s = 0; s < Dst::kRowSquares; ++s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      places[s][h] = src.at(first_row + row_of(s, 2 * h), first_col + col_of(0, 0));
    }
  }
#pragma unroll
  for (int g = 0; g < Dst::kColGroups; ++g) {
    const int col = first_col + col_of(g, 0);
#pragma unroll
    for (int s = 0; s < Dst::kRowSquares; ++s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const T*& place = places[s][h];
        const bool inside = first_row + row_of(s, 2 * h) < src.rows;
        const float x = inside && col < src.cols ? ptx::to_float(*place) : 0.0f;
        const float y =
            inside && col + 1 < src.cols ? ptx::to_float(*(place + src.col_stride)) : 0.0f;
        set_pair(dst, s, g, h, x, y);
        place += 8 * src.col_stride;
      }
    }
  }
}

// Elements outside the array are not written.
template <typename T, typename Src>
__device__ __forceinline__ void store_global(const GlobalView<T>& dst, const Src& src,
                                             int first_row, int first_col) {
  const auto write = [&](int row, int col, float x) {
    if (row < dst.rows && col < dst.cols) *dst.at(row, col) = ptx::from_float<T>(x);
  };
  for_each_pair<Src>([&](int s, int g, int h) {
    const int row = first_row + row_of(s, 2 * h);
    const int col = first_col + col_of(g, 0);
    write(row, col, get(src, s, g, 2 * h));
    write(row, col + 1, get(src, s, g, 2 * h + 1));
  });
}

// An element of a vector, if there is one.
template <typename T>
__device__ __forceinline__ float read(const GlobalVec<T>& src, int index, float missing) {
  return index < src.size ? ptx::to_float(*src.at(index)) : missing;
}
template <typename T>
__device__ __forceinline__ float write(const GlobalVec<T>& dst, int index, float x) {
  if (index < dst.size) *dst.at(index) = ptx::from_float<T>(x);
  return x;
}

// Where an operation reads an array element by element, the interpreter is told of all of them.
template <typename T>
__device__ __forceinline__ void before_reads(const GlobalVec<T>&, int, int, Location) {}
template <int kRows, typename T>
__device__ __forceinline__ void before_group_reads(const GlobalVec<T>&, int, Location) {}

}  // namespace detail

namespace warp {

// Between a warp's registers and a shared tile of the same shape.
template <typename T, int kRows, int kCols, typename Shared>
__device__ __forceinline__ void load(RegTile<T, kRows, kCols>& dst, const Shared& src,
                                     Location = {}) {
  static_assert(Shared::kRows == kRows && Shared::kCols == kCols, "load needs tiles of one shape");
  detail::load_shared(dst, detail::as_view(src), 0);
}
template <typename Shared, typename T, int kRows, int kCols>
__device__ __forceinline__ void store(const Shared& dst, const RegTile<T, kRows, kCols>& src,
                                      Location = {}) {
  static_assert(Shared::kRows == kRows && Shared::kCols == kCols, "store needs tiles of one shape");
  detail::store_shared(detail::as_view(dst), src, 0);
}
// A shared tile with rows and columns exchanged.
template <typename T, int kRows, int kCols, typename Shared>
__device__ __forceinline__ void load_transposed(RegTile<T, kRows, kCols>& dst, const Shared& src,
                                                Location = {}) {
  static_assert(Shared::kRows == kCols && Shared::kCols == kRows,
                "load_transposed needs the transposed shape");
  detail::load_shared_transposed(dst, detail::as_view(src), 0);
}
template <typename Shared, typename T, int kRows, int kCols>
__device__ __forceinline__ void store_transposed(const Shared& dst,
                                                 const RegTile<T, kRows, kCols>& src,
                                                 Location = {}) {
  static_assert(Shared::kRows == kCols && Shared::kCols == kRows,
                "store_transposed needs the transposed shape");
  detail::store_shared_transposed(detail::as_view(dst), src, 0);
}

// Between registers and an array in global memory, at (row, col).
template <typename T, int kRows, int kCols, typename U>
__device__ __forceinline__ void load(RegTile<T, kRows, kCols>& dst, const GlobalView<U>& src,
                                     int row, int col, Location = {}) {
  detail::load_global(dst, src, row, col);
}
template <typename U, typename T, int kRows, int kCols>
__device__ __forceinline__ void store(const GlobalView<U>& dst, const RegTile<T, kRows, kCols>& src,
                                      int row, int col, Location = {}) {
  detail::store_global(dst, src, row, col);
}

// A value per row or column from shared memory.
template <int kN>
__device__ __forceinline__ void load(PerRow<kN>& dst, const SharedVec<float, kN>& src,
                                     Location = {}) {
  const uint32 base = ptx::shared_address(src.data);
  for_each(dst, [&](int row, float) { return ptx::load_shared_f32(base + 4 * row); });
}
template <int kN>
__device__ __forceinline__ void load(PerCol<kN>& dst, const SharedVec<float, kN>& src,
                                     Location = {}) {
  const uint32 first = ptx::shared_address(src.data) + 4 * detail::col_of(0, 0);
#pragma unroll
  for (int g = 0; g < kN / 8; ++g) {
    ptx::load_shared_f32x2(dst.data[g][0], dst.data[g][1], first + 32 * g);
  }
}
// dst = f(src, cols) with the values of the columns in shared memory, read as they are needed.
template <typename Dst, typename Src, int kN, typename F>
__device__ __forceinline__ void map_cols(Dst& dst, const Src& src, const SharedVec<float, kN>& cols,
                                         F&& f, Location = {}) {
  static_assert(detail::kSameShape<Dst, Src> && Dst::kCols == kN,
                "map_cols needs a value for each column of the tile");
  const uint32 base = ptx::shared_address(cols.data);
#pragma unroll
  for (int g = 0; g < kN / 8; ++g) {
    float x, y;
    ptx::load_shared_f32x2(x, y, base + 4 * detail::col_of(g, 0));
#pragma unroll
    for (int s = 0; s < Dst::kRowSquares; ++s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        detail::set_pair(dst, s, g, h, f(detail::get(src, s, g, 2 * h), x),
                         f(detail::get(src, s, g, 2 * h + 1), y));
      }
    }
  }
}
// dst = f(a, b, cols) likewise.
template <typename Dst, typename A, typename B, int kN, typename F>
__device__ __forceinline__ void zip_cols(Dst& dst, const A& a, const B& b,
                                         const SharedVec<float, kN>& cols, F&& f, Location = {}) {
  static_assert(detail::kSameShape<Dst, A> && detail::kSameShape<Dst, B> && Dst::kCols == kN,
                "zip_cols needs tiles of one shape and a value for each column");
  const uint32 first = ptx::shared_address(cols.data) + 4 * detail::col_of(0, 0);
#pragma unroll
  for (int g = 0; g < kN / 8; ++g) {
    float x, y;
    ptx::load_shared_f32x2(x, y, first + 32 * g);
#pragma unroll
    for (int s = 0; s < Dst::kRowSquares; ++s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        detail::set_pair(dst, s, g, h,
                         f(detail::get(a, s, g, 2 * h), detail::get(b, s, g, 2 * h), x),
                         f(detail::get(a, s, g, 2 * h + 1), detail::get(b, s, g, 2 * h + 1), y));
      }
    }
  }
}
// Two results of two operands: x and y become what f(a, b, cols, x, y) makes of them, value by
// value, so that neither waits in registers for the other. x and y may be a and b.
template <typename X, typename Y, typename A, typename B, int kN, typename F>
__device__ __forceinline__ void zip_cols_twice(X& x, Y& y, const A& a, const B& b,
                                               const SharedVec<float, kN>& cols, F&& f,
                                               Location = {}) {
  static_assert(detail::kSameShape<X, A> && detail::kSameShape<X, B> && detail::kSameShape<X, Y> &&
                    X::kCols == kN,
                "zip_cols_twice needs tiles of one shape and a value for each column");
  const uint32 base = ptx::shared_address(cols.data);
#pragma unroll
  for (int g = 0; g < kN / 8; ++g) {
    float col[2];
    ptx::load_shared_f32x2(col[0], col[1], base + 4 * detail::col_of(g, 0));
#pragma unroll
    for (int s = 0; s < X::kRowSquares; ++s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x_pair[2], y_pair[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          f(detail::get(a, s, g, 2 * h + i), detail::get(b, s, g, 2 * h + i), col[i], x_pair[i],
            y_pair[i]);
        }
        detail::set_pair(x, s, g, h, x_pair[0], x_pair[1]);
        detail::set_pair(y, s, g, h, y_pair[0], y_pair[1]);
      }
    }
  }
}
template <int kN>
__device__ __forceinline__ void store(SharedVec<float, kN>& dst, const PerRow<kN>& src,
                                      Location = {}) {
  const uint32 base = ptx::shared_address(dst.data);
  PerRow<kN> copy = src;
  if ((ptx::lane_index() & 3) == 0) {
    for_each(copy, [&](int row, float x) {
      ptx::store_shared_f32(base + 4 * row, x);
      return x;
    });
  }
}
template <int kN>
__device__ __forceinline__ void store(SharedVec<float, kN>& dst, const PerCol<kN>& src,
                                      Location = {}) {
  const uint32 base = ptx::shared_address(dst.data);
  if (ptx::lane_index() < 4) {
#pragma unroll
    for (int g = 0; g < kN / 8; ++g) {
      ptx::store_shared_f32x2(base + 4 * detail::col_of(g, 0), src.data[g][0], src.data[g][1]);
    }
  }
}

// A value per row to an array, from element `first` on; elements beyond its size are not written.
template <typename T, int kN>
__device__ __forceinline__ void store(const GlobalVec<T>& dst, const PerRow<kN>& src, int first,
                                      Location = {}) {
  PerRow<kN> copy = src;
  if ((ptx::lane_index() & 3) == 0) {
    for_each(copy, [&](int row, float x) { return detail::write(dst, first + row, x); });
  }
}
// Elements beyond the array's size read as `missing`.
template <int kN, typename T>
__device__ __forceinline__ void load(PerRow<kN>& dst, const GlobalVec<T>& src, int first,
                                     float missing, Location = {}) {
  for_each(dst, [&](int row, float) { return detail::read(src, first + row, missing); });
}

}  // namespace warp

namespace warpgroup {

// Between the tiles of four warps and a shared tile of four times their rows.
template <typename T, int kRows, int kCols, typename Shared>
__device__ __forceinline__ void load(RegTile<T, kRows, kCols>& dst, const Shared& src,
                                     Location = {}) {
  static_assert(Shared::kRows == 4 * kRows && Shared::kCols == kCols,
                "a warpgroup loads four times the rows of a warp's tile");
  detail::load_shared(dst, detail::as_view(src), kRows * (ptx::warp_index() & 3));
}
template <typename Shared, typename T, int kRows, int kCols>
__device__ __forceinline__ void store(const Shared& dst, const RegTile<T, kRows, kCols>& src,
                                      Location = {}) {
  static_assert(Shared::kRows == 4 * kRows && Shared::kCols == kCols,
                "a warpgroup stores four times the rows of a warp's tile");
  detail::store_shared(detail::as_view(dst), src, kRows * (ptx::warp_index() & 3));
}
// The same, its addresses made here and not kept in registers from before a loop.
template <typename Shared, typename T, int kRows, int kCols>
__device__ __forceinline__ void store_afresh(const Shared& dst, const RegTile<T, kRows, kCols>& src,
                                             Location = {}) {
  static_assert(Shared::kRows == 4 * kRows && Shared::kCols == kCols,
                "a warpgroup stores four times the rows of a warp's tile");
  const int thread = ptx::fresh_thread_index();
  detail::store_shared(detail::as_view(dst), src, kRows * (thread >> 5 & 3), thread & 31);
}
template <typename T, int kRows, int kCols, typename Shared>
__device__ __forceinline__ void load_transposed(RegTile<T, kRows, kCols>& dst, const Shared& src,
                                                Location = {}) {
  static_assert(Shared::kRows == kCols && Shared::kCols == 4 * kRows,
                "load_transposed needs the transposed shape");
  detail::load_shared_transposed(dst, detail::as_view(src), kRows * (ptx::warp_index() & 3));
}
template <typename Shared, typename T, int kRows, int kCols>
__device__ __forceinline__ void store_transposed(const Shared& dst,
                                                 const RegTile<T, kRows, kCols>& src,
                                                 Location = {}) {
  static_assert(Shared::kRows == kCols && Shared::kCols == 4 * kRows,
                "store_transposed needs the transposed shape");
  detail::store_shared_transposed(detail::as_view(dst), src, kRows * (ptx::warp_index() & 3));
}

// Between registers and global memory, at (row, col) for the warpgroup's first row.
template <typename T, int kRows, int kCols, typename U>
__device__ __forceinline__ void load(RegTile<T, kRows, kCols>& dst, const GlobalView<U>& src,
                                     int row, int col, Location = {}) {
  detail::load_global(dst, src, row + kRows * (ptx::warp_index() & 3), col);
}
template <typename U, typename T, int kRows, int kCols>
__device__ __forceinline__ void store(const GlobalView<U>& dst, const RegTile<T, kRows, kCols>& src,
                                      int row, int col, Location = {}) {
  detail::store_global(dst, src, row + kRows * (ptx::warp_index() & 3), col);
}

// The same, of a warpgroup's rows.
template <typename T, int kN>
__device__ __forceinline__ void store(const GlobalVec<T>& dst, const PerRow<kN>& src, int first,
                                      Location = {}) {
  warp::store(dst, src, first + kN * (ptx::warp_index() & 3));
}
template <int kN, typename T>
__device__ __forceinline__ void load(PerRow<kN>& dst, const GlobalVec<T>& src, int first,
                                     float missing, Location = {}) {
  warp::load(dst, src, first + kN * (ptx::warp_index() & 3), missing);
}

// A value per row from shared memory.
template <int kN, int kAll>
__device__ __forceinline__ void load(PerRow<kN>& dst, const SharedVec<float, kAll>& src,
                                     Location = {}) {
  static_assert(kAll == 4 * kN, "a warpgroup loads four times the rows of a warp's tile");
  const uint32 base = ptx::shared_address(src.data);
  for_each(dst, [&](int row, float) { return ptx::load_shared_f32(base + 4 * row); });
}

}  // namespace warpgroup

// After ordinary stores to shared memory, before the copy engine or the tensor cores read them:
// every thread that stored calls this, then a barrier.
__device__ __forceinline__ void publish_shared(Location = {}) { ptx::fence_async_shared(); }
// The same after ordinary stores to global memory that the copy engine reads or changes.
__device__ __forceinline__ void publish_global(Location = {}) { ptx::fence_async_global(); }

}  // namespace tk
