// What every tile test shares: arrays as views, scopes by number of warps, results in a stack.
#pragma once

#include "tk/kernel_params.h"
#include "tk/tk.cuh"

namespace tk::tile_test {

// Every kernel that uses shared memory is launched with all of it.
constexpr int kSharedBytes = 227 * 1024;

template <typename Shared>
__device__ __forceinline__ Shared& shared_memory() {
  static_assert(sizeof(Shared) + 1024 <= kSharedBytes, "the block has no more shared memory");
  return block::shared_memory<Shared>();
}

template <typename T>
__device__ __forceinline__ T* data(const KernelParams& params, int buffer) {
  return static_cast<T*>(params.buffers[buffer].data);
}

// The last two dimensions of an array, and of the others the matrix `index`.
template <typename T>
__device__ __forceinline__ GlobalView<T> matrix(const KernelParams& params, int buffer,
                                                int index = 0) {
  const KernelBuffer& array = params.buffers[buffer];
  const int rows = static_cast<int>(array.shape[array.rank - 2]);
  const int cols = static_cast<int>(array.shape[array.rank - 1]);
  return {data<T>(params, buffer) + static_cast<int64>(index) * rows * cols, rows, cols, cols};
}

// All rows of an array of any rank.
template <typename T>
__device__ __forceinline__ GlobalView<T> all_rows(const KernelParams& params, int buffer) {
  const KernelBuffer& array = params.buffers[buffer];
  int rows = 1;
  for (int i = 0; i + 1 < array.rank; ++i) rows *= static_cast<int>(array.shape[i]);
  const int cols = static_cast<int>(array.shape[array.rank - 1]);
  return {data<T>(params, buffer), rows, cols, cols};
}

__device__ __forceinline__ int scalar(const KernelParams& params, int index) {
  return static_cast<int>(params.scalars[index]);
}

// A vector as the tile whose every column, or every row, it is: lanes that disagree are seen.
template <int kCols, int kRows>
__device__ __forceinline__ RegTile<float, kRows, kCols> spread(const PerRow<kRows>& rows) {
  RegTile<float, kRows, kCols> tile;
  warp::zero(tile);
  warp::map_rows(tile, tile, rows, [](float, float x) { return x; });
  return tile;
}
template <int kRows, int kCols>
__device__ __forceinline__ RegTile<float, kRows, kCols> spread(const PerCol<kCols>& cols) {
  RegTile<float, kRows, kCols> tile;
  warp::zero(tile);
  warp::map_cols(tile, tile, cols, [](float, float x) { return x; });
  return tile;
}

// A stack of results: each `put` is the next matrix of the array.
template <typename T>
struct Stack {
  const KernelParams& params;
  int buffer;
  int next = 0;

  template <typename Tile>
  __device__ __forceinline__ void put(const Tile& tile) {
    warp::store(matrix<T>(params, buffer, next++), tile, 0, 0);
  }
};

// Copies of a warp or of a warpgroup, by the number of warps.
template <int kWarps, typename... Args>
__device__ __forceinline__ void load(Args&&... args) {
  if constexpr (kWarps == 1) {
    warp::load(args...);
  } else {
    warpgroup::load(args...);
  }
}
template <int kWarps, typename... Args>
__device__ __forceinline__ void store(Args&&... args) {
  if constexpr (kWarps == 1) {
    warp::store(args...);
  } else {
    warpgroup::store(args...);
  }
}
template <int kWarps, typename... Args>
__device__ __forceinline__ void load_transposed(Args&&... args) {
  if constexpr (kWarps == 1) {
    warp::load_transposed(args...);
  } else {
    warpgroup::load_transposed(args...);
  }
}
template <int kWarps, typename... Args>
__device__ __forceinline__ void store_transposed(Args&&... args) {
  if constexpr (kWarps == 1) {
    warp::store_transposed(args...);
  } else {
    warpgroup::store_transposed(args...);
  }
}

// One thread of the block says yes.
__device__ __forceinline__ bool first_thread() { return warp::index() == 0 && warp::leader(); }

// Every element of an array of any rank becomes `value`, written by one warp, before copies of the
// copy engine that this warp issues.
template <typename T>
__device__ __forceinline__ void fill_array(const KernelParams& params, int buffer, float value) {
  const GlobalView<T> view = all_rows<T>(params, buffer);
  RegTile<T, 16, 16> tile;
  warp::fill(tile, value);
  for (int row = 0; row < view.rows; row += 16) {
    for (int col = 0; col < view.cols; col += 16) warp::store(view, tile, row, col);
  }
  publish_global();
  warp::sync();
}

}  // namespace tk::tile_test
