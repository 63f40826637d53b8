// Asynchronous copies between global and shared memory, issued by one thread.
#pragma once

#include <array>

#include "tk/interpreter/barrier.h"
#include "tk/interpreter/shared_access.h"

namespace tk::tma {

enum class Keep : uint64 { kNormal, kBriefly, kLong };

inline void prefetch(const TensorMap& map, Location at = {}) {
  interpreter::check_tensor_map(map, at);
}

namespace detail_tma {

template <typename View>
interpreter::Panel panel_of(const View& view, int panel) {
  return {view.base + panel * view.kPanelBytes, view.kRows, view.kPanelCols,
          static_cast<int>(sizeof(typename View::T)), view.kSwizzle};
}

// Calls f(panel, coordinates) for every panel of a tile.
template <typename Shared, std::size_t kRank, typename F>
void for_each_panel(const Shared& tile, std::array<int, kRank> coordinates, F&& f) {
  const auto view = tk::detail::as_view(tile);
  for (int panel = 0; panel < view.kPanels; ++panel, coordinates[0] += view.kPanelCols) {
    f(panel_of(view, panel), coordinates);
  }
}

template <typename Shared, std::size_t kRank>
void load(const Shared& dst, const TensorMap& map, Barrier& barrier, uint32 blocks,
          const std::array<int, kRank>& coordinates, Location at) {
  for_each_panel(dst, coordinates, [&](const auto& panel, const auto& place) {
    interpreter::load_box(panel, map, barrier.address(), blocks, place, at);
  });
}
template <typename Shared, std::size_t kRank>
void store(const TensorMap& map, const Shared& src, bool add,
           const std::array<int, kRank>& coordinates, Location at) {
  for_each_panel(src, coordinates, [&](const auto& panel, const auto& place) {
    interpreter::store_box(map, panel, place, add, at);
  });
}

}  // namespace detail_tma

template <typename Shared>
void load(const Shared& dst, const TensorMap& map, Barrier& barrier, Keep, int col, int row,
          Location at = {}) {
  detail_tma::load(dst, map, barrier, 0, std::array{col, row}, at);
}
template <typename Shared>
void load(const Shared& dst, const TensorMap& map, Barrier& barrier, Keep, int col, int row, int z,
          Location at = {}) {
  detail_tma::load(dst, map, barrier, 0, std::array{col, row, z}, at);
}
template <typename Shared>
void load(const Shared& dst, const TensorMap& map, Barrier& barrier, Keep, int col, int row, int z,
          int w, Location at = {}) {
  detail_tma::load(dst, map, barrier, 0, std::array{col, row, z, w}, at);
}
template <typename Shared>
void load_multicast(const Shared& dst, const TensorMap& map, Barrier& barrier, Keep, uint16 blocks,
                    int col, int row, int z, Location at = {}) {
  detail_tma::load(dst, map, barrier, blocks, std::array{col, row, z}, at);
}

template <typename Shared>
void load_multicast(const Shared& dst, const TensorMap& map, Barrier& barrier, Keep, uint16 blocks,
                    int col, int row, int z, int w, Location at = {}) {
  detail_tma::load(dst, map, barrier, blocks, std::array{col, row, z, w}, at);
}

template <typename Shared>
void store(const TensorMap& map, const Shared& src, int col, int row, Location at = {}) {
  detail_tma::store(map, src, false, std::array{col, row}, at);
}
template <typename Shared>
void store(const TensorMap& map, const Shared& src, int col, int row, int z, Location at = {}) {
  detail_tma::store(map, src, false, std::array{col, row, z}, at);
}
template <typename Shared>
void store(const TensorMap& map, const Shared& src, int col, int row, int z, int w,
           Location at = {}) {
  detail_tma::store(map, src, false, std::array{col, row, z, w}, at);
}
template <typename Shared>
void add(const TensorMap& map, const Shared& src, int col, int row, Location at = {}) {
  detail_tma::store(map, src, true, std::array{col, row}, at);
}

template <typename T, int kN>
void load(SharedVec<T, kN>& dst, const T* src, Barrier& barrier, Location at = {}) {
  static_assert(SharedVec<T, kN>::kBytes % 16 == 0, "bulk copies move multiples of 16 bytes");
  interpreter::load_bytes(interpreter::shared_address(dst.data), src, SharedVec<T, kN>::kBytes,
                          barrier.address(), at);
}
template <int kCols>
void store(float* dst, const Fragments<kCols>& src, Location at = {}) {
  interpreter::store_bytes(dst, interpreter::shared_address(src.data), Fragments<kCols>::kBytes,
                           false, at);
}
template <int kCols>
void add(float* dst, const Fragments<kCols>& src, Location at = {}) {
  interpreter::store_bytes(dst, interpreter::shared_address(src.data), Fragments<kCols>::kBytes,
                           true, at);
}

inline void commit(Location at = {}) { interpreter::commit_copies(at); }
template <int kPending>
void wait_read(Location at = {}) {
  interpreter::wait_copies(kPending, true, at);
}
template <int kPending>
void wait(Location at = {}) {
  interpreter::wait_copies(kPending, false, at);
}

}  // namespace tk::tma
