// Asynchronous copies between global and shared memory, issued by one thread.
//
// A tile moves as one box for each of its panels; coordinates count elements, innermost first, and
// are those of the tile's first element. What lies outside the array reads as zero and is not
// written; a load may start before the array's first element, a store or addition may not; and the
// first column is a multiple of 16 bytes (the engine refuses others: illegal instruction). Loads
// complete on a barrier that expects their bytes; stores are waited for in groups.
#pragma once

#include "tk/shared_tile.cuh"
#include "tk/sm90/barrier.cuh"
#include "tk/sm90/ptx/tma.cuh"

namespace tk::tma {

// How long L2 should keep what a load brings, which is runs of 256 bytes: of rows that are shorter,
// the neighbours' too.
enum class Keep : uint64 {
  kNormal = ptx::kEvictNormal,
  kBriefly = ptx::kEvictFirst,  // read once
  kLong = ptx::kEvictLast,      // read again by other blocks
};

__device__ __forceinline__ void prefetch(const TensorMap& map) { ptx::prefetch_tensor_map(&map); }

// Boxes of the map span a panel's columns and the tile's rows.
template <typename Shared, typename... Outer>
__device__ __forceinline__ void load(const Shared& dst, const TensorMap& map, Barrier& barrier,
                                     Keep keep, int col, int row, Outer... outer) {
  const auto view = detail::as_view(dst);
#pragma unroll
  for (int panel = 0; panel < view.kPanels; ++panel) {
    ptx::tma_load(view.base + panel * view.kPanelBytes, &map, barrier.address(),
                  static_cast<uint64>(keep), col + panel * view.kPanelCols, row, outer...);
  }
}

// To the same place in every block of the cluster whose bit is set; completes on each one's
// barrier.
template <typename Shared, typename... Outer>
__device__ __forceinline__ void load_multicast(const Shared& dst, const TensorMap& map,
                                               Barrier& barrier, Keep keep, uint16 blocks, int col,
                                               int row, Outer... outer) {
  const auto view = detail::as_view(dst);
#pragma unroll
  for (int panel = 0; panel < view.kPanels; ++panel) {
    ptx::tma_load_multicast(view.base + panel * view.kPanelBytes, &map, barrier.address(),
                            static_cast<uint64>(keep), blocks, col + panel * view.kPanelCols, row,
                            outer...);
  }
}

template <typename Shared, typename... Outer>
__device__ __forceinline__ void store(const TensorMap& map, const Shared& src, int col, int row,
                                      Outer... outer) {
  const auto view = detail::as_view(src);
#pragma unroll
  for (int panel = 0; panel < view.kPanels; ++panel) {
    ptx::tma_store(&map, view.base + panel * view.kPanelBytes, col + panel * view.kPanelCols, row,
                   outer...);
  }
}
template <typename Shared>
__device__ __forceinline__ void add(const TensorMap& map, const Shared& src, int col, int row) {
  const auto view = detail::as_view(src);
#pragma unroll
  for (int panel = 0; panel < view.kPanels; ++panel) {
    ptx::tma_add(&map, view.base + panel * view.kPanelBytes, col + panel * view.kPanelCols, row);
  }
}

// A vector of consecutive elements; its address is a multiple of 16 bytes.
template <typename T, int kN>
__device__ __forceinline__ void load(SharedVec<T, kN>& dst, const T* src, Barrier& barrier) {
  static_assert(SharedVec<T, kN>::kBytes % 16 == 0, "bulk copies move multiples of 16 bytes");
  ptx::bulk_load(ptx::shared_address(dst.data), src, SharedVec<T, kN>::kBytes, barrier.address());
}
// Fragments to global memory: overwriting it, or adding to it.
template <int kCols>
__device__ __forceinline__ void store(float* dst, const Fragments<kCols>& src) {
  ptx::bulk_store(dst, ptx::shared_address(src.data), Fragments<kCols>::kBytes);
}
template <int kCols>
__device__ __forceinline__ void add(float* dst, const Fragments<kCols>& src) {
  ptx::bulk_add(dst, ptx::shared_address(src.data), Fragments<kCols>::kBytes);
}

__device__ __forceinline__ void commit() { ptx::bulk_commit(); }
// At most kPending groups of this thread still read shared memory.
template <int kPending>
__device__ __forceinline__ void wait_read() {
  ptx::bulk_wait_read<kPending>();
}
// At most kPending groups of this thread are not yet written.
template <int kPending>
__device__ __forceinline__ void wait() {
  ptx::bulk_wait<kPending>();
}

}  // namespace tk::tma
