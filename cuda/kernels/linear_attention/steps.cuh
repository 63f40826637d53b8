// What a token's step is, and what the kernels of steps share.
//
//   pre = raw + bias        step = clip(softplus(pre), least, most)        g = rate step
// with softplus where it is asked for: Mamba-2's dt, dt_bias and A. A tile has sixteen heads and a
// chunk's tokens.
#pragma once

#include "kernels/linear_attention/linear_attention.h"
#include "tk/tk.cuh"

namespace tk::linear_attention {

using GateTile = RegTile<float, kHeadsOfBlock, kChunk>;
using HeadRows = PerRow<kHeadsOfBlock>;

// A warp's place: four chunks are a block's, one a warp's.
struct StepPlace {
  int chunk, first;  // token
  int head, batch;
  int heads, tokens;  // that there are from there on
  int padded;

  __device__ __forceinline__ static StepPlace of(int seqlen, int num_heads) {
    const int chunk = kChunksOfBlock * grid::block_x() + warp::index();
    return {chunk,
            chunk * kChunk,
            kHeadsOfBlock * grid::block_y(),
            grid::block_z(),
            num_heads,
            max(min(seqlen - chunk * kChunk, kChunk), 0),
            static_cast<int>(padded_tokens(seqlen))};
  }
  __device__ __forceinline__ bool is_there() const { return tokens > 0; }

  // Columns beyond the last token become zero.
  __device__ __forceinline__ void keep_tokens(GateTile& tile) const {
    const int end = tokens;
    warp::for_each(tile, [=](int, int col, float x) { return col < end ? x : 0.0f; });
  }

  // The chunk's part of [B, T, H] and of [B, H, padded].
  template <typename T>
  __device__ __forceinline__ GlobalView<T> by_token(T* array, int seqlen) const {
    const int64 row = static_cast<int64>(batch) * seqlen + first;
    return {array + row * heads, heads, tokens, 1, heads};
  }
  template <typename T>
  __device__ __forceinline__ GlobalView<T> by_head(T* array) const {
    return {array + static_cast<int64>(batch) * heads * padded + first, heads, kChunk, padded};
  }
};

// The heads' rates or biases.
__device__ __forceinline__ void load_heads(HeadRows& rows, const float* array, int64 batch_stride,
                                           const StepPlace& place) {
  if (array == nullptr) {
    warp::zero(rows);
  } else {
    warp::load(rows, GlobalVec<const float>{array + place.batch * batch_stride, place.heads},
               place.head, 0.0f);
  }
}

// pre, before limits: NaN stays NaN.
__device__ __forceinline__ float unlimited_step(const Steps& steps, float pre) {
  return steps.softplus ? math::softplus(pre) : pre;
}
__device__ __forceinline__ float limited_step(const Steps& steps, float step) {
  step = step < steps.least ? steps.least : step;
  return step > steps.most ? steps.most : step;
}
// The derivative of the step by pre times `gradient`: none beyond the limits, all of it at them.
__device__ __forceinline__ float through_step(const Steps& steps, float gradient, float pre) {
  const float step = unlimited_step(steps, pre);
  if (step < steps.least || step > steps.most) gradient = 0.0f;
  return steps.softplus ? gradient * math::sigmoid(pre) : gradient;
}

// A block's numbers of each head, brought together from those of its warps in their order.
template <int kParts>
struct HeadSums {
  SharedVec<float, kHeadsOfBlock> of_warps[kParts][4];

  // All threads: `sums` becomes the whole for the first warp.
  __device__ __forceinline__ void add_up(HeadRows (&sums)[kParts]) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) warp::store(of_warps[i][warp::index()], sums[i]);
    block::sync();
    if (warp::index() != 0) return;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
#pragma unroll
      for (int w = 1; w < 4; ++w) {
        HeadRows other;
        warp::load(other, of_warps[i][w]);
        warp::add(sums[i], sums[i], other);
      }
    }
  }
};

}  // namespace tk::linear_attention
