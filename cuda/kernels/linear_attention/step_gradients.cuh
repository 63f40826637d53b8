// The gradients of a state-space model's raw steps, and sums of those of rates, biases and skip.
//
// With dg of gate_gradients.cuh, and dw the gradient of steps as tokens' weights (steps.cuh says
// what a step is):
//   dstep = dw + rate dg        draw = dstep step'(pre)
//   drate = sum of dg step      dbias = sum of draw        dskip = sum of its columns
// where dg is zero of a logarithm that counted as `least_log_decay`. Sums are those of a block's
// tokens: head_sums.cuh adds them up, both in one order. Grid: as chunk_sums.cuh. Limit: memory.
#pragma once

#include "kernels/linear_attention/gate_gradients.cuh"
#include "kernels/linear_attention/steps.cuh"

namespace tk::linear_attention {

struct StepGradientsShared {
  HeadSums<kHeadParts> sums;
};
static_assert(sizeof(StepGradientsShared) + 1024 <= kStepSharedBytes,
              "linear_attention.h's kStepSharedBytes covers the kernel's shared memory");

// Writes draw; drates and dbiases become sums over the warp's tokens.
template <typename T>
__device__ __forceinline__ void pull_back_steps(const StepGradientsParams& params,
                                                const StepPlace& place, HeadRows& drates,
                                                HeadRows& dbiases) {
  const Steps& steps = params.steps;
  GateTile dg, pre, dstep;
  warp::load(pre, place.by_token(static_cast<const T*>(steps.raw), params.seqlen), place.head, 0);
  warp::load_pairs(dstep, place.by_head(params.dweights), place.head, 0);
  const int64 start = static_cast<int64>(place.batch) * place.heads * place.padded + place.first;
  load_gate_gradients(dg, params.parts, start, place.head, place.heads, place.padded);
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

// The warp's chunk's sums of dskip.
__device__ __forceinline__ void sum_skip(const StepGradientsParams& params, const StepPlace& place,
                                         HeadRows& dskip) {
  const int64 chunks = place.padded / kChunk;
  const float* first =
      params.dskip +
      (static_cast<int64>(place.batch) * place.heads * chunks + place.chunk) * params.columns;
  for (int col = 0; col < params.columns; col += kChunk) {
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
  const StepPlace place = StepPlace::of(params.seqlen, params.num_heads);
  HeadRows sums[kHeadParts];
#pragma unroll
  for (HeadRows& sum : sums) warp::zero(sum);
  if (place.is_there()) {
    pull_back_steps<T>(params, place, sums[0], sums[1]);
    if (params.dskip != nullptr) sum_skip(params, place, sums[2]);
  }
  shared.sums.add_up(sums);
  if (warp::index() != 0) return;
  const int blocks = ceil_div(place.padded, kChunksOfBlock * kChunk);
  float* parts = params.head_parts + (static_cast<int64>(place.batch) * blocks + grid::block_x()) *
                                         kHeadParts * place.heads;
#pragma unroll
  for (int i = 0; i < kHeadParts; ++i) {
    warp::store(GlobalVec<float>{parts + i * place.heads, place.heads}, sums[i], place.head);
  }
}

}  // namespace tk::linear_attention
