// Packed documents: the tile that a block or a step has, which rows of it see what, and how rows of
// tiles that are not full leave. hedgehog_attention.h says what tiles are.
#pragma once

#include "kernels/hedgehog_attention/walk.cuh"
#include "kernels/hedgehog_attention/window.cuh"
#include "tk/tk.cuh"

namespace tk::hedgehog_attention {

using RowVec = SharedVec<float, kChunk>;

// Where rows' windows begin, in shared memory; nothing where documents are not packed.
template <bool kDocuments, int kStages>
struct RowWindows {
  static constexpr int kBytes = 0;
};
template <int kStages>
struct RowWindows<true, kStages> {
  static constexpr int kBytes = RowVec::kBytes;
  RowVec rows[kStages];
};

struct DocumentTile {
  int first;      // token
  int tokens;     // 0 for what is beyond the last tile
  int continued;  // rows that continue the tile before; then that has kChunk tokens
  int flags;

  __device__ __forceinline__ static DocumentTile of(const Documents& documents, int batch,
                                                    int index) {
    const int* numbers =
        documents.tiles + (batch * (documents.most + 2) + index) * static_cast<int64>(kTileNumbers);
    return {load_scalar(numbers), load_scalar(numbers + 1), load_scalar(numbers + 2),
            load_scalar(numbers + 3)};
  }
  // Only whether the tile is a far one.
  __device__ __forceinline__ static bool is_far(const Documents& documents, int batch, int index) {
    return (load_scalar(documents.tiles +
                        (batch * (documents.most + 2) + index) * static_cast<int64>(kTileNumbers) +
                        3) &
            kFarTile) != 0;
  }
  __device__ __forceinline__ bool is_far() const { return (flags & kFarTile) != 0; }
  __device__ __forceinline__ bool is_full() const { return tokens == kChunk; }
};

// The tiles of a block.
__device__ __forceinline__ Segment document_segment(const Documents& documents, int batch) {
  const int index = grid::block_y();
  const int tiles = load_scalar(documents.counts + batch);
  const int size = ceil_div(tiles, documents.shares) * documents.shares_of_segment;
  return {index, documents.shares / documents.shares_of_segment, min(index * size, tiles),
          min((index + 1) * size, tiles)};
}
// Whether a block is for a tile that is not there.
__device__ __forceinline__ bool is_beyond(const Documents& documents, int index, int batch) {
  return index >= load_scalar(documents.counts + batch);
}
__device__ __forceinline__ const float* windows_of(const Documents& documents, int batch,
                                                   int index) {
  return documents.windows + (static_cast<int64>(batch) * documents.most + index) * kChunk;
}

// As Tokens, of queries of a tile.
struct DocumentTokens : Tokens {
  DocumentTile tile;
  const RowVec& windows;

  __device__ __forceinline__ DocumentTokens(const DocumentTile& tile, int first,
                                            const RowVec& windows)
      : Tokens{tile.first, first}, tile(tile), windows(windows) {}
};

__device__ __forceinline__ void scale_last_scores(Square& dst, const Square& src, float scale_log2,
                                                  const DocumentTokens& tokens) {
  scale_last_scores(dst, src, scale_log2, static_cast<const Tokens&>(tokens));
  if (tokens.tile.continued < kChunk) {
    warpgroup::keep_rows_before(dst, tokens.tile.continued, -kInfinity);
  }
}
__device__ __forceinline__ void scale_own_scores(Square& dst, const Square& src, float scale_log2,
                                                 const DocumentTokens& tokens) {
  scale_own_scores(dst, src, scale_log2, static_cast<const Tokens&>(tokens));
  if ((tokens.tile.flags & kOneWindow) != 0) return;
  PerRow<16> rows;
  PerCol<kChunk> cols;
  warpgroup::load(rows, tokens.windows);
  warp::load(cols, tokens.windows);
  Square same;
  warp::outer(same, rows, cols, [](float x, float y) { return x == y ? 1.0f : 0.0f; });
  warp::zip(dst, dst, same, [](float s, float same) { return same > 0 ? s : -kInfinity; });
}

// Only a tile's first `continued` rows see what is far: what others have of it is dropped.
__device__ __forceinline__ void keep_continued(PerRow<16>& rows, const DocumentTile& tile) {
  const int continued = tile.continued;
  warpgroup::for_each(rows, [=](int row, float x) { return row < continued ? x : 0.0f; });
}

// The rows of a tile in an array [B, T, heads, dim], as far as they are there.
template <typename T>
__device__ __forceinline__ GlobalView<T> tile_rows(const TokenRows& array, const DocumentTile& tile,
                                                   int seqlen, int head, int batch) {
  const int64 stride = static_cast<int64>(array.heads) * array.dim;
  const int64 token = static_cast<int64>(batch) * seqlen + tile.first;
  return {static_cast<T*>(array.data) + token * stride + static_cast<int64>(head) * array.dim,
          tile.tokens, array.dim, stride};
}

}  // namespace tk::hedgehog_attention
