// The gates of a state-space model from its steps as the caller has them: running sums of the
// logarithms of decays within chunks, steps with tokens last, and a number of each head as columns.
//
//   g = rate step        sums[t] = log2(e) (g[first of the chunk] + ... + g[t])
// where a g below `least_log_decay` counts as that (steps.cuh says what a step is).
// Grid: a block of four warps for a chunk of sixteen heads. Limit: memory; reading raw steps, of
// which every head's numbers lie apart, and writing both results.
#pragma once

#include "kernels/linear_attention/steps.cuh"

namespace tk::linear_attention {

struct StepGatesShared {
  WarpSums<1> sums;
};
static_assert(sizeof(StepGatesShared) + 1024 <= kGateSharedBytes,
              "linear_attention.h's kGateSharedBytes covers the kernel's shared memory");

// skip becomes columns [H, columns]: what the blocks of the first chunks do beside.
__device__ __forceinline__ void spread_skip(const StepGatesParams& params, const GatePlace& place) {
  HeadRows skip;
  load_heads(skip, params.skip, 0, place);
  GateTile tile;
  warp::zero(tile);
  warp::add_rows(tile, tile, skip);
  for (int col = kWarpTokens * warp::index(); col < params.columns; col += kChunk) {
    warp::store_pairs(
        GlobalView<float>{params.skip_columns, place.heads, params.columns, params.columns}, tile,
        place.head, col);
  }
}

template <typename T>
__device__ __forceinline__ void step_gates(const StepGatesParams& params) {
  auto& shared = block::shared_memory<StepGatesShared>();
  const Steps& steps = params.steps;
  const GatePlace place = GatePlace::of(params.seqlen, params.num_heads);
  if (params.skip != nullptr && grid::block_x() == 0 && place.batch == 0) {
    spread_skip(params, place);
  }
  GateTile tile;
  warp::load(tile, place.by_token(static_cast<const T*>(steps.raw), params.seqlen), place.head, 0);
  HeadRows rates, biases;
  load_heads(rates, steps.rates, steps.rates_stride, place);
  load_heads(biases, steps.biases, steps.biases_stride, place);
  warp::map_rows(tile, tile, biases, [&](float raw, float bias) {
    return limited_step(steps, unlimited_step(steps, raw + bias));
  });
  place.keep_tokens(tile);
  warp::store_pairs(place.by_head(params.weights), tile, place.head, 0);
  const float least = steps.least_log_decay;
  warp::map_rows(tile, tile, rates, [=](float step, float rate) {
    const float x = step * rate;
    return (x < least ? least : x) * kLog2E;  // what is not a number stays so
  });
  place.keep_tokens(tile);  // a rate may be infinite
  cumsum_chunk(tile, shared.sums);
  warp::store_pairs(place.by_head(params.sums), tile, place.head, 0);
}

}  // namespace tk::linear_attention
