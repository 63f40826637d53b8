// Moves between registers, shared memory and global memory that threads do themselves.
#pragma once

#include "tk/global_view.cuh"
#include "tk/interpreter/map.h"
#include "tk/interpreter/shared_access.h"

namespace tk {
namespace detail {

// A warp's tile from and to rows first_row.. of a shared tile, or columns where kTransposed.
template <bool kTransposed, typename Dst, typename View>
void load_shared(Dst& dst, const View& src, int first, Location at) {
  using T = typename Dst::T;
  const auto chunks = kTransposed ? interpreter::chunks_of(src, 0, Dst::kCols, first, Dst::kRows)
                                  : interpreter::chunks_of(src, first, Dst::kRows, 0, Dst::kCols);
  interpreter::read_shared(chunks, "loads a tile from shared memory", at);
  writing(dst, at);
  for (int r = 0; r < Dst::kRows; ++r) {
    for (int c = 0; c < Dst::kCols; ++c) {
      const auto& x = kTransposed ? interpreter::element(src, c, first + r)
                                  : interpreter::element(src, first + r, c);
      dst.data[r][c] = interpreter::from_float<T>(interpreter::to_float(x));
    }
  }
}
template <bool kTransposed, typename View, typename Src>
void store_shared(const View& dst, const Src& src, int first, Location at) {
  using T = typename View::T;
  reading(src, at);
  const auto chunks = kTransposed ? interpreter::chunks_of(dst, 0, Src::kCols, first, Src::kRows)
                                  : interpreter::chunks_of(dst, first, Src::kRows, 0, Src::kCols);
  interpreter::write_shared(chunks, "stores a tile to shared memory", at);
  for (int r = 0; r < Src::kRows; ++r) {
    for (int c = 0; c < Src::kCols; ++c) {
      auto& x = kTransposed ? interpreter::element(dst, c, first + r)
                            : interpreter::element(dst, first + r, c);
      x = interpreter::from_float<T>(interpreter::to_float(src.data[r][c]));
    }
  }
}

template <typename Dst, typename T>
void load_global(Dst& dst, const GlobalView<T>& src, int first_row, int first_col, Location at) {
  interpreter::act_as_warp();
  writing(dst, at);
  for (int r = 0; r < Dst::kRows; ++r) {
    for (int c = 0; c < Dst::kCols; ++c) {
      const int row = first_row + r, col = first_col + c;
      float x = 0.0f;
      if (row < src.rows && col < src.cols) {
        interpreter::read_global(src.at(row, col), sizeof(T), at);
        x = interpreter::to_float(*src.at(row, col));
      }
      dst.data[r][c] = interpreter::from_float<typename Dst::T>(x);
    }
  }
}
template <typename T, typename Src>
void store_global(const GlobalView<T>& dst, const Src& src, int first_row, int first_col,
                  Location at) {
  interpreter::act_as_warp();
  reading(src, at);
  for (int r = 0; r < Src::kRows; ++r) {
    for (int c = 0; c < Src::kCols; ++c) {
      const int row = first_row + r, col = first_col + c;
      if (row >= dst.rows || col >= dst.cols) continue;
      interpreter::write_global(dst.at(row, col), sizeof(T), at);
      *dst.at(row, col) = interpreter::from_float<T>(interpreter::to_float(src.data[r][c]));
    }
  }
}

template <typename T, int kN>
interpreter::Chunks chunks_of_vector(const SharedVec<T, kN>& vector) {
  return interpreter::chunks_of(interpreter::shared_address(vector.data), vector.kBytes);
}

inline int warp_of_group() { return interpreter::warp_index() & 3; }

}  // namespace detail

namespace warp {

template <typename T, int kRows, int kCols, typename Shared>
void load(RegTile<T, kRows, kCols>& dst, const Shared& src, Location at = {}) {
  static_assert(Shared::kRows == kRows && Shared::kCols == kCols, "load needs tiles of one shape");
  detail::load_shared<false>(dst, detail::as_view(src), 0, at);
}
template <typename Shared, typename T, int kRows, int kCols>
void store(const Shared& dst, const RegTile<T, kRows, kCols>& src, Location at = {}) {
  static_assert(Shared::kRows == kRows && Shared::kCols == kCols, "store needs tiles of one shape");
  detail::store_shared<false>(detail::as_view(dst), src, 0, at);
}
template <typename T, int kRows, int kCols, typename Shared>
void load_transposed(RegTile<T, kRows, kCols>& dst, const Shared& src, Location at = {}) {
  static_assert(Shared::kRows == kCols && Shared::kCols == kRows,
                "load_transposed needs the transposed shape");
  detail::load_shared<true>(dst, detail::as_view(src), 0, at);
}
template <typename Shared, typename T, int kRows, int kCols>
void store_transposed(const Shared& dst, const RegTile<T, kRows, kCols>& src, Location at = {}) {
  static_assert(Shared::kRows == kCols && Shared::kCols == kRows,
                "store_transposed needs the transposed shape");
  detail::store_shared<true>(detail::as_view(dst), src, 0, at);
}

template <typename T, int kRows, int kCols, typename U>
void load(RegTile<T, kRows, kCols>& dst, const GlobalView<U>& src, int row, int col,
          Location at = {}) {
  detail::load_global(dst, src, row, col, at);
}
template <typename U, typename T, int kRows, int kCols>
void store(const GlobalView<U>& dst, const RegTile<T, kRows, kCols>& src, int row, int col,
           Location at = {}) {
  detail::store_global(dst, src, row, col, at);
}

template <int kN>
void load(PerRow<kN>& dst, const SharedVec<float, kN>& src, Location at = {}) {
  interpreter::read_shared(detail::chunks_of_vector(src), "loads a vector from shared memory", at);
  detail::writing(dst, at);
  detail_map::assign_vector(dst, [&](int i, int) { return src.data[i]; });
}
template <int kN>
void load(PerCol<kN>& dst, const SharedVec<float, kN>& src, Location at = {}) {
  interpreter::read_shared(detail::chunks_of_vector(src), "loads a vector from shared memory", at);
  detail::writing(dst, at);
  detail_map::assign_vector(dst, [&](int i, int) { return src.data[i]; });
}
template <typename Dst, typename Src, int kN, typename F>
void map_cols(Dst& dst, const Src& src, const SharedVec<float, kN>& cols, F&& f, Location at = {}) {
  PerCol<kN> values;
  load(values, cols, at);
  map_cols(dst, src, values, f, at);
}
template <int kN>
void store(SharedVec<float, kN>& dst, const PerRow<kN>& src, Location at = {}) {
  detail::leaving(src, at);
  interpreter::write_shared(detail::chunks_of_vector(dst), "stores a vector to shared memory", at);
  for (int i = 0; i < kN; ++i) dst.data[i] = src.data[i][0];
}
template <int kN>
void store(SharedVec<float, kN>& dst, const PerCol<kN>& src, Location at = {}) {
  detail::leaving(src, at);
  interpreter::write_shared(detail::chunks_of_vector(dst), "stores a vector to shared memory", at);
  for (int i = 0; i < kN; ++i) dst.data[i] = src.data[i][0];
}

}  // namespace warp

namespace warpgroup {

template <typename T, int kRows, int kCols, typename Shared>
void load(RegTile<T, kRows, kCols>& dst, const Shared& src, Location at = {}) {
  static_assert(Shared::kRows == 4 * kRows && Shared::kCols == kCols,
                "a warpgroup loads four times the rows of a warp's tile");
  detail::load_shared<false>(dst, detail::as_view(src), kRows * detail::warp_of_group(), at);
}
template <typename Shared, typename T, int kRows, int kCols>
void store(const Shared& dst, const RegTile<T, kRows, kCols>& src, Location at = {}) {
  static_assert(Shared::kRows == 4 * kRows && Shared::kCols == kCols,
                "a warpgroup stores four times the rows of a warp's tile");
  detail::store_shared<false>(detail::as_view(dst), src, kRows * detail::warp_of_group(), at);
}
template <typename T, int kRows, int kCols, typename Shared>
void load_transposed(RegTile<T, kRows, kCols>& dst, const Shared& src, Location at = {}) {
  static_assert(Shared::kRows == kCols && Shared::kCols == 4 * kRows,
                "load_transposed needs the transposed shape");
  detail::load_shared<true>(dst, detail::as_view(src), kRows * detail::warp_of_group(), at);
}
template <typename Shared, typename T, int kRows, int kCols>
void store_transposed(const Shared& dst, const RegTile<T, kRows, kCols>& src, Location at = {}) {
  static_assert(Shared::kRows == kCols && Shared::kCols == 4 * kRows,
                "store_transposed needs the transposed shape");
  detail::store_shared<true>(detail::as_view(dst), src, kRows * detail::warp_of_group(), at);
}

template <typename T, int kRows, int kCols, typename U>
void load(RegTile<T, kRows, kCols>& dst, const GlobalView<U>& src, int row, int col,
          Location at = {}) {
  detail::load_global(dst, src, row + kRows * detail::warp_of_group(), col, at);
}
template <typename U, typename T, int kRows, int kCols>
void store(const GlobalView<U>& dst, const RegTile<T, kRows, kCols>& src, int row, int col,
           Location at = {}) {
  detail::store_global(dst, src, row + kRows * detail::warp_of_group(), col, at);
}

template <typename T, int kN>
void store(const GlobalVec<T>& dst, const PerRow<kN>& src, int first, Location at = {}) {
  interpreter::act_as_warp();
  detail::leaving(src, at);
  first += kN * detail::warp_of_group();
  for (int i = 0; i < kN; ++i) {
    if (first + i >= dst.size) continue;
    interpreter::write_global(dst.at(first + i), sizeof(T), at);
    *dst.at(first + i) = interpreter::from_float<T>(src.data[i][0]);
  }
}
template <int kN, typename T>
void load(PerRow<kN>& dst, const GlobalVec<T>& src, int first, float missing, Location at = {}) {
  interpreter::act_as_warp();
  detail::writing(dst, at);
  first += kN * detail::warp_of_group();
  for (int i = 0; i < kN; ++i) {
    float x = missing;
    if (first + i < src.size) {
      interpreter::read_global(src.at(first + i), sizeof(T), at);
      x = interpreter::to_float(*src.at(first + i));
    }
    for (float& part : dst.data[i]) part = x;
  }
}

namespace detail_fragments {
// Calls f(row, col, place) for every value of a warp's tile: `place` is where it lies in fragments.
// Each thread's registers make runs of four, a run of every thread after another.
template <int kCols, typename F>
void for_each_place(F&& f) {
  for (int run = 0; run < kCols / 8; ++run) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int e = 0; e < 4; ++e) {
        f((lane >> 2) + 8 * (e >> 1), 8 * run + 2 * (lane & 3) + (e & 1),
          4 * (128 * run + 32 * detail::warp_of_group() + lane) + e);
      }
    }
  }
}
// Runs of a warp are 512 bytes one after another.
template <int kCols, typename F>
void for_each_run(F&& f) {
  for (int run = 0; run < kCols / 8; ++run) {
    f(4 * (128 * run + 32 * detail::warp_of_group()), 512);
  }
}
}  // namespace detail_fragments

template <int kCols>
void store(Fragments<kCols>& dst, const RegTile<float, 16, kCols>& src, Location at = {}) {
  detail::reading(src, at);
  interpreter::Chunks chunks;
  detail_fragments::for_each_run<kCols>([&](int first, int bytes) {
    const auto run = interpreter::chunks_of(interpreter::shared_address(dst.data + first), bytes);
    chunks.insert(chunks.end(), run.begin(), run.end());
  });
  interpreter::write_shared(chunks, "stores fragments to shared memory", at);
  detail_fragments::for_each_place<kCols>(
      [&](int row, int col, int place) { dst.data[place] = src.data[row][col]; });
}
template <int kCols>
void load_fragments(RegTile<float, 16, kCols>& dst, const float* src, Location at = {}) {
  interpreter::act_as_warp();
  detail::writing(dst, at);
  detail_fragments::for_each_run<kCols>(
      [&](int first, int bytes) { interpreter::read_global(src + first, bytes, at); });
  detail_fragments::for_each_place<kCols>(
      [&](int row, int col, int place) { dst.data[row][col] = src[place]; });
}
template <int kCols>
void store_fragments(float* dst, const RegTile<float, 16, kCols>& src, Location at = {}) {
  interpreter::act_as_warp();
  detail::reading(src, at);
  detail_fragments::for_each_run<kCols>(
      [&](int first, int bytes) { interpreter::write_global(dst + first, bytes, at); });
  detail_fragments::for_each_place<kCols>(
      [&](int row, int col, int place) { dst[place] = src.data[row][col]; });
}

}  // namespace warpgroup

inline void publish_shared(Location at = {}) { interpreter::publish_shared(at); }
// Copies meet ordinary stores to global memory only across launches and turns, which order them.
inline void publish_global(Location = {}) {}

}  // namespace tk
