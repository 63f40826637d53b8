// The softmax over keys that come block by block.
//
// Sums and outputs are relative to row_max, which follows the largest score so far but lags behind
// it: as long as a row's scores exceed it by less than 2^8 after scaling, it stays, and nothing
// that came before needs correcting (FlashAttention-4's lazy rescaling; the result is the same but
// for rounding). A row that has seen no key has row_max -inf, and everything stays zero. Scores are
// unscaled; scale is positive and comes with the exponential, as one multiply-add.
//
// Of a block whose keys are all seen, no maximum need be looked for: sums and outputs are floating
// point, so that weights of any size have their precision, and a maximum of earlier blocks does
// until weights grow large (FlashDecoding++, Hong et al. 2023, section 3, whose maximum is set in
// advance). Then a lane's sum of them says by how much it moves. A weight that overflowed leaves a
// sum that is no number: `holds` tells, and somebody has to start again.
#pragma once

#include "tk/tk.cuh"

namespace tk::attention {

// With kAnyScores a score may be so large that scale / ln 2 times it is no number: differences are
// what is multiplied then. Otherwise the multiple and the difference are one operation.
template <bool kAnyScores>
struct OnlineSoftmax {
  static constexpr float kSlack = 8.0f;  // in powers of two
  // Sums of a lane's weights of a block: from which on the maximum moves, and beyond which it is
  // too late for it, since what corrects them would vanish.
  static constexpr float kLargeSum = 0x1p8f, kHugeSum = 0x1p100f;

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

  // Scores of the first block become weights exp(scale (s - row_max)).
  template <int kCols>
  __device__ __forceinline__ void start(RegTile<float, 16, kCols>& scores) {
    const float factor = scale_log2;
    warp::row_max(row_max, scores);
    PerRow<16> shift;
    warp::map(shift, row_max, [=](float x) { return shift_of(x, factor); });
    warp::map_rows(scores, scores, shift,
                   [=](float s, float now) { return weight(s, factor, now); });
    warp::fill(row_sum, 0.0f);
    warp::fold_row_sum(row_sum, scores);
    warp::fill(excess, 0.0f);
  }

  // The same of another block. Whether any row needs its correction.
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
    warp::zip(correction, before, shift, [=](float old, float now) {
      if constexpr (kAnyScores) return math::exp2((old - now) * factor);
      return math::exp2(math::mul(old, factor) - now);
    });
    warp::map_rows(scores, scores, shift,
                   [=](float s, float now) { return weight(s, factor, now); });
    PerRow<16> block_sum;
    warp::fill(block_sum, 0.0f);
    warp::fold_row_sum(block_sum, scores);
    correct_sums();
    add(block_sum);
    return warp::any_row(before, row_max, [](float old, float now) { return old != now; });
  }

  // The same of a block of which every row sees keys, relative to a maximum that is not looked for
  // again, and their conversion. The first kFirst keys are weighed before `wait`, which waits for
  // the product that reads the weights before these, the others after it. `unit(x)` times x is a
  // score in powers of two, x being what `scores` has of it: scale_log2 where it has the score.
  template <int kFirst, int kCols, typename Weights, typename Unit, typename Wait>
  __device__ __forceinline__ bool weigh_by_old_max(RegTile<float, 16, kCols>& scores,
                                                   Weights& weights, Unit&& unit, Wait&& wait) {
    const float factor = scale_log2;
    PerRow<16> shift, block_sum;
    warp::map(shift, row_max, [=](float x) { return math::mul(x, factor); });
    const auto weigh = [=](float s, float now) { return math::exp2(s * unit(s) - now); };
    warp::fill(block_sum, 0.0f);
    if constexpr (kFirst > 0) {
      auto first = warp::part<0, kFirst>(scores);
      warp::map_rows(first, first, shift, weigh);
      warp::fold_row_sum(block_sum, first);
      warp::set_part<0>(scores, first);
      warp::pin(block_sum);
    }
    wait();
    auto second = warp::part<kFirst, kCols - kFirst>(scores);
    warp::map_rows(second, second, shift, weigh);
    warp::fold_row_sum(block_sum, second);
    warp::set_part<kFirst>(scores, second);
    warp::convert(weights, scores);
    const bool grows =
        warp::any_row(block_sum, block_sum, [](float sum, float) { return sum > kLargeSum; });
    if (grows) {
      const float per_factor = math::reciprocal(factor);
      const PerRow<16> before = row_max;
      PerRow<16> largest = block_sum;
      warp::finish_row_max(largest);
      warp::zip(row_max, before, largest, [=](float old, float sum) {
        if (sum > kHugeSum) return kInfinity - kInfinity;
        return sum > kLargeSum ? old + math::log2(sum) * per_factor : old;
      });
      warp::zip(correction, before, row_max, [=](float old, float now) {
        return math::exp2(math::mul(old, factor) - math::mul(now, factor));
      });
      warp::mul_rows(scores, scores, correction);
      warp::convert(weights, scores);
      warp::zip(block_sum, block_sum, correction, [](float sum, float c) { return sum * c; });
      correct_sums();
    }
    add(block_sum);
    return grows;
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
      const float rest = kAnyScores || m == -kInfinity ? 0.0f : math::fma(m, factor, -shift);
      return math::fma(m, scale, math::log(sum) - rest * kLn2);
    });
    return lse;
  }

  // After finish: what rounding took off lse = row_max + ln(row_sum), exact where row_max is the
  // larger. Of scores that are all huge it is all that tells how many there are.
  __device__ __forceinline__ PerRow<16> lse_rest(const PerRow<16>& lse) const {
    static_assert(kAnyScores, "row_max counts as the scores do");
    PerRow<16> rest;
    warp::zip(rest, row_max, lse, [](float m, float sum) { return m - sum; });
    warp::zip(rest, rest, row_sum,
              [](float x, float sum) { return sum == 0.0f ? 0.0f : x + math::log(sum); });
    return rest;
  }

  // What weights are relative to, an exponent of two or, with kAnyScores, a score; 0 for a row that
  // has seen no key.
  __device__ __forceinline__ static float shift_of(float row_max, float scale_log2) {
    if (row_max == -kInfinity) return 0.0f;
    return kAnyScores ? row_max : math::mul(row_max, scale_log2);
  }
  __device__ __forceinline__ static float weight(float score, float scale_log2, float shift) {
    if constexpr (kAnyScores) return math::exp2((score - shift) * scale_log2);
    return math::exp2(score * scale_log2 - shift);
  }

  // After finish: whether all weights of all of the warp's rows were finite.
  __device__ __forceinline__ bool holds() const {
    return !warp::any_row(row_sum, row_sum, [](float sum, float) { return !(sum < kInfinity); });
  }

  // 1 / row_sum, and 0 for a row without a key.
  __device__ __forceinline__ PerRow<16> inverse_sum() const {
    PerRow<16> inverse;
    warp::map(inverse, row_sum, [](float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; });
    return inverse;
  }

 private:
  __device__ __forceinline__ void correct_sums() {
    warp::zip(row_sum, row_sum, correction, [](float sum, float c) { return sum * c; });
    warp::zip(excess, excess, correction, [](float e, float c) { return e * c; });
  }
  // The sums of a block: adding each weight to the running sum would round as often.
  __device__ __forceinline__ void add(PerRow<16>& block_sum) {
    warp::zip(block_sum, block_sum, excess, [](float block, float e) { return block - e; });
    warp::zip(excess, row_sum, block_sum, [](float sum, float block) { return sum + block - sum; });
    warp::zip(excess, excess, block_sum, [](float added, float block) { return added - block; });
    warp::zip(row_sum, row_sum, block_sum, [](float sum, float block) { return sum + block; });
  }
};

}  // namespace tk::attention
