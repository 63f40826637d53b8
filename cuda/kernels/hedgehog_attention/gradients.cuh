// What both kernels of the backward pass do to the scores of near keys and to features.
//
// With w = exp(s - m), Z the divisor of a query, delta = dout out and a = (dout v - delta) / Z, the
// gradient of the weight before division:
//   dbeta = sum of w a,  ds = beta (w a - [s = m] peak) scale,  peak = sum of w a / how many s = m
// because m is the largest of all s, and all weights are relative to it. Keys are the largest where
// w is exactly 1.
// Of features e = softmax(y), with gradients g: dy = e (g - sum of e g).
#pragma once

#include "kernels/hedgehog_attention/documents.cuh"
#include "kernels/hedgehog_attention/features.cuh"
#include "kernels/hedgehog_attention/window.cuh"
#include "tk/tk.cuh"

namespace tk::hedgehog_attention {

template <typename T_, int kKeyDim_, int kValueDim_, bool kDocuments_>
struct GradientsTraits {
  using T = T_;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr bool kDocuments = kDocuments_;
};

// What is known of a chunk's queries.
struct QueryRows {
  PerRow<16> inverse;  // 1 / Z, or 0
  PerRow<16> delta;
};

// a from dout v.
__device__ __forceinline__ void weight_gradients(Square& dst, const Square& src,
                                                 const QueryRows& rows) {
  warp::map_rows(dst, src, rows.delta, [](float x, float delta) { return x - delta; });
  warp::mul_rows(dst, dst, rows.inverse);
}

// ds from a, in place; factor is beta scale.
__device__ __forceinline__ void score_gradients(Square& gradients, const Square& weights,
                                                const PerRow<16>& peaks, float factor) {
  Square at_peak;
  warp::map_rows(at_peak, weights, peaks,
                 [](float w, float peak) { return w == 1.0f ? peak : 0.0f; });
  warp::mul(gradients, gradients, weights);
  warp::zip(gradients, gradients, at_peak,
            [=](float wa, float peak) { return (wa - peak) * factor; });
}

// From features and their gradients, in place, the gradient of the scores y; what `dot` was given
// it adds the products of both to.
__device__ __forceinline__ void softmax_gradients(Square& gradients, const Square& features,
                                                  PerRow<16>& dot, float factor) {
  PerRow<16> sums;
  warp::zero(sums);
  warp::fold_row_dot(sums, features, gradients);
  warp::finish_row_sum(sums);
  warp::zip(dot, dot, sums, [](float x, float y) { return x + y; });
  warp::sub_rows(gradients, gradients, sums);
  warp::zip(gradients, gradients, features, [=](float g, float e) { return g * e * factor; });
}

}  // namespace tk::hedgehog_attention
