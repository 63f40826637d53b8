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

// What a tile's rows or columns, whichever lie together, take of an array.
template <typename T>
std::vector<interpreter::GlobalSpan> spans_of(const GlobalView<T>& view, int first_row, int rows,
                                              int first_col, int cols) {
  rows = min(rows, view.rows - first_row);
  cols = min(cols, view.cols - first_col);
  std::vector<interpreter::GlobalSpan> spans;
  if (rows <= 0 || cols <= 0) return spans;
  if (view.col_stride == 1) {
    for (int r = 0; r < rows; ++r) {
      spans.push_back({view.at(first_row + r, first_col), cols * sizeof(T)});
    }
  } else if (view.row_stride == 1) {
    for (int c = 0; c < cols; ++c) {
      spans.push_back({view.at(first_row, first_col + c), rows * sizeof(T)});
    }
  } else {
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < cols; ++c) {
        spans.push_back({view.at(first_row + r, first_col + c), sizeof(T)});
      }
    }
  }
  return spans;
}
template <typename T>
std::vector<interpreter::GlobalSpan> spans_of(const GlobalVec<T>& view, int first, int count) {
  return spans_of(GlobalView<T>{view.data, view.size, 1, view.stride, 1}, first, count, 0, 1);
}

template <typename Dst, typename T>
void load_global(Dst& dst, const GlobalView<T>& src, int first_row, int first_col, Location at) {
  interpreter::read_global(spans_of(src, first_row, Dst::kRows, first_col, Dst::kCols), at);
  writing(dst, at);
  for (int r = 0; r < Dst::kRows; ++r) {
    for (int c = 0; c < Dst::kCols; ++c) {
      const int row = first_row + r, col = first_col + c;
      const bool inside = row < src.rows && col < src.cols;
      const float x = inside ? interpreter::to_float(*src.at(row, col)) : 0.0f;
      dst.data[r][c] = interpreter::from_float<typename Dst::T>(x);
    }
  }
}
template <typename T, typename Src>
void store_global(const GlobalView<T>& dst, const Src& src, int first_row, int first_col,
                  Location at) {
  interpreter::act_as_warp();
  reading(src, at);
  const auto store = [&] {
    for (int r = 0; r < min(Src::kRows, dst.rows - first_row); ++r) {
      for (int c = 0; c < min(Src::kCols, dst.cols - first_col); ++c) {
        *dst.at(first_row + r, first_col + c) =
            interpreter::from_float<T>(interpreter::to_float(src.data[r][c]));
      }
    }
  };
  interpreter::write_global(spans_of(dst, first_row, Src::kRows, first_col, Src::kCols), store, at);
}

template <typename T, int kN>
interpreter::Chunks chunks_of_vector(const SharedVec<T, kN>& vector) {
  return interpreter::chunks_of(interpreter::shared_address(vector.data), vector.kBytes);
}

inline int warp_of_group() { return interpreter::warp_index() & 3; }

// Of elements from `first` on; of a warp's share of a warpgroup's rows from there on.
template <typename T>
void before_reads(const GlobalVec<T>& view, int first, int count, Location at) {
  interpreter::read_global(spans_of(view, first, count), at);
}
template <int kRows, typename T>
void before_group_reads(const GlobalVec<T>& view, int first_row, Location at) {
  before_reads(view, first_row + kRows * warp_of_group(), kRows, at);
}

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
template <typename Dst, typename A, typename B, int kN, typename F>
void zip_cols(Dst& dst, const A& a, const B& b, const SharedVec<float, kN>& cols, F&& f,
              Location at = {}) {
  static_assert(detail::kSameShape<Dst, A> && detail::kSameShape<Dst, B> && Dst::kCols == kN,
                "zip_cols needs tiles of one shape and a value for each column");
  PerCol<kN> values;
  load(values, cols, at);
  detail::reading(a, at);
  detail::reading(b, at);
  detail::writing(dst, at);
  detail_map::assign(dst, [&](int r, int c) {
    return f(detail_map::value(a, r, c), detail_map::value(b, r, c),
             values.data[c][detail::part_of_row(r)]);
  });
}
template <typename X, typename Y, typename A, typename B, int kN, typename F>
void zip_cols_twice(X& x, Y& y, const A& a, const B& b, const SharedVec<float, kN>& cols, F&& f,
                    Location at = {}) {
  static_assert(detail::kSameShape<X, A> && detail::kSameShape<X, B> && detail::kSameShape<X, Y> &&
                    X::kCols == kN,
                "zip_cols_twice needs tiles of one shape and a value for each column");
  PerCol<kN> values;
  load(values, cols, at);
  detail::reading(a, at);
  detail::reading(b, at);
  detail::writing(x, at);
  detail::writing(y, at);
  for (int r = 0; r < X::kRows; ++r) {
    for (int c = 0; c < X::kCols; ++c) {
      float x_value, y_value;
      f(detail_map::value(a, r, c), detail_map::value(b, r, c),
        values.data[c][detail::part_of_row(r)], x_value, y_value);
      x.data[r][c] = interpreter::from_float<typename X::T>(x_value);
      y.data[r][c] = interpreter::from_float<typename Y::T>(y_value);
    }
  }
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

template <typename T, int kN>
void store(const GlobalVec<T>& dst, const PerRow<kN>& src, int first, Location at = {}) {
  interpreter::act_as_warp();
  detail::leaving(src, at);
  const auto store = [&] {
    for (int i = 0; i < min(kN, dst.size - first); ++i) {
      *dst.at(first + i) = interpreter::from_float<T>(src.data[i][0]);
    }
  };
  interpreter::write_global(detail::spans_of(dst, first, kN), store, at);
}
template <int kN, typename T>
void load(PerRow<kN>& dst, const GlobalVec<T>& src, int first, float missing, Location at = {}) {
  interpreter::read_global(detail::spans_of(src, first, kN), at);
  detail::writing(dst, at);
  for (int i = 0; i < kN; ++i) {
    const float x = first + i < src.size ? interpreter::to_float(*src.at(first + i)) : missing;
    for (float& part : dst.data[i]) part = x;
  }
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
template <typename Shared, typename T, int kRows, int kCols>
void store_afresh(const Shared& dst, const RegTile<T, kRows, kCols>& src, Location at = {}) {
  store(dst, src, at);
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

template <typename Tile, typename Shared, typename F>
void zip_shared(Tile& tile, const Shared& src, F&& f, Location at = {}) {
  RegTile<typename Shared::T, Tile::kRows, Tile::kCols> loaded;
  load(loaded, src, at);
  warp::zip(tile, tile, loaded, f, at);
}

template <typename Tile, typename T, typename F>
void zip_global(Tile& tile, const GlobalView<const T>& src, int first_row, int first_col, F&& f,
                Location at = {}) {
  const int warp_row = first_row + Tile::kRows * detail::warp_of_group();
  interpreter::read_global(detail::spans_of(src, warp_row, Tile::kRows, first_col, Tile::kCols),
                           at);
  for_each(
      tile,
      [&](int row, int col, float x) {
        row += first_row;
        col += first_col;
        const T element = row < src.rows && col < src.cols ? *src.at(row, col) : T{};
        if constexpr (kSame<T, uint8>) {
          return f(x, element);
        } else {
          return f(x, interpreter::to_float(element));
        }
      },
      at);
}

template <typename T, int kN>
void store(const GlobalVec<T>& dst, const PerRow<kN>& src, int first, Location at = {}) {
  warp::store(dst, src, first + kN * detail::warp_of_group(), at);
}
template <int kN, typename T>
void load(PerRow<kN>& dst, const GlobalVec<T>& src, int first, float missing, Location at = {}) {
  warp::load(dst, src, first + kN * detail::warp_of_group(), missing, at);
}

template <int kN, int kAll>
void load(PerRow<kN>& dst, const SharedVec<float, kAll>& src, Location at = {}) {
  static_assert(kAll == 4 * kN, "a warpgroup loads four times the rows of a warp's tile");
  interpreter::read_shared(detail::chunks_of_vector(src), "loads a vector from shared memory", at);
  detail::writing(dst, at);
  const int first = kN * detail::warp_of_group();
  warp::detail_map::assign_vector(dst, [&](int i, int) { return src.data[first + i]; });
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
template <int kCols>
std::vector<interpreter::GlobalSpan> spans_of(const float* fragments) {
  std::vector<interpreter::GlobalSpan> spans;
  for_each_run<kCols>([&](int first, int bytes) {
    spans.push_back({fragments + first, static_cast<std::size_t>(bytes)});
  });
  return spans;
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
  interpreter::read_global(detail_fragments::spans_of<kCols>(src), at);
  detail::writing(dst, at);
  detail_fragments::for_each_place<kCols>(
      [&](int row, int col, int place) { dst.data[row][col] = src[place]; });
}
template <int kCols>
void store_fragments(float* dst, const RegTile<float, 16, kCols>& src, Location at = {}) {
  interpreter::act_as_warp();
  detail::reading(src, at);
  const auto store = [&] {
    detail_fragments::for_each_place<kCols>(
        [&](int row, int col, int place) { dst[place] = src.data[row][col]; });
  };
  interpreter::write_global(detail_fragments::spans_of<kCols>(dst), store, at);
}

}  // namespace warpgroup

// Of floats and integers.
template <typename T, int kN>
T load_element(const SharedVec<T, kN>& src, int index, Location at = {}) {
  interpreter::read_shared(
      interpreter::chunks_of(interpreter::shared_address(src.data + index), sizeof(T)),
      "loads a number from shared memory", at);
  return src.data[index];
}
template <int kN>
int load_element_by_thread(const SharedVec<int, kN>& src, int index, Location at = {}) {
  interpreter::read_shared_alone(
      interpreter::chunks_of(interpreter::shared_address(src.data + index), sizeof(int)),
      "loads a number from shared memory", at);
  return src.data[index];
}
template <typename T, int kN>
void store_element(SharedVec<T, kN>& dst, int index, T x, Location at = {}) {
  interpreter::write_shared_alone(
      interpreter::chunks_of(interpreter::shared_address(dst.data + index), sizeof(T)),
      "stores a number to shared memory", at);
  dst.data[index] = x;
}
template <int kN>
void store_element_if_new(SharedVec<int, kN>& dst, int index, int x, Location at = {}) {
  if (dst.data[index] != x) store_element(dst, index, x, at);
}
template <typename T>
T load_scalar(const T* address, Location at = {}) {
  const interpreter::GlobalSpan span = {address, sizeof(T)};
  interpreter::read_global_alone({&span, 1}, at);
  return *address;
}

inline void publish_shared(Location at = {}) { interpreter::publish_shared(at); }
inline void publish_global(Location at = {}) { interpreter::publish_global(at); }

}  // namespace tk
