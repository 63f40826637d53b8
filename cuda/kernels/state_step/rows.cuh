// One token's step of states [V, K], a row for each value: the state-space dual.
//
//   S <- decay S + (w v) k^T,   out = scale S q + skip * v
//
// (Dao and Gu, "Transformers are SSMs", 2024, section 3, with one token; what mamba-ssm calls
// selective_state_update.) Grid: 64 rows of the state of a head to a block of one warpgroup,
// without roles or shared memory; a warp has 16 rows and walks their columns kCols at a time. A
// thread has kCols / 2 numbers of the state in flight, 96 registers, and five blocks share a
// multiprocessor: 80 KB, several times what hides the memory's latency. Limit: memory, the state
// once in and once out.
#pragma once

#include "kernels/state_step/step.cuh"

namespace tk::state_step {

template <typename TKey_, typename TValue_, int kCols_, bool kWhole_>
struct Traits {
  using TKey = TKey_;
  using TValue = TValue_;
  static constexpr int kCols = kCols_;
  static constexpr bool kWhole = kWhole_;
};

template <typename Traits>
__device__ __forceinline__ void rows(const StepParams& params) {
  using TKey = typename Traits::TKey;
  using TValue = typename Traits::TValue;
  constexpr int kCols = Traits::kCols;
  constexpr bool kWhole = Traits::kWhole;
  const Place place = Place::of(params);
  const int first = place.part * kRows;
  const int64 state = place.state(params);
  const int64 matrix = state * params.value_dim * params.key_dim;
  const GlobalView<float> view{params.state + matrix, params.value_dim, params.key_dim,
                               params.key_dim};
  const auto q = place.shared_row<TKey>(params, params.q, params.query_heads, params.key_dim);
  const auto k = place.shared_row<TKey>(params, params.k, params.key_heads, params.key_dim);

  // First of all what is large: whatever is computed from the rest waits for that.
  RegTile<float, 16, kCols> tile;
  warpgroup::load_runs<kWhole>(tile, view, first, 0);
  const float decay = place.value(params.decays, 1.0f);
  PerRow<16> values, weighted, total;
  warpgroup::load(values,
                  place.shared_row<TValue>(params, params.v, params.num_heads, params.value_dim),
                  first, 0.0f);
  const float weight = place.value(params.weights, 1.0f);
  warp::map(weighted, values, [=](float v) { return v * weight; });
  warp::zero(total);
#pragma unroll 1
  for (int col = 0;;) {
    PerCol<kCols> keys, queries;
    warp::load_runs<kWhole>(keys, k, col, 0.0f);
    warp::load_runs<kWhole>(queries, q, col, 0.0f);
    step_on(tile, decay, weighted, keys);
    warpgroup::store_runs<kWhole>(view, tile, first, col);
    // Columns that are not there have no part in the sum, not even as infinity times zero.
    if (col + kCols > params.key_dim) warp::keep_runs_before(tile, params.key_dim - col, 0.0f);
    warp::mul_cols(tile, tile, queries);
    warp::fold_row_sum(total, tile);
    col += kCols;
    if (col >= params.key_dim) break;
    warpgroup::load_runs<kWhole>(tile, view, first, col);
  }
  warp::finish_row_sum(total);
  warp::map(total, total, [=](float x) { return x * params.scale; });
  if (params.skip.data != nullptr) {
    PerRow<16> skip;
    warpgroup::load(
        skip,
        GlobalVec<const float>{place.at(params.skip), params.value_dim, params.skip.value_stride},
        first, 0.0f);
    warp::zip(values, values, skip, [](float v, float d) { return v * d; });
    warp::zip(total, total, values, [](float x, float y) { return x + y; });
  }
  TValue* out = static_cast<TValue*>(params.out) + state * params.value_dim;
  warpgroup::store(GlobalVec<TValue>{out, params.value_dim}, total, first);
}

}  // namespace tk::state_step
