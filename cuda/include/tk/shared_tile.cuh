// Tiles and vectors in shared memory.
//
// A tile is stored as panels of 128, 64 or 32 bytes of columns, the widest that divides its rows,
// each swizzled as the copy engine and wgmma know it: within every eight rows, the 16-byte chunk
// index is xored with the row. Operations take a SharedTile or a view of one.
#pragma once

#include "tk/base.cuh"
#include "tk/shared_address.cuh"
#include "tk/tensor_map.h"

namespace tk {

// Rows first_row.. and whole panels of a tile: what sub-tile operands are.
template <typename T_, int kRows_, int kCols_, int kPanelRows_, int kSwizzle_>
struct SharedView {
  using T = T_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kPanelRows = kPanelRows_;  // rows of the tile that this is a view of
  static constexpr int kSwizzle = kSwizzle_;
  static constexpr int kPanelCols = kSwizzle / static_cast<int>(sizeof(T));
  static constexpr int kPanelBytes = kPanelRows * kSwizzle;
  static constexpr int kPanels = kCols / kPanelCols;
  static constexpr int kBytes = kRows * kCols * static_cast<int>(sizeof(T));

  uint32 base;

  __device__ __forceinline__ uint32 address() const { return base; }

  // Where an element lies.
  __device__ __forceinline__ uint32 address(int row, int col) const {
    const int panel = col / kPanelCols;
    const uint32 offset = row * kSwizzle + (col % kPanelCols) * static_cast<int>(sizeof(T));
    return base + panel * kPanelBytes + (offset ^ ((offset >> 3) & (kSwizzle - 16)));
  }

  // Rows kCount * index and on.
  template <int kCount>
  __device__ __forceinline__ SharedView<T, kCount, kCols, kPanelRows, kSwizzle> rows(
      int index) const {
    static_assert(kCount % 8 == 0 && kRows % kCount == 0,
                  "a view takes whole groups of eight rows");
    return {base + index * kCount * kSwizzle};
  }
  // Columns kCount * index and on.
  template <int kCount>
  __device__ __forceinline__ SharedView<T, kRows, kCount, kPanelRows, kSwizzle> cols(
      int index) const {
    static_assert(kCount % kPanelCols == 0 && kCols % kCount == 0, "a view takes whole panels");
    return {base + index * (kCount / kPanelCols) * kPanelBytes};
  }
  // Columns first, a multiple of a panel's, and on.
  template <int kCount>
  __device__ __forceinline__ SharedView<T, kRows, kCount, kPanelRows, kSwizzle> cols_from(
      int first) const {
    static_assert(kCount % kPanelCols == 0 && kCount <= kCols, "a view takes whole panels");
    return {base + first / kPanelCols * kPanelBytes};
  }
};

template <typename T_, int kRows_, int kCols_>
struct alignas(1024) SharedTile {
  static_assert(kRows_ % 8 == 0, "a shared tile has whole groups of eight rows");
  static_assert(kCols_ * static_cast<int>(sizeof(T_)) % 32 == 0,
                "a row of a shared tile is a multiple of 32 bytes");
  using T = T_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kSwizzle = swizzle_bytes(kCols, sizeof(T));
  static constexpr int kBytes = kRows * kCols * static_cast<int>(sizeof(T));
  using View = SharedView<T, kRows, kCols, kRows, kSwizzle>;

  T data[kRows * kCols];

  __device__ __forceinline__ View view() const { return {detail::shared_address(data)}; }
  template <int kCount>
  __device__ __forceinline__ auto rows(int index) const {
    return view().template rows<kCount>(index);
  }
  template <int kCount>
  __device__ __forceinline__ auto cols(int index) const {
    return view().template cols<kCount>(index);
  }
};

template <typename T_, int kN_>
struct alignas(16) SharedVec {
  using T = T_;
  static constexpr int kN = kN_;
  static constexpr int kBytes = kN * static_cast<int>(sizeof(T));
  T data[kN];
};
// The i-th kPart values of a vector, as a vector of its own.
template <int kPart, typename T, int kN>
__device__ __forceinline__ SharedVec<T, kPart>& part(SharedVec<T, kN>& vec, int i) {
  static_assert(kN % kPart == 0 && SharedVec<T, kPart>::kBytes % 16 == 0, "parts are aligned");
  return reinterpret_cast<SharedVec<T, kPart>&>(vec.data[i * kPart]);
}
template <int kPart, typename T, int kN>
__device__ __forceinline__ const SharedVec<T, kPart>& part(const SharedVec<T, kN>& vec, int i) {
  static_assert(kN % kPart == 0 && SharedVec<T, kPart>::kBytes % 16 == 0, "parts are aligned");
  return reinterpret_cast<const SharedVec<T, kPart>&>(vec.data[i * kPart]);
}

// fp32 values of a 64-row tile of a warpgroup in the order its registers hold them: written and
// read without bank conflicts, moved as one run of bytes. Meaningless to anything but fragment
// loads and stores.
template <int kCols_>
struct alignas(128) Fragments {
  static constexpr int kCols = kCols_;
  static constexpr int kValues = 64 * kCols;
  static constexpr int kBytes = kValues * 4;
  float data[kValues];
};

namespace detail {
// Operations take a tile or a view.
template <typename T, int kRows, int kCols>
__device__ __forceinline__ auto as_view(const SharedTile<T, kRows, kCols>& tile) {
  return tile.view();
}
template <typename T, int kRows, int kCols, int kPanelRows, int kSwizzle>
__device__ __forceinline__ auto as_view(
    const SharedView<T, kRows, kCols, kPanelRows, kSwizzle>& view) {
  return view;
}
}  // namespace detail
}  // namespace tk
