// Copies that threads do: registers, shared memory, global memory.
//
// What lies in shared memory is brought there or taken away by the copy engine, so that a layout is
// tested against the hardware and not against itself.
#pragma once

#include "kernels/tile_test/common.cuh"

namespace tk::tile_test {

template <typename T, int kRows, int kCols>
struct TransposedTile {
  using Type = SharedTile<T, kCols, kRows>;
};
template <int kRows, int kCols>
struct TransposedTile<float, kRows, kCols> {
  using Type = SharedTile<float, kRows, kCols>;  // not used
};

// A tile of one warp (kWarps = 1) or of a warpgroup (4). Buffers: x; then x through shared memory
// by a store, by a load, by views of rows and columns one way and the other, in registers of
// another type, and transposed by a store and by a load (16-bit values only).
template <typename T, int kRows, int kCols, int kWarps>
__device__ __forceinline__ void shared_copies(const KernelParams& params) {
  using Tile = SharedTile<T, kRows, kCols>;
  using Transposed = typename TransposedTile<T, kRows, kCols>::Type;
  struct Shared {
    Tile in, stored, by_rows, by_cols, other;
    Transposed transposed;
    Barrier full;
  };
  constexpr int kWarpRows = kRows / kWarps;
  constexpr int kPanelCols = Tile::View::kPanelCols;
  Shared& shared = shared_memory<Shared>();
  if (first_thread()) {
    shared.full.init(1);
    publish_barriers();
    shared.full.expect(Tile::kBytes);
    tma::load(shared.in, params.maps[0], shared.full, tma::Keep::kNormal, 0, 0);
  }
  block::sync();
  shared.full.wait(0);

  RegTile<T, kWarpRows, kCols> x;
  load<kWarps>(x, matrix<T>(params, 0), 0, 0);
  store<kWarps>(shared.stored, x);
  RegTile<T, kWarpRows, kCols> y;
  load<kWarps>(y, shared.in);
  store<kWarps>(matrix<T>(params, 2), y, 0, 0);

  // Sixteen rows of one panel at a time, then whole columns of one panel or two.
  if (warp::index() == 0) {
    for (int i = 0; i < kRows / 16; ++i) {
      for (int j = 0; j < kCols / kPanelCols; ++j) {
        RegTile<T, 16, kPanelCols> part;
        warp::load(part, shared.in.template rows<16>(i).template cols<kPanelCols>(j));
        warp::store(shared.by_rows.template cols<kPanelCols>(j).template rows<16>(i), part);
      }
    }
  }
  constexpr int kPartCols = Tile::View::kPanels % 4 == 0 ? 2 * kPanelCols : kPanelCols;
  for (int j = 0; j < kCols / kPartCols; ++j) {
    RegTile<T, kWarpRows, kPartCols> part;
    load<kWarps>(part, shared.in.template cols<kPartCols>(j));
    store<kWarps>(shared.by_cols.template cols<kPartCols>(j), part);
  }

  if constexpr (kIsHalf<T>) {
    RegTile<float, kWarpRows, kCols> wide;
    load<kWarps>(wide, shared.in);
    if constexpr (kWarps == 1) {
      warp::store(shared.other, wide);
    } else {
      warpgroup::store_afresh(shared.other, wide);
    }
    store_transposed<kWarps>(shared.transposed, wide);
  } else {
    RegTile<bf16, kWarpRows, kCols> narrow;
    load<kWarps>(narrow, shared.in);
    store<kWarps>(shared.other, narrow);
  }
  publish_shared();
  block::sync();
  if (first_thread()) {
    tma::store(params.maps[1], shared.stored, 0, 0);
    tma::store(params.maps[3], shared.by_rows, 0, 0);
    tma::store(params.maps[4], shared.by_cols, 0, 0);
    tma::store(params.maps[5], shared.other, 0, 0);
    if constexpr (kIsHalf<T>) tma::store(params.maps[6], shared.transposed, 0, 0);
    tma::commit();
    tma::wait_read<0>();
  }
  if constexpr (kIsHalf<T>) {
    // Back again: the transpose of the transposed tile.
    load_transposed<kWarps>(y, shared.transposed);
    store<kWarps>(matrix<T>(params, 7), y, 0, 0);
  }
}

// A value for each of 32 rows and 64 columns, by one warp.
template <typename T>
__device__ __forceinline__ void shared_vectors(const KernelParams& params) {
  struct Shared {
    SharedVec<float, 32> rows, rows_out;
    SharedVec<float, 64> cols, cols_out;
    Barrier full;
  };
  Shared& shared = shared_memory<Shared>();
  if (warp::leader()) {
    shared.full.init(1);
    publish_barriers();
    shared.full.expect(SharedVec<float, 32>::kBytes + SharedVec<float, 64>::kBytes);
    tma::load(shared.rows, static_cast<const float*>(data<float>(params, 0)), shared.full);
    tma::load(shared.cols, static_cast<const float*>(data<float>(params, 1)), shared.full);
  }
  warp::sync();
  shared.full.wait(0);

  Stack<float> out{params, 3};
  PerRow<32> rows;
  PerCol<64> cols;
  warp::load(rows, shared.rows);
  warp::load(cols, shared.cols);
  RegTile<float, 32, 64> tile;
  warp::outer(tile, rows, cols, [](float r, float c) { return r - c; });
  out.put(tile);

  const auto twice = [](float x) { return 2.0f * x; };
  warp::map(rows, rows, twice);
  warp::map(cols, cols, twice);
  warp::store(shared.rows_out, rows);
  warp::store(shared.cols_out, cols);
  warp::sync();
  warp::zero(rows);
  warp::zero(cols);
  warp::load(rows, shared.rows_out);
  warp::load(cols, shared.cols_out);
  out.put(spread<64>(rows));
  out.put(spread<32>(cols));

  RegTile<T, 32, 64> x;
  warp::load(x, matrix<T>(params, 2), 0, 0);
  warp::map_cols(tile, x, shared.cols, [](float u, float c) { return c - 2.0f * u; });
  out.put(tile);
  RegTile<T, 32, 64> doubled;
  warp::map(doubled, x, twice);
  warp::zip_cols(tile, doubled, x, shared.cols,
                 [](float d, float u, float c) { return c > 0 ? d : u; });
  out.put(tile);
  warp::zip_cols_twice(tile, doubled, x, doubled, shared.cols,
                       [](float u, float d, float c, float& first, float& second) {
                         first = c - u;
                         second = d + u;
                       });
  out.put(tile);
  warp::convert(tile, doubled), out.put(tile);

  // The second half of one vector takes the first one's place in another.
  warp::load(rows, part<32>(shared.cols, 1));
  warp::store(part<32>(shared.cols_out, 0), rows);
  warp::sync();
  warp::load(cols, shared.cols_out);
  out.put(spread<64>(rows));
  out.put(spread<32>(cols));
}

// A warpgroup's 64 x 48 tile at (scalar 0, scalar 1) of an array. Buffers: x; a vector of pairs;
// then the tile of x and that of x transposed (zero outside); 7s with the tile written at its
// place, and transposed; the pairs' second numbers from scalar 0 on (scalar 2 outside), and 7s with
// those as the pairs' first numbers.
template <typename T>
__device__ __forceinline__ void global_copies(const KernelParams& params) {
  const int row = scalar(params, 0), col = scalar(params, 1);
  const float missing = params.scalars[2];
  const GlobalView<T> x_gmem = matrix<T>(params, 0);
  const GlobalView<const T> transposed_gmem{x_gmem.data, x_gmem.cols, x_gmem.rows, 1, x_gmem.cols};
  if (warp::index() == 0) {
    fill_array<T>(params, 4, 7.0f);
    fill_array<T>(params, 5, 7.0f);
    fill_array<T>(params, 7, 7.0f);
  }
  block::sync();

  RegTile<T, 16, 48> x;
  warpgroup::load(x, x_gmem, row, col);
  warpgroup::store(matrix<float>(params, 2), x, 0, 0);
  warpgroup::store(matrix<T>(params, 4), x, row, col);
  const GlobalView<T> by_cols = matrix<T>(params, 5);
  warpgroup::store(GlobalView<T>{by_cols.data, by_cols.cols, by_cols.rows, 1, by_cols.cols}, x, row,
                   col);
  RegTile<float, 16, 48> wide;
  warpgroup::load(wide, transposed_gmem, row, col);
  warpgroup::store(matrix<float>(params, 3), wide, 0, 0);

  PerRow<16> values;
  const int size = static_cast<int>(params.buffers[1].shape[0]);
  warpgroup::load(values, GlobalVec<const T>{data<T>(params, 1) + 1, size, 2}, row, missing);
  warpgroup::store(matrix<float>(params, 6), spread<16>(values), 0, 0);
  warpgroup::store(GlobalVec<T>{data<T>(params, 7), size, 2}, values, row);
}

// A value for each of a warp's 16 rows. Buffers: a vector of pairs; their second numbers from
// scalar 0 on (scalar 1 outside), one a row; 7s with those as the pairs' first numbers.
template <typename T>
__device__ __forceinline__ void global_vectors(const KernelParams& params) {
  const int first = scalar(params, 0);
  const int size = static_cast<int>(params.buffers[0].shape[0]);
  fill_array<T>(params, 2, 7.0f);
  warp::sync();
  PerRow<16> values;
  warp::load(values, GlobalVec<const T>{data<T>(params, 0) + 1, size, 2}, first, params.scalars[1]);
  warp::store(matrix<float>(params, 1), spread<16>(values), 0, 0);
  warp::store(GlobalVec<T>{data<T>(params, 2), size, 2}, values, first);
}

// Buffers: integers; of the last of them and of the first low and high halves and, for the last,
// numbers of its highest and lowest bit and of how many it has: one number a column.
template <typename T>
__device__ __forceinline__ void scalar_loads(const KernelParams& params) {
  const T* x = data<const T>(params, 0);
  const int last = load_scalar(x + params.buffers[0].shape[0] - 1), first = load_scalar(x);
  RegTile<float, 16, 16> tile;
  warp::zero(tile);
  warp::for_each(tile, [=](int, int col, float) {
    const int numbers[] = {last & 0xffff,           last >> 16,
                           first & 0xffff,          first >> 16,
                           math::highest_bit(last), math::lowest_bit(last),
                           math::count_bits(last),  0};
    return static_cast<float>(numbers[col & 7]);
  });
  warp::store(matrix<float>(params, 1), tile, 0, 0);
}

// Fragments of x and y (64 x kCols). Buffers: x, y; x's fragments with y's added; x + y; y's
// fragments; y.
template <int kCols>
__device__ __forceinline__ void fragments(const KernelParams& params) {
  struct Shared {
    Fragments<kCols> y;
  };
  Shared& shared = shared_memory<Shared>();
  float* sums = data<float>(params, 2);
  float* copies = data<float>(params, 4);
  RegTile<float, 16, kCols> x, y;
  warpgroup::load(x, matrix<float>(params, 0), 0, 0);
  warpgroup::load(y, matrix<float>(params, 1), 0, 0);
  warpgroup::store_fragments(sums, x);
  publish_global();
  warpgroup::store(shared.y, y);
  publish_shared();
  warpgroup::sync();
  if (warpgroup::leader()) {
    tma::add(sums, shared.y);
    tma::store(copies, shared.y);
    tma::commit();
    tma::wait<0>();
  }
  warpgroup::sync();
  warpgroup::load_fragments(x, sums);
  warpgroup::load_fragments(y, copies);
  warpgroup::store(matrix<float>(params, 3), x, 0, 0);
  warpgroup::store(matrix<float>(params, 5), y, 0, 0);
}

// A warpgroup's 64 x kCols tile of floats, twice it plus a shared tile of another type. Buffers: x
// of that type, y; the sum.
template <typename T, int kCols>
__device__ __forceinline__ void zip_shared(const KernelParams& params) {
  struct Shared {
    SharedTile<T, 64, kCols> x_smem;
  };
  auto& x_smem = shared_memory<Shared>().x_smem;
  RegTile<T, 16, kCols> x;
  warpgroup::load(x, matrix<T>(params, 0), 0, 0);
  warpgroup::store(x_smem, x);
  warpgroup::sync();
  RegTile<float, 16, kCols> y;
  warpgroup::load(y, matrix<float>(params, 1), 0, 0);
  warpgroup::zip_shared(y, x_smem, [](float y, float x) { return 2.0f * y + x; });
  warpgroup::store(matrix<float>(params, 2), y, 0, 0);
}

}  // namespace tk::tile_test
