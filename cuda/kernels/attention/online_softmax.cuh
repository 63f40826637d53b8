// The softmax over keys that come block by block.
//
// Sums and outputs are relative to row_max, which follows the largest score so far but lags behind
// it: as long as a row's scores exceed it by less than 2^8 after scaling, it stays, and nothing
// that came before needs correcting (FlashAttention-4's lazy rescaling; the result is the same but
// for rounding). A row that has seen no key has row_max -inf, and everything stays zero. Scores are
// unscaled; scale is positive and comes with the exponential, as one multiply-add.
#pragma once

#include "tk/tk.cuh"

namespace tk::attention {

struct OnlineSoftmax {
  static constexpr float kSlack = 8.0f;  // in powers of two

  PerRow<16> row_max;
  PerRow<16> row_sum;     // each lane's part; whole after finish
  PerRow<16> excess;      // what roundings have added to row_sum (Kahan 1965)
  PerRow<16> correction;  // by which the last block changes what came before
  float scale_log2;       // scale / ln 2

  __device__ __forceinline__ explicit OnlineSoftmax(float scale_log2) : scale_log2(scale_log2) {
    warp::fill(row_max, -kInfinity);
    warp::fill(row_sum, 0.0f);
    warp::fill(excess, 0.0f);
  }

  // Scores become weights exp(scale (s - row_max)). Whether any row needs its correction.
  template <int kCols>
  __device__ __forceinline__ bool weigh(RegTile<float, 16, kCols>& scores) {
    const float factor = scale_log2;
    const PerRow<16> before = row_max;
    warp::fold_row_max(row_max, scores);
    warp::finish_row_max(row_max);
    warp::zip(row_max, before, row_max,
              [=](float old, float now) { return (now - old) * factor <= kSlack ? old : now; });
    PerRow<16> shift;
    warp::map(shift, row_max, [=](float x) { return shift_of(x, factor); });
    // From one rounded shift to the next, so one where it stays: what a fused multiply-add keeps of
    // the product would enter the sum anew with every block.
    warp::zip(correction, before, shift,
              [=](float old, float now) { return math::exp2(math::mul(old, factor) - now); });
    warp::map_rows(scores, scores, shift,
                   [=](float s, float now) { return math::exp2(s * factor - now); });
    // The block's own sum first: adding each weight to the running sum would round as often.
    PerRow<16> block_sum;
    warp::fill(block_sum, 0.0f);
    warp::fold_row_sum(block_sum, scores);
    warp::zip(row_sum, row_sum, correction, [](float sum, float c) { return sum * c; });
    warp::zip(excess, excess, correction, [](float e, float c) { return e * c; });
    warp::zip(block_sum, block_sum, excess, [](float block, float e) { return block - e; });
    warp::zip(excess, row_sum, block_sum, [](float sum, float block) { return sum + block - sum; });
    warp::zip(excess, excess, block_sum, [](float added, float block) { return added - block; });
    warp::zip(row_sum, row_sum, block_sum, [](float sum, float block) { return sum + block; });
    return warp::any_row(before, row_max, [](float old, float now) { return old != now; });
  }

  // Completes the sums and returns lse = scale row_max + ln(row_sum), -inf for a row without a key.
  __device__ __forceinline__ PerRow<16> finish(float scale) {
    warp::zip(row_sum, row_sum, excess, [](float sum, float e) { return sum - e; });
    warp::finish_row_sum(row_sum);
    PerRow<16> lse;
    const float factor = scale_log2;
    warp::zip(lse, row_max, row_sum, [=](float m, float sum) {
      // Weights are relative to the rounded shift: what it is short of m is in the sum.
      const float shift = shift_of(m, factor);
      const float rest = m == -kInfinity ? 0.0f : math::fma(m, factor, -shift);
      return math::fma(m, scale, math::log(sum) - rest * kLn2);
    });
    return lse;
  }

  // The exponent of two that weights are relative to; 0 for a row that has seen no key.
  __device__ __forceinline__ static float shift_of(float row_max, float scale_log2) {
    return row_max == -kInfinity ? 0.0f : math::mul(row_max, scale_log2);
  }

  // 1 / row_sum, and 0 for a row without a key.
  __device__ __forceinline__ PerRow<16> inverse_sum() const {
    PerRow<16> inverse;
    warp::map(inverse, row_sum, [](float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; });
    return inverse;
  }
};

}  // namespace tk::attention
