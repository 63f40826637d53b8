// What is no finite number in the state after a segment is none in all later segments.
//
// Segments start from sums that leave out what has decayed to nothing (segment_sums.cuh). Of finite
// numbers that is zero; infinities and NaN would stay. A segment whose own walk ends with such
// marks its state (StatesParams): here, every later one becomes NaN in the same places, in the
// states that it has stored, or in the columns of its out; and so does the end of the last one.
// Backwards, the segments that come later in the walk are those before in the sequence.
// Grid: slices of 64 values, later segments, batch. Each of four warps has sixteen rows of states,
// reads the marks of the segments before, and is done: unless there is one. Limit: latency.
#pragma once

#include "kernels/linear_attention/walk.cuh"
#include "tk/tk.cuh"

namespace tk::linear_attention {

template <typename T_, bool kOfStates_>
struct SpreadTraits {
  using T = T_;
  static constexpr bool kOfStates = kOfStates_;
};

template <typename Traits>
struct Spread {
  using T = typename Traits::T;
  static constexpr int kSide = kMarkedRows;
  using Tile = RegTile<float, kSide, kSide>;
  using Result = RegTile<T, kSide, kSide>;
  struct Shared {
    SharedVec<float, kSide> rows[kSpreadThreads / 32];
  };
  static_assert(sizeof(Shared) + 1024 <= kSpreadSharedBytes,
                "linear_attention.h's kSpreadSharedBytes covers the kernel's shared memory");

  const SpreadParams& params;
  const Place place = Place::of(params, 1, 0);
  const int count = ceil_div(params.chunks, params.chunks_of_segment);
  const int order = grid::block_y() + 1;  // of the segment, as the walk went
  const int first_row = kSide * warp::index();

  __device__ __forceinline__ float* mark(int segment) const {
    return const_cast<float*>(params.marks) + mark_of(params, place, Segment{segment, count});
  }
  __device__ __forceinline__ GlobalView<float> end(int segment) const {
    return state_rows(params.ends, params, place, Segment{segment, count});
  }

  // NaN where the end of a segment before this one is not finite, of sixteen columns; else zero.
  __device__ __forceinline__ void find(Tile& found, int col) const {
    warp::zero(found);
    for (int before = 0; before < order; ++before) {
      if (load_scalar(mark(before)) == 0) continue;
      Tile tile;
      warp::load(tile, end(before), first_row, col);
      warp::zip(found, found, tile, [](float x, float y) { return math::fma(y, 0.0f, x); });
    }
  }
  template <typename Values>
  __device__ __forceinline__ static void add_to(const GlobalView<T>& view, const Values& values,
                                                int row, int col) {
    Result result;
    Tile wide;
    warp::load(result, view, row, col);
    warp::convert(wide, result);
    warp::add(wide, wide, values);
    warp::convert(result, wide);
    warp::store(view, result, row, col);
  }

  // Calls f with each chunk of the segment.
  template <typename F>
  __device__ __forceinline__ void for_each_chunk(F&& f) const {
    const Segment segment = Segment::at(params, params.reverse ? count - 1 - order : order);
    for (int chunk = segment.first; chunk < segment.end; ++chunk) f(chunk);
  }

  __device__ __forceinline__ void into_states(const Tile& found, int col) const {
    const int slices = ceil_div(params.value_dim, kSlice);
    const int runs = ceil_div(params.chunks, params.stored_every);
    for_each_chunk([&](int chunk) {
      if (!begins_run(params, chunk, params.reverse)) return;
      const int64 matrix = stored_matrix<int64>(place.batch, chunk / params.stored_every, runs,
                                                place.head, params.num_heads, place.slice, slices);
      T* const first = static_cast<T*>(params.results) + matrix * kSlice * params.key_dim;
      add_to(GlobalView<T>{first, kSlice, params.key_dim, params.key_dim}, found, first_row, col);
    });
  }
  // Rows of states are columns of out.
  __device__ __forceinline__ void into_out(PerRow<kSide>& rows, Shared& shared) const {
    warp::finish_row_sum(rows);
    warp::store(shared.rows[warp::index()], rows);
    warp::sync();
    PerCol<kSide> cols;
    warp::load(cols, shared.rows[warp::index()]);
    Tile found;
    warp::zero(found);
    warp::map_cols(found, found, cols, [](float x, float y) { return x + y; });
    const int64 stride = static_cast<int64>(params.num_heads) * params.value_dim;
    const int64 first = place.batch * params.seqlen * stride + place.head * params.value_dim;
    const GlobalView<T> out{static_cast<T*>(params.results) + first, params.seqlen,
                            params.value_dim, stride};
    for_each_chunk([&](int chunk) {
      for (int row = chunk * kChunk; row < (chunk + 1) * kChunk; row += kSide) {
        add_to(out, found, row, place.slice * kSlice + first_row);
      }
    });
  }

  __device__ __forceinline__ void run(Shared& shared) const {
    float marked = 0;
    for (int before = 0; before < order; ++before) marked += load_scalar(mark(before));
    if (marked == 0) return;
    PerRow<kSide> rows;
    warp::zero(rows);
    for (int col = 0; col < params.key_dim; col += kSide) {
      Tile found;
      find(found, col);
      warp::fold_row_sum(rows, found);
      if constexpr (Traits::kOfStates) into_states(found, col);
      if (order + 1 < count) continue;
      Tile last;
      warp::load(last, end(order), first_row, col);
      warp::add(last, last, found);
      warp::store(end(order), last, first_row, col);
    }
    if constexpr (!Traits::kOfStates) into_out(rows, shared);
  }
};

template <typename Traits>
__device__ __forceinline__ void spread(const SpreadParams& params) {
  auto& shared = block::shared_memory<typename Spread<Traits>::Shared>();
  Spread<Traits>{params}.run(shared);
}

}  // namespace tk::linear_attention
