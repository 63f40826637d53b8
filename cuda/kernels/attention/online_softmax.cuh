// The softmax over keys that come block by block.
//
// After each block, row_max is the largest score so far, and sums and outputs are relative to it:
// weigh returns what earlier ones are to be multiplied by. A row that has seen no key has row_max
// -inf, and everything stays zero. Scores are unscaled; scale is positive and comes with the
// exponential, as one multiply-add.
#pragma once

#include "tk/tk.cuh"

namespace tk::attention {

struct OnlineSoftmax {
  PerRow<16> row_max;
  PerRow<16> row_sum;  // each lane's part; whole after finish
  float scale_log2;    // scale / ln 2

  __device__ __forceinline__ explicit OnlineSoftmax(float scale_log2) : scale_log2(scale_log2) {
    warp::fill(row_max, -kInfinity);
    warp::fill(row_sum, 0.0f);
  }

  // Scores become weights exp(scale (s - row_max)). Returns the correction of what came before.
  template <int kCols>
  __device__ __forceinline__ PerRow<16> weigh(RegTile<float, 16, kCols>& scores) {
    PerRow<16> correction = row_max;
    warp::fold_row_max(row_max, scores);
    warp::finish_row_max(row_max);
    PerRow<16> shift;
    const float factor = scale_log2;
    warp::map(shift, row_max, [=](float x) { return x == -kInfinity ? 0.0f : x * factor; });
    warp::zip(correction, correction, shift,
              [=](float before, float now) { return ptx::exp2(before * factor - now); });
    warp::map_rows(scores, scores, shift,
                   [=](float s, float now) { return ptx::exp2(s * factor - now); });
    warp::zip(row_sum, row_sum, correction, [](float sum, float c) { return sum * c; });
    warp::fold_row_sum(row_sum, scores);
    return correction;
  }

  // Completes the sums and returns lse = scale row_max + ln(row_sum), -inf for a row without a key.
  __device__ __forceinline__ PerRow<16> finish(float scale) {
    warp::finish_row_sum(row_sum);
    PerRow<16> lse;
    warp::zip(lse, row_max, row_sum,
              [=](float m, float sum) { return m * scale + ptx::log2(sum) * kLn2; });
    return lse;
  }

  // 1 / row_sum, and 0 for a row without a key.
  __device__ __forceinline__ PerRow<16> inverse_sum() const {
    PerRow<16> inverse;
    warp::map(inverse, row_sum, [](float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; });
    return inverse;
  }
};

}  // namespace tk::attention
