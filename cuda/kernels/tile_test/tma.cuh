// Boxes of tensor maps: loaded, stored and added, over edges, and to the blocks of a cluster.
#pragma once

#include "kernels/tile_test/common.cuh"

namespace tk::tile_test {

// The coordinates of box `index`, innermost first: a row of an array of int32.
__device__ __forceinline__ const int* coordinates_of(const KernelParams& params, int index) {
  return data<int>(params, 1) + index * static_cast<int>(params.buffers[1].shape[1]);
}

template <int kRank, typename Tile>
__device__ __forceinline__ void load_box(const Tile& tile, const TensorMap& map, Barrier& full,
                                         tma::Keep keep, const int* at) {
  if constexpr (kRank == 2) {
    tma::load(tile, map, full, keep, at[0], at[1]);
  } else if constexpr (kRank == 3) {
    tma::load(tile, map, full, keep, at[0], at[1], at[2]);
  } else {
    tma::load(tile, map, full, keep, at[0], at[1], at[2], at[3]);
  }
}
// Whether a store may start there.
template <int kRank>
__device__ __forceinline__ bool starts_inside(const int* at) {
  bool inside = true;
  for (int i = 0; i < kRank; ++i) inside = inside && at[i] >= 0;
  return inside;
}
template <int kRank, typename Tile>
__device__ __forceinline__ void store_box(const TensorMap& map, const Tile& tile, const int* at) {
  if constexpr (kRank == 2) {
    tma::store(map, tile, at[0], at[1]);
  } else if constexpr (kRank == 3) {
    tma::store(map, tile, at[0], at[1], at[2]);
  } else {
    tma::store(map, tile, at[0], at[1], at[2], at[3]);
  }
}

// Buffers: x; coordinates of boxes; each box as it was loaded; 7s of x's shape, over which every
// box that does not start before x is stored where it came from.
template <typename T, int kRows, int kCols, int kRank>
__device__ __forceinline__ void boxes(const KernelParams& params) {
  using Tile = SharedTile<T, kRows, kCols>;
  struct Shared {
    Tile tile;
    Barrier full;
  };
  Shared& shared = shared_memory<Shared>();
  fill_array<T>(params, 3, 7.0f);
  if (warp::leader()) {
    tma::prefetch(params.maps[0]);
    shared.full.init(1);
    publish_barriers();
    const int count = static_cast<int>(params.buffers[1].shape[0]);
    for (int i = 0; i < count; ++i) {
      const tma::Keep keep = i % 3 == 0   ? tma::Keep::kNormal
                             : i % 3 == 1 ? tma::Keep::kBriefly
                                          : tma::Keep::kLong;
      const int* at = coordinates_of(params, i);
      shared.full.expect(Tile::kBytes);
      load_box<kRank>(shared.tile, params.maps[0], shared.full, keep, at);
      shared.full.wait(i & 1);
      tma::store(params.maps[2], shared.tile, 0, 0, i);
      if (starts_inside<kRank>(at)) store_box<kRank>(params.maps[3], shared.tile, at);
      tma::commit();
      tma::wait_read<0>();
    }
    tma::wait<0>();
  }
  warp::sync();
}

// Buffers: x; coordinates of boxes, none before x; 1s of x's shape, to which every box is added
// twice.
template <typename T, int kRows, int kCols>
__device__ __forceinline__ void added_boxes(const KernelParams& params) {
  using Tile = SharedTile<T, kRows, kCols>;
  struct Shared {
    Tile tile;
    Barrier full;
  };
  Shared& shared = shared_memory<Shared>();
  fill_array<T>(params, 2, 1.0f);
  if (warp::leader()) {
    shared.full.init(1);
    publish_barriers();
    const int count = static_cast<int>(params.buffers[1].shape[0]);
    for (int i = 0; i < count; ++i) {
      const int* at = coordinates_of(params, i);
      shared.full.expect(Tile::kBytes);
      tma::load(shared.tile, params.maps[0], shared.full, tma::Keep::kNormal, at[0], at[1]);
      shared.full.wait(i & 1);
      for (int repeat = 0; repeat < 2; ++repeat) {
        tma::add(params.maps[2], shared.tile, at[0], at[1]);
        tma::commit();
      }
      tma::wait_read<0>();
    }
    tma::wait<0>();
  }
  warp::sync();
}

// A cluster of two blocks for each matrix of x, [n, rows, cols] or [n, 1, rows, cols]: each loads
// half of the rows, to both. Buffers: x; and for every block the matrix it got.
template <typename T, int kRows, int kCols, int kRank>
__device__ __forceinline__ void multicast(const KernelParams& params) {
  using Tile = SharedTile<T, kRows, kCols>;
  struct Shared {
    Tile tile;
    Barrier full, met;
  };
  Shared& shared = shared_memory<Shared>();
  const int rank = cluster::rank(), block = grid::block_x();
  if (warp::leader()) {
    shared.full.init(1);
    shared.met.init(1);
    publish_barriers();
    shared.full.expect(Tile::kBytes);
  }
  warp::sync();
  cluster::sync();
  if (warp::leader()) {
    const auto rows = shared.tile.template rows<kRows / 2>(rank);
    const int first = rank * (kRows / 2), matrix = block / 2;
    if constexpr (kRank == 3) {
      tma::load_multicast(rows, params.maps[0], shared.full, tma::Keep::kNormal, 3, 0, first,
                          matrix);
    } else {
      tma::load_multicast(rows, params.maps[0], shared.full, tma::Keep::kNormal, 3, 0, first, 0,
                          matrix);
    }
    shared.met.arrive_remote(rank ^ 1);
    shared.full.wait(0);
    shared.met.wait(0);
    tma::store(params.maps[1], shared.tile, 0, 0, block);
    tma::commit();
    tma::wait_read<0>();
  }
  warp::sync();
  cluster::sync();
}

}  // namespace tk::tile_test
