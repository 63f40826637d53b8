// What the kernels of Based attention share: their settings, the documents of a chunk, its weights.
#pragma once

#include "kernels/based_attention/based_attention.h"
#include "tk/tk.cuh"

namespace tk::based_attention {

template <typename T_, int kDim_, bool kDocuments_, int kStages_>
struct Traits {
  static_assert(is_feature_dim(kDim_), "features are those of 8, 16, 24 or 32 values");
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr bool kDocuments = kDocuments_;
  static constexpr int kStages = kStages_;
  static constexpr int kPieces = state_pieces(kDim);
  static constexpr int kPieceColumns = piece_columns(kDim);

  using KeyTile = SharedTile<T, kChunk, tile_columns(kDim)>;
  using ValueTile = SharedTile<T, kChunk, kSlice>;
  using PieceTile = SharedTile<T, kSlice, kPieceColumns>;  // of a state
  using FeatureTile = SharedTile<T, kChunk, kPieceColumns>;
  using Features = RegTile<T, 16, kPieceColumns>;
};

constexpr ProductFactors kKeyFactors = {1.0f, 1.0f, 1.0f};

// Where documents start within the chunk: what is before a start is not seen from after it. Without
// documents nothing of this costs anything.
template <bool kDocuments>
struct Documents {
  SharedVec<float, kChunk> counts;

  static constexpr int kBytes = kDocuments ? SharedVec<float, kChunk>::kBytes : 0;

  // One thread.
  __device__ __forceinline__ void load(const float* all, Barrier& full, int batch, int chunk,
                                       int chunks) {
    if constexpr (kDocuments) {
      tma::load(counts, all + (static_cast<int64>(batch) * chunks + chunk) * kChunk, full);
    }
  }

  // Of a tile whose rows are tokens, those that do not see the state before the chunk become zero.
  template <typename Tile>
  __device__ __forceinline__ void keep_rows_before(Tile& tile) const {
    if constexpr (kDocuments) {
      PerRow<16> started;
      warpgroup::load(started, counts);
      warp::map_rows(tile, tile, started, [](float x, float n) { return n > 0 ? 0.0f : x; });
    }
  }
  __device__ __forceinline__ void keep_rows_before(PerRow<16>& rows) const {
    if constexpr (kDocuments) {
      PerRow<16> started;
      warpgroup::load(started, counts);
      warp::zip(rows, rows, started, [](float x, float n) { return n > 0 ? 0.0f : x; });
    }
  }
  // Those that are not in the state after it.
  template <typename Tile>
  __device__ __forceinline__ void keep_rows_after(Tile& tile) const {
    if constexpr (kDocuments) {
      const float all = load_element(counts, kChunk - 1);
      PerRow<16> started;
      warpgroup::load(started, counts);
      warp::map_rows(tile, tile, started, [=](float x, float n) { return n < all ? 0.0f : x; });
    }
  }
  // The same of a tile whose columns are tokens.
  template <typename Tile>
  __device__ __forceinline__ void keep_cols_before(Tile& tile) const {
    if constexpr (kDocuments) {
      warp::map_cols(tile, tile, counts, [](float x, float n) { return n > 0 ? 0.0f : x; });
    }
  }
  template <typename Tile>
  __device__ __forceinline__ void keep_cols_after(Tile& tile) const {
    if constexpr (kDocuments) {
      const float all = load_element(counts, kChunk - 1);
      warp::map_cols(tile, tile, counts, [=](float x, float n) { return n < all ? 0.0f : x; });
    }
  }
  // A state from before the chunk, after it.
  template <typename State>
  __device__ __forceinline__ void keep_state(State& state) const {
    if constexpr (kDocuments) {
      const bool ended = load_element(counts, kChunk - 1) > 0;
      warp::map(state, state, [=](float x) { return ended ? 0.0f : x; });
    }
  }

  // rows += how many tokens of a chunk are in the state after it.
  __device__ __forceinline__ void add_count(PerRow<16>& rows) const {
    if constexpr (kDocuments) {
      RegTile<float, 16, kChunk> ones;
      PerRow<16> count;
      warp::fill(ones, 1.0f);
      keep_cols_after(ones);
      warp::row_sum(count, ones);
      warp::add(rows, rows, count);
    } else {
      warp::map(rows, rows, [](float x) { return x + kChunk; });
    }
  }

  // dst = f(scores) of tokens i in rows and j in columns where i sees j: j <= i, in one document.
  template <typename Dst, typename Scores, typename F>
  __device__ __forceinline__ void map_seen(Dst& dst, const Scores& scores, F&& f) const {
    if constexpr (kDocuments) {
      PerRow<16> rows;
      warpgroup::load(rows, counts);
      warpgroup::map_lower(dst, scores, rows, counts,
                           [&](float s, float at, float of) { return at == of ? f(s) : 0.0f; });
    } else {
      warpgroup::map_lower(dst, scores, f);
    }
  }
  // The same of tokens j in rows and i in columns: j is seen by i.
  template <typename Dst, typename Scores, typename F>
  __device__ __forceinline__ void map_seen_by(Dst& dst, const Scores& scores, F&& f) const {
    if constexpr (kDocuments) {
      PerRow<16> rows;
      warpgroup::load(rows, counts);
      warpgroup::map_upper(dst, scores, rows, counts,
                           [&](float s, float of, float at) { return at == of ? f(s) : 0.0f; });
    } else {
      warpgroup::map_upper(dst, scores, f);
    }
  }
};

// A chunk of a group, and its steps: slices of heads, one head after another.
struct GroupSteps {
  int chunk, group, batch;
  int first_head, heads, slices;

  // The block's own.
  template <typename Params>
  __device__ __forceinline__ explicit GroupSteps(const Params& params)
      : GroupSteps(params, grid::block_x(), grid::block_y(), grid::block_z()) {}
  // Of all chunks of all groups the one with this number.
  template <typename Params>
  __device__ __forceinline__ GroupSteps(const Params& params, int tile)
      : GroupSteps(params, tile % params.chunks, tile / params.chunks % params.num_groups,
                   tile / params.chunks / params.num_groups) {}
  template <typename Params>
  __device__ __forceinline__ GroupSteps(const Params& params, int chunk, int group, int batch)
      : chunk(chunk), group(group), batch(batch) {
    heads = params.num_heads / params.num_groups;
    first_head = group * heads;
    slices = ceil_div(params.value_dim, kSlice);
  }
  __device__ __forceinline__ int count() const { return heads * slices; }
  __device__ __forceinline__ int head(int index) const { return first_head + index / slices; }
  __device__ __forceinline__ int slice(int index) const { return index % slices; }
  // Which of the states of chunks.
  template <typename Params>
  __device__ __forceinline__ int matrix(const Params& params, int index) const {
    return (batch * params.num_heads + head(index)) * params.chunks + chunk;
  }
};

// f(s) and its derivative, of products x of q and k, with s = scale x.
struct Taylor {
  float scale, half_square;

  __device__ __forceinline__ explicit Taylor(float scale)
      : scale(scale), half_square(0.5f * scale * scale) {}
  __device__ __forceinline__ float operator()(float x) const {
    return math::fma(math::fma(half_square, x, scale), x, 1.0f);
  }
  __device__ __forceinline__ float slope(float x) const { return math::fma(x, scale, 1.0f); }
};

}  // namespace tk::based_attention
