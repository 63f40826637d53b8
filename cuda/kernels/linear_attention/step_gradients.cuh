// The gradients of a state-space model's raw steps, and sums of those of rates, biases and skip.
//
// With dg of gate_gradients.cuh, and dw the gradient of steps as tokens' weights (steps.cuh says
// what a step is):
//   dstep = dw + rate dg        draw = dstep step'(pre)
//   drate = sum of dg step      dbias = sum of draw        dskip = sum of its columns
// where dg is zero of a logarithm that counted as `least_log_decay`. Sums are those of a chunk's
// tokens: head_sums.cuh adds them up, both in one order. Grid: as chunk_sums.cuh. Limit: memory.
#pragma once

#include "kernels/linear_attention/gate_gradients.cuh"
#include "kernels/linear_attention/steps.cuh"

namespace tk::linear_attention {

struct StepGradientsShared {
  GateGradientSums gates;
  WarpSums<kHeadParts> heads;
};
static_assert(sizeof(StepGradientsShared) + 1024 <= kGateSharedBytes,
              "linear_attention.h's kGateSharedBytes covers the kernel's shared memory");

// Writes draw; drates and dbiases become sums over the warp's tokens. For all
// threads of a block.
template <typename T>
__device__ __forceinline__ void pull_back_steps(const StepGradientsParams& params,
                                                const GatePlace& place, GateGradientSums& sums,
                                                HeadRows& drates, HeadRows& dbiases) {
  const Steps& steps = params.steps;
  GateTile dg, pre, dstep;
  warp::load(pre, place.by_token(static_cast<const T*>(steps.raw), params.seqlen), place.head, 0);
  warp::load_pairs(dstep, place.by_head(params.dweights), place.head, 0);
  load_gate_gradients(dg, params.parts, place, sums);
  HeadRows rates, biases;
  load_heads(rates, steps.rates, steps.rates_stride, place);
  load_heads(biases, steps.biases, steps.biases_stride, place);

  warp::add_rows(pre, pre, biases);
  {
    GateTile step, log_decay;
    warp::map(step, pre, [&](float x) { return limited_step(steps, unlimited_step(steps, x)); });
    warp::mul_rows(log_decay, step, rates);
    const float least = steps.least_log_decay;
    warp::zip(dg, dg, log_decay, [=](float dx, float x) { return x < least ? 0.0f : dx; });
    warp::mul(step, step, dg);
    place.keep_tokens(step);
    warp::row_sum(drates, step);
  }
  warp::mul_rows(dg, dg, rates);
  warp::add(dstep, dstep, dg);
  warp::zip(dstep, dstep, pre, [&](float dx, float x) { return through_step(steps, dx, x); });
  warp::store(place.by_token(static_cast<T*>(params.draw), params.seqlen), dstep, place.head, 0);
  place.keep_tokens(dstep);
  warp::row_sum(dbiases, dstep);
}

// Sums of the chunk's dskip, of which every warp has a quarter of the columns.
__device__ __forceinline__ void sum_skip(const StepGradientsParams& params, const GatePlace& place,
                                         HeadRows& dskip) {
  const int64 chunks = place.padded / kChunk;
  const float* first =
      params.dskip +
      (static_cast<int64>(place.batch) * place.heads * chunks + place.chunk) * params.columns;
  for (int col = kWarpTokens * warp::index(); col < params.columns; col += kChunk) {
    GateTile tile;
    warp::load_pairs(
        tile, GlobalView<const float>{first, place.heads, params.columns, chunks * params.columns},
        place.head, col);
    HeadRows sum;
    warp::row_sum(sum, tile);
    warp::add(dskip, dskip, sum);
  }
}

template <typename T>
__device__ __forceinline__ void step_gradients(const StepGradientsParams& params) {
  auto& shared = block::shared_memory<StepGradientsShared>();
  const GatePlace place = GatePlace::of(params.seqlen, params.num_heads);
  HeadRows sums[kHeadParts];
#pragma unroll
  for (HeadRows& sum : sums) warp::zero(sum);
  if (params.dskip != nullptr) sum_skip(params, place, sums[2]);
  pull_back_steps<T>(params, place, shared.gates, sums[0], sums[1]);
#pragma unroll
  for (int i = 0; i < kHeadParts; ++i) shared.heads.put(i, sums[i]);
  block::sync();
  if (warp::index() >= kHeadParts) return;

  const int part = warp::index();
  HeadRows sum;
  warp::zero(sum);
  shared.heads.add(sum, part, 0, kGateWarps);
  const int64 row = static_cast<int64>(place.batch) * (place.padded / kChunk) + place.chunk;
  float* const result = params.head_parts + (row * kHeadParts + part) * place.heads;
  warp::store(GlobalVec<float>{result, place.heads}, sum, place.head);
}

}  // namespace tk::linear_attention
