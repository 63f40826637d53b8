// The states that segments start with, one after another, from what each adds and leaves:
//
//   starts[0] = first,  starts[s + 1] = kept[s] starts[s] + added[s]
//
// Backwards the same of the state's gradient, with the last segment first.
// Grid: heads, runs of kStartsElements numbers of a state. Four warps share a run; each walks
// through the segments with its sixteen by sixteen numbers in registers, and reads what kAhead
// segments add before it needs the first. Limit: latency, and added and starts in L2.
#pragma once

#include "kernels/linear_attention/linear_attention.h"
#include "tk/tk.cuh"

namespace tk::linear_attention {

__device__ __forceinline__ void segment_starts(const SegmentStartsParams& params) {
  constexpr int kAhead = 4, kSide = 16;
  using Tile = RegTile<float, kSide, kSide>;
  const int rows = params.size / kStartsColumns;
  const int64 head = grid::block_x();
  const int row = kSide * grid::block_y(), col = kSide * warp::index();
  const auto view = [&](auto* states, int64 state) {
    return GlobalView{states + state * params.size, rows, kStartsColumns, kStartsColumns};
  };

  Tile state;
  if (params.first == nullptr) {
    warp::zero(state);
  } else {
    warp::load(state, view(params.first, head), row, col);
  }
  warp::store(view(params.starts, head * params.segments), state, row, col);
  const int steps = params.segments - 1;
  const float* const kept = params.kept + head * steps;
  for (int step = 0; step < steps; step += kAhead) {
    const int ahead = min(steps - step, kAhead);
    Tile added[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i < ahead) warp::load(added[i], view(params.added, head * steps + step + i), row, col);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i < ahead) {
        warp::mul(state, state, load_scalar(kept + step + i));
        warp::add(state, state, added[i]);
        const int64 next = head * params.segments + step + i + 1;
        warp::store(view(params.starts, next), state, row, col);
      }
    }
  }
}

}  // namespace tk::linear_attention
