// Moves of float tiles between registers and global memory, sixteen bytes at a time, and of pairs.
//
// A lane of a register tile has pairs of neighbouring columns, which would be moved as eight bytes.
// Here the columns of every sixteen are exchanged so that its two pairs are four in a row of the
// array: column 16 c + 8 e + 2 j + i of the tile is column 16 c + 4 j + 2 e + i of the array.
// Vectors of columns have the same order. Whatever treats all columns alike (maps, products with
// vectors of columns, reductions) does not see it; what counts columns, such as masks, does.
#pragma once

#include "tk/sm90/copy.cuh"
#include "tk/sm90/ptx/global.cuh"

namespace tk {
namespace detail {

// Four neighbouring elements, whose address is a multiple of their size.
template <typename T>
__device__ __forceinline__ float4 load_run(const T* place) {
  if constexpr (kSame<T, float>) {
    return *reinterpret_cast<const float4*>(place);
  } else {
    const uint2 pairs = *reinterpret_cast<const uint2*>(place);
    float4 run;
    ptx::unpack<T>(pairs.x, run.x, run.y);
    ptx::unpack<T>(pairs.y, run.z, run.w);
    return run;
  }
}
template <typename T>
__device__ __forceinline__ void store_run(T* place, const float4& run) {
  if constexpr (kSame<T, float>) {
    ptx::store_global_f32x4(place, run);
  } else {
    ptx::store_global_u32x2(place, ptx::pack<T>(run.x, run.y), ptx::pack<T>(run.z, run.w));
  }
}

// The run that starts at column `col` of `cols`; what is outside is `missing`.
template <bool kWhole, typename T>
__device__ __forceinline__ float4 load_run_inside(const T* place, int col, int cols,
                                                  float missing) {
  if constexpr (kWhole) {
    if (col < cols) return load_run(place);
    return make_float4(missing, missing, missing, missing);
  } else {
    float4 run;
    run.x = col < cols ? ptx::to_float(place[0]) : missing;
    run.y = col + 1 < cols ? ptx::to_float(place[1]) : missing;
    run.z = col + 2 < cols ? ptx::to_float(place[2]) : missing;
    run.w = col + 3 < cols ? ptx::to_float(place[3]) : missing;
    return run;
  }
}
template <bool kWhole, typename T>
__device__ __forceinline__ void store_run_inside(T* place, int col, int cols, const float4& run) {
  if constexpr (kWhole) {
    if (col < cols) store_run(place, run);
  } else {
    if (col < cols) place[0] = ptx::from_float<T>(run.x);
    if (col + 1 < cols) place[1] = ptx::from_float<T>(run.y);
    if (col + 2 < cols) place[2] = ptx::from_float<T>(run.z);
    if (col + 3 < cols) place[3] = ptx::from_float<T>(run.w);
  }
}

// Of the array, where a lane's run in the sixteen columns number 0 starts.
__device__ __forceinline__ int first_of_run() { return 4 * (ptx::lane_index() & 3); }

// Calls f(square, half, columns' number, row, col) for each run of a warp's tile at (first_row,
// first_col) of an array.
template <typename Tile, typename F>
__device__ __forceinline__ void for_each_run(int first_row, int first_col, F&& f) {
  static_assert(kSame<typename Tile::T, float>, "runs are those of float tiles");
#pragma unroll
  for (int s = 0; s < Tile::kRowSquares; ++s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int c = 0; c < Tile::kCols / 16; ++c) {
        f(s, h, c, first_row + row_of(s, 2 * h), first_col + 16 * c + first_of_run());
      }
    }
  }
}

template <bool kWhole, typename Dst, typename T>
__device__ __forceinline__ void load_runs(Dst& dst, const GlobalView<T>& src, int first_row,
                                          int first_col) {
  for_each_run<Dst>(first_row, first_col, [&](int s, int h, int c, int row, int col) {
    const int cols = row < src.rows ? src.cols : 0;
    const float4 run =
        load_run_inside<kWhole>(src.data + row * src.row_stride + col, col, cols, 0.0f);
    set_pair(dst, s, 2 * c, h, run.x, run.y);
    set_pair(dst, s, 2 * c + 1, h, run.z, run.w);
  });
}
template <bool kWhole, typename T, typename Src>
__device__ __forceinline__ void store_runs(const GlobalView<T>& dst, const Src& src, int first_row,
                                           int first_col) {
  for_each_run<Src>(first_row, first_col, [&](int s, int h, int c, int row, int col) {
    const int cols = row < dst.rows ? dst.cols : 0;
    const float4 run =
        make_float4(get(src, s, 2 * c, 2 * h), get(src, s, 2 * c, 2 * h + 1),
                    get(src, s, 2 * c + 1, 2 * h), get(src, s, 2 * c + 1, 2 * h + 1));
    store_run_inside<kWhole>(dst.data + row * dst.row_stride + col, col, cols, run);
  });
}

// Of four lanes that share a row, each with four words: lane i gets word i of all four, in order.
__device__ __forceinline__ void transpose_quad(uint32 (&x)[4]) {
  const int lane = ptx::lane_index();
#pragma unroll
  for (int step = 2; step >= 1; step /= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = step == 2 ? k : 2 * k;
      uint32 &low = x[i], &high = x[i + step];
      const uint32 other = ptx::shuffle_xor(upper ? low : high, step);
      (upper ? low : high) = other;
    }
  }
}

// A warp's tile in its own order, of the array's type or of float.
template <typename Dst, typename T>
__device__ __forceinline__ void load_pairs(Dst& dst, const GlobalView<T>& src, int first_row,
                                           int first_col) {
  constexpr bool kPacked = kIsHalf<typename Dst::T>;
  using Pair = Select<kPacked, uint32, float2>;
  const int col = first_col + col_of(0, 0);
#pragma unroll
  for (int s = 0; s < Dst::kRowSquares; ++s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // One address, from which all the row's pairs are a number of bytes known beforehand.
      const int row = first_row + row_of(s, 2 * h);
      const auto* pairs = reinterpret_cast<const Pair*>(src.data + row * src.row_stride + col);
      const int cols = row < src.rows ? src.cols - col : 0;
#pragma unroll
      for (int g = 0; g < Dst::kColGroups; ++g) {
        const Pair pair = 8 * g < cols ? pairs[4 * g] : Pair{};
        if constexpr (kPacked) {
          dst.data[s][2 * g + h] = pair;
        } else {
          set_pair(dst, s, g, h, pair.x, pair.y);
        }
      }
    }
  }
}

// A warp's tile in its own order, rounded; columns outside the array are whole runs of eight.
template <typename T, typename Src>
__device__ __forceinline__ void store_rounded(const GlobalView<T>& dst, const Src& src,
                                              int first_row, int first_col) {
  static_assert(kIsHalf<T> && Src::kCols % 32 == 0, "four runs of eight 16-bit values at a time");
  RegTile<T, Src::kRows, Src::kCols> rounded;
  warp::convert(rounded, src);
  const int run = 8 * (ptx::lane_index() & 3);
#pragma unroll
  for (int s = 0; s < Src::kRowSquares; ++s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + row_of(s, 2 * h);
      T* place = dst.data + row * dst.row_stride + first_col + run;
      const int cols = row < dst.rows ? dst.cols - first_col - run : 0;
#pragma unroll
      for (int c = 0; c < Src::kCols / 32; ++c) {
        uint32 x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = rounded.data[s][8 * c + 2 * i + h];
        transpose_quad(x);
        if (32 * c < cols) ptx::store_global_u32x4(place + 32 * c, x);
      }
    }
  }
}

}  // namespace detail

namespace warp {

// Between registers and an array of floats in global memory, at (row, col), whose columns lie side
// by side. With kWhole, rows start at multiples of sixteen bytes and are whole runs of four. What
// is outside reads as zero and is not written.
template <bool kWhole, int kRows, int kCols, typename T>
__device__ __forceinline__ void load_runs(RegTile<float, kRows, kCols>& dst,
                                          const GlobalView<T>& src, int row, int col,
                                          Location = {}) {
  detail::load_runs<kWhole>(dst, src, row, col);
}
template <bool kWhole, int kRows, int kCols>
__device__ __forceinline__ void store_runs(const GlobalView<float>& dst,
                                           const RegTile<float, kRows, kCols>& src, int row,
                                           int col, Location = {}) {
  detail::store_runs<kWhole>(dst, src, row, col);
}

// The same two at a time, in the tile's own order: rows start at multiples of eight bytes and have
// whole pairs, and so does `col`.
template <int kRows, int kCols, typename T>
__device__ __forceinline__ void load_pairs(RegTile<float, kRows, kCols>& dst,
                                           const GlobalView<T>& src, int row, int col,
                                           Location = {}) {
  detail::for_each_pair<RegTile<float, kRows, kCols>>([&](int s, int g, int h) {
    const int r = row + detail::row_of(s, 2 * h), c = col + detail::col_of(g, 0);
    float2 pair = make_float2(0.0f, 0.0f);
    if (r < src.rows && c < src.cols) {
      pair = *reinterpret_cast<const float2*>(src.data + r * src.row_stride + c);
    }
    detail::set_pair(dst, s, g, h, pair.x, pair.y);
  });
}
template <int kRows, int kCols>
__device__ __forceinline__ void store_pairs(const GlobalView<float>& dst,
                                            const RegTile<float, kRows, kCols>& src, int row,
                                            int col, Location = {}) {
  detail::for_each_pair<RegTile<float, kRows, kCols>>([&](int s, int g, int h) {
    const int r = row + detail::row_of(s, 2 * h), c = col + detail::col_of(g, 0);
    if (r < dst.rows && c < dst.cols) {
      *reinterpret_cast<float2*>(dst.data + r * dst.row_stride + c) =
          make_float2(detail::get(src, s, g, 2 * h), detail::get(src, s, g, 2 * h + 1));
    }
  });
}

// A value for each column of such a tile, from element `first` on of a vector of any type whose
// elements lie side by side; with kWhole, in runs of four as above. Elements beyond its size read
// as `missing` and are not written.
template <bool kWhole, int kN, typename T>
__device__ __forceinline__ void load_runs(PerCol<kN>& dst, const GlobalVec<const T>& src, int first,
                                          float missing, Location = {}) {
#pragma unroll
  for (int c = 0; c < kN / 16; ++c) {
    const int col = first + 16 * c + detail::first_of_run();
    const float4 run = detail::load_run_inside<kWhole>(src.data + col, col, src.size, missing);
    dst.data[2 * c][0] = run.x;
    dst.data[2 * c][1] = run.y;
    dst.data[2 * c + 1][0] = run.z;
    dst.data[2 * c + 1][1] = run.w;
  }
}
template <bool kWhole, int kN, typename T>
__device__ __forceinline__ void store_runs(const GlobalVec<T>& dst, const PerCol<kN>& src,
                                           int first, Location = {}) {
  if (ptx::lane_index() >= 4) return;
#pragma unroll
  for (int c = 0; c < kN / 16; ++c) {
    const int col = first + 16 * c + detail::first_of_run();
    const float4 run = make_float4(src.data[2 * c][0], src.data[2 * c][1], src.data[2 * c + 1][0],
                                   src.data[2 * c + 1][1]);
    detail::store_run_inside<kWhole>(dst.data + col, col, dst.size, run);
  }
}

// Keeps the first `end` columns of the array's that such a tile has.
template <int kRows, int kCols>
__device__ __forceinline__ void keep_runs_before(RegTile<float, kRows, kCols>& tile, int end,
                                                 float value, Location = {}) {
  detail::for_each_run<RegTile<float, kRows, kCols>>(0, 0, [&](int s, int h, int c, int, int col) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& x = tile.data[s][8 * c + 4 * (i >> 1) + 2 * h + (i & 1)];
      x = col + i < end ? x : value;
    }
  });
}

}  // namespace warp

namespace warpgroup {

template <bool kWhole, int kRows, int kCols, typename T>
__device__ __forceinline__ void load_runs(RegTile<float, kRows, kCols>& dst,
                                          const GlobalView<T>& src, int row, int col,
                                          Location = {}) {
  detail::load_runs<kWhole>(dst, src, row + kRows * (ptx::warp_index() & 3), col);
}
template <bool kWhole, int kRows, int kCols>
__device__ __forceinline__ void store_runs(const GlobalView<float>& dst,
                                           const RegTile<float, kRows, kCols>& src, int row,
                                           int col, Location = {}) {
  detail::store_runs<kWhole>(dst, src, row + kRows * (ptx::warp_index() & 3), col);
}

// Two at a time, as a warp does, of any type that tiles have.
template <typename T, int kRows, int kCols>
__device__ __forceinline__ void load_pairs(RegTile<T, kRows, kCols>& dst,
                                           const GlobalView<const T>& src, int row, int col,
                                           Location = {}) {
  detail::load_pairs(dst, src, row + kRows * (ptx::warp_index() & 3), col);
}

// A tile's 16-bit roundings, in its own order, sixteen bytes at a time: rows start at multiples of
// sixteen bytes and are whole runs of eight, and so is `col`.
template <typename T, int kRows, int kCols>
__device__ __forceinline__ void store_rounded(const GlobalView<T>& dst,
                                              const RegTile<float, kRows, kCols>& src, int row,
                                              int col, Location = {}) {
  detail::store_rounded(dst, src, row + kRows * (ptx::warp_index() & 3), col);
}

}  // namespace warpgroup
}  // namespace tk
