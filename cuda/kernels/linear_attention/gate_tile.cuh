// What the kernels of gates share: their tiles, where those are, and sums across a chunk's warps.
//
// A block of four warps has a chunk of sixteen heads, a warp a quarter of its tokens: so small are
// its tiles that all it reads is under way at once, and that a multiprocessor has many warps.
#pragma once

#include "kernels/linear_attention/linear_attention.h"
#include "tk/tk.cuh"

namespace tk::linear_attention {

constexpr int kGateWarps = kGateThreads / 32;
constexpr int kWarpTokens = kChunk / kGateWarps;

using GateTile = RegTile<float, kHeadsOfBlock, kWarpTokens>;
using HeadRows = PerRow<kHeadsOfBlock>;

// A warp's place.
struct GatePlace {
  int chunk, first;  // token
  int head, batch;
  int heads, tokens;  // that there are from there on
  int padded;

  __device__ __forceinline__ static GatePlace of(int seqlen, int num_heads) {
    const int chunk = grid::block_x(), first = chunk * kChunk + warp::index() * kWarpTokens;
    return {chunk,
            first,
            kHeadsOfBlock * grid::block_y(),
            grid::block_z(),
            num_heads,
            max(min(seqlen - first, kWarpTokens), 0),
            static_cast<int>(padded_tokens(seqlen))};
  }

  // Columns beyond the last token become zero.
  __device__ __forceinline__ void keep_tokens(GateTile& tile) const {
    const int end = tokens;
    warp::for_each(tile, [=](int, int col, float x) { return col < end ? x : 0.0f; });
  }

  // The warp's part of [B, T, H] and of [B, H, padded].
  template <typename T>
  __device__ __forceinline__ GlobalView<T> by_token(T* array, int seqlen) const {
    const int64 row = static_cast<int64>(batch) * seqlen + first;
    return {array + row * heads, heads, tokens, 1, heads};
  }
  template <typename T>
  __device__ __forceinline__ GlobalView<T> by_head(T* array) const {
    return {array + static_cast<int64>(batch) * heads * padded + first, heads, kWarpTokens, padded};
  }
};

// Numbers of each head that warps find and others add up, in the order of warps.
template <int kParts>
struct WarpSums {
  SharedVec<float, kHeadsOfBlock> of_warps[kParts][kGateWarps];

  // To be followed by block::sync.
  __device__ __forceinline__ void put(int part, const HeadRows& sum) {
    warp::store(of_warps[part][warp::index()], sum);
  }
  // sum += those of the warps from `first` to before `end`.
  __device__ __forceinline__ void add(HeadRows& sum, int part, int first, int end) const {
#pragma unroll
    for (int w = 0; w < kGateWarps; ++w) {
      if (w < first || w >= end) continue;
      HeadRows other;
      warp::load(other, of_warps[part][w]);
      warp::add(sum, sum, other);
    }
  }
};

// Running sums along the tokens of a chunk. For all threads of a block.
__device__ __forceinline__ void cumsum_chunk(GateTile& tile, WarpSums<1>& sums) {
  HeadRows sum;
  warp::row_sum(sum, tile);
  sums.put(0, sum);
  warp::cumsum_cols(tile, tile);
  block::sync();
  warp::zero(sum);
  sums.add(sum, 0, 0, warp::index());
  warp::add_rows(tile, tile, sum);
}

}  // namespace tk::linear_attention
