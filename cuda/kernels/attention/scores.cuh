// What happens to scores between the product q k^T and the exponential, and the way back.
//
//   t = tanh(scale q k^T / cap), and scores are cap t + bias
//
// The exponential multiplies by a factor anyway. So without a bias the accumulators keep what the
// product gave, or with a cap hold t: the factor is scale or cap. With a bias they hold scores.
// Going back, ds is p (dp - delta) times the slope 1 - t^2, which a bias does not have.
// A bias may be the least number of its type, which masks are often added as: its multiple 1 / ln 2
// is no number. Beside a bias, what is exponentiated is therefore a difference of scores first, and
// a multiple of it then; lse comes to the backward pass as it is, and otherwise in base 2.
// A sink is one more score of every row, without a key and a value.
// Source: the cap is Gemma 2's (Gemma Team 2024, section 2); sinks after Xiao et al. 2023, section
// 3, in the form of gpt-oss.
#pragma once

#include "kernels/attention/attention.h"
#include "kernels/attention/online_softmax.cuh"
#include "tk/tk.cuh"

namespace tk::attention {

struct Nothing {};

// Shared rows that a consumer multiplies with again and again. Where registers are few, their
// descriptors are not kept from one product to the next.
template <bool kAfresh, typename Rows>
__device__ __forceinline__ decltype(auto) operand(const Rows& rows) {
  if constexpr (kAfresh) {
    return warpgroup::afresh(rows);
  } else {
    return (rows);
  }
}

template <typename T, unsigned kFeatures>
struct ScoreMap {
  static constexpr bool kCaps = (kFeatures & kSoftCap) != 0;
  static constexpr bool kAdds = (kFeatures & kBias) != 0;
  static constexpr bool kPairs = (kFeatures & kPairedBias) != 0;
  static constexpr bool kTiles = (kFeatures & kTiledBias) != 0;
  using BiasElement = Select<(kFeatures & kFloatBias) != 0, float, T>;
  template <int kCols>
  using BiasTile = Select<kAdds && !kTiles, RegTile<BiasElement, 16, kCols>, Nothing>;

  float gain;  // of the product, at first
  float cap;   // of what has been capped
  float unit;  // what the accumulators count in, once scores are in them

  __device__ __forceinline__ ScoreMap(float scale, const Extras& extras) {
    cap = kCaps ? extras.soft_cap : 1.0f;
    gain = kCaps ? scale / extras.soft_cap : kAdds ? scale : 1.0f;
    unit = kAdds ? 1.0f : kCaps ? cap : scale;
  }

  // The bias of 64 queries, as rows, and a block of keys. For calls between the start of a product
  // and the wait for it: values arrive meanwhile.
  template <typename Tile, typename Params>
  __device__ __forceinline__ static void load_bias(Tile& bias, const Params& params, int batch,
                                                   int head, int first_query, int first_key) {
    if constexpr (kAdds && !kTiles) {
      if constexpr (kPairs) {
        warpgroup::load_pairs(bias, bias_of(params, batch, head), first_query, first_key);
      } else {
        warpgroup::load(bias, bias_of(params, batch, head), first_query, first_key);
      }
    }
  }
  // The same for transposed scores, 64 keys as rows and a block of queries, beside a cap.
  template <typename Tile, typename Params>
  __device__ __forceinline__ static void load_transposed_bias(Tile& bias, const Params& params,
                                                              int batch, int head, int first_query,
                                                              int first_key) {
    if constexpr (kAdds) {
      warpgroup::load(bias, transposed_bias_of(params, batch, head), first_key, first_query);
    }
  }

  // The product becomes scores, in units of `unit`.
  template <typename Tile, typename Bias>
  __device__ __forceinline__ void apply(Tile& scores, const Bias& bias) const {
    apply_cap(scores);
    if constexpr (kAdds) {
      const float factor = kCaps ? cap : gain;
      warp::zip(scores, scores, bias, [=](float s, float b) { return math::fma(s, factor, b); });
    }
  }
  // The same with a bias in shared memory.
  template <typename Tile, typename Bias>
  __device__ __forceinline__ void apply_shared(Tile& scores, const Bias& bias) const {
    apply_cap(scores);
    const float factor = kCaps ? cap : gain;
    warpgroup::zip_shared(scores, bias, [=](float s, float b) { return math::fma(s, factor, b); });
  }
  // score in powers of two / product, where the product is so small that a cap's tanh is one of
  // these.
  __device__ __forceinline__ math::SmallTanhFactor small_unit() const {
    static_assert(kCaps && !kAdds, "what is in units of a cap");
    return {gain, cap * kLog2E};
  }
  // As far as a cap goes.
  template <typename Tile>
  __device__ __forceinline__ void apply_cap(Tile& scores) const {
    if constexpr (kCaps) warp::accurate_tanh(scores, scores, gain);
  }
  // As apply, with the bias read where it is added: the loads are spread over the instructions
  // before, not all of it needs registers at once, and nothing packs it.
  template <typename Tile, typename Params>
  __device__ __forceinline__ void apply_bias(Tile& scores, const Params& params, int batch,
                                             int head, int first_query, int first_key) const {
    apply_cap(scores);
    add(scores, bias_of(params, batch, head), first_query, first_key);
  }

  // The weight of a score, in units of 1 / `factor` of a power of two, relative to an lse.
  __device__ __forceinline__ static float power(float score, float factor, float lse) {
    if constexpr (kAdds) return math::exp2(math::mul(score - lse, factor));
    return math::exp2(score * factor - lse);
  }

  // On the way back, in two steps: to what tells hidden scores, which become -inf before the
  // second. With a cap that is tanh alone: the slope needs it without the bias.
  template <typename Tile, typename Params>
  __device__ __forceinline__ void begin_transposed(Tile& scores, const Params& params, int batch,
                                                   int head, int first_query, int first_key) const {
    if constexpr (kCaps) {
      apply_cap(scores);
    } else if constexpr (kAdds) {
      add(scores, transposed_bias_of(params, batch, head), first_key, first_query);
    }
  }
  // And to what ds is a multiple of: p, times the cap's slope. p itself goes to `weights`, rounded.
  // A column is a query, with its lse in shared memory or (without a cap) in registers.
  template <typename Weights, typename Tile, typename Bias, typename Lse>
  __device__ __forceinline__ void weigh(Weights& weights, Tile& scores, const Bias& bias,
                                        const Lse& lse) const {
    const float factor = (kCaps ? cap : unit) * kLog2E;
    if constexpr (kCaps) {
      const float range = cap;
      const auto weigh_one = [=](float t, float b, float l, float& p, float& p_slope) {
        const float bounded = math::max(t, -1.0f);  // a hidden score has no slope
        p = kAdds ? weight(t, range, b, l) : power(t, factor, l);
        p_slope = p * math::fma(-bounded, bounded, 1.0f);
      };
      if constexpr (kAdds) {
        warp::zip_cols_twice(weights, scores, scores, bias, lse, weigh_one);
      } else {
        warp::zip_cols_twice(weights, scores, scores, scores, lse,
                             [=](float t, float, float l, float& p, float& p_slope) {
                               weigh_one(t, 0.0f, l, p, p_slope);
                             });
      }
    } else {
      warp::map_cols(scores, scores, lse, [=](float s, float l) { return power(s, factor, l); });
      warp::convert(weights, scores);
    }
  }

  // For kernels of wide heads. The scores become p itself; where there is a cap, what ds is a
  // multiple of goes to `slopes`, rounded.
  template <typename Slopes, typename Tile, typename Bias, int kN>
  __device__ __forceinline__ void weigh_apart(Slopes& slopes, Tile& scores, const Bias& bias,
                                              const SharedVec<float, kN>& lse) const {
    if constexpr (kCaps && kAdds) {
      const float factor = cap;
      warp::zip_cols_twice(slopes, scores, scores, bias, lse,
                           [=](float t, float b, float l, float& p_slope, float& p) {
                             p = weight(t, factor, b, l);
                             p_slope = p * slope(t);
                           });
    } else if constexpr (kCaps) {
      const float factor = unit * kLog2E;
      warp::zip_cols_twice(slopes, scores, scores, scores, lse,
                           [=](float t, float, float l, float& p_slope, float& p) {
                             const float bounded = math::max(t, -1.0f);
                             p = math::exp2(t * factor - l);
                             p_slope = p * math::fma(-bounded, bounded, 1.0f);
                           });
    } else {
      const float factor = unit * kLog2E;
      warp::map_cols(scores, scores, lse, [=](float s, float l) { return power(s, factor, l); });
    }
  }
  // What ds is a multiple of alone, where a row is a query.
  template <typename Tile>
  __device__ __forceinline__ void weigh(Tile& scores, const PerRow<16>& lse) const {
    static_assert(!kCaps || !kAdds, "a bias is missing");
    const float factor = unit * kLog2E;
    warp::map_rows(scores, scores, lse, [=](float t, float l) {
      const float p = power(t, factor, l);
      if constexpr (!kCaps) return p;
      return p * slope(t);
    });
  }
  // The same of scores without their bias, which is read here: of the product, or of what has been
  // capped. So a bias comes after what hides scores.
  template <typename Tile, typename Params>
  __device__ __forceinline__ void weigh_with_bias(Tile& scores, const Params& params, int batch,
                                                  int head, int first_query, int first_key,
                                                  const PerRow<16>& lse) const {
    const float factor = kCaps ? cap : gain;
    Tile weights = scores;
    warpgroup::zip_global(weights, bias_of(params, batch, head), first_query, first_key,
                          [=](float t, float b) { return score(t, factor, b); });
    warp::map_rows(weights, weights, lse, [](float s, float l) { return power(s, kLog2E, l); });
    if constexpr (kCaps) {
      warp::zip(scores, scores, weights, [](float t, float p) { return p * slope(t); });
    } else {
      scores = weights;
    }
  }

 private:
  // A bias to what is capped, or to the product.
  template <typename Tile>
  __device__ __forceinline__ void add(Tile& scores, const GlobalView<const BiasElement>& bias,
                                      int row, int col) const {
    const float factor = kCaps ? cap : gain;
    warpgroup::zip_global(scores, bias, row, col,
                          [=](float s, float b) { return math::fma(s, factor, b); });
  }
  // Of what has no bias yet. A hidden score stays hidden, whatever its bias is.
  __device__ __forceinline__ static float score(float t, float factor, float bias) {
    const float score = math::fma(t, factor, bias);
    return t == -kInfinity ? t : score;
  }
  // The same and its weight.
  __device__ __forceinline__ static float weight(float t, float factor, float bias, float lse) {
    const float p = power(math::fma(t, factor, bias), kLog2E, lse);
    return t == -kInfinity ? 0.0f : p;
  }
  // Of the cap at t = tanh; a hidden score has none.
  __device__ __forceinline__ static float slope(float t) {
    const float bounded = math::max(t, -1.0f);
    return math::fma(-bounded, bounded, 1.0f);
  }

  // The bias of a head: queries as rows and keys as columns, or the other way round.
  template <typename Params>
  __device__ __forceinline__ static GlobalView<const BiasElement> bias_of(const Params& params,
                                                                          int batch, int head) {
    const ScoreArray& array = params.extras.bias;
    return {static_cast<const BiasElement*>(array.data) + batch * array.batch_stride +
                head * array.head_stride,
            params.seqlen_q, params.seqlen_kv, array.query_stride, array.key_stride};
  }
  template <typename Params>
  __device__ __forceinline__ static GlobalView<const BiasElement> transposed_bias_of(
      const Params& params, int batch, int head) {
    const auto bias = bias_of(params, batch, head);
    return {bias.data, bias.cols, bias.rows, bias.col_stride, bias.row_stride};
  }
};

// The sink of a head, for each row.
__device__ __forceinline__ PerRow<16> sink_of(const Extras& extras, int batch, int head) {
  const float* sink_gmem = extras.sinks + batch * extras.sinks_batch_stride + head;
  PerRow<16> sink;
  warpgroup::load(sink, GlobalVec<const float>{sink_gmem, 64, 0}, 0, 0.0f);
  return sink;
}

// The sink of a head joins softmaxes that are complete without it: lse, and 1 / row_sum.
__device__ __forceinline__ void join_sink(const OnlineSoftmax<false>&, PerRow<16>& lse,
                                          PerRow<16>& inverse_sum, const Extras& extras, int batch,
                                          int head) {
  if (extras.sinks == nullptr) return;
  PerRow<16> sink = sink_of(extras, batch, head), share;
  // Relative to the larger of both, 0 where neither is a number.
  const auto power = [](float x, float other) {
    const float top = math::max(x, other);
    return math::exp2((x - (top == -kInfinity ? 0.0f : top)) * kLog2E);
  };
  warp::zip(share, lse, sink, [=](float keys, float s) {
    const float part = power(keys, s), total = part + power(s, keys);
    return total == 0.0f ? 0.0f : part / total;
  });
  warp::zip(inverse_sum, inverse_sum, share, [](float x, float y) { return x * y; });
  warp::zip(lse, lse, sink, [=](float keys, float s) {
    return math::max(keys, s) + math::log(power(keys, s) + power(s, keys));
  });
}

// The same beside a bias, where lse alone need not tell how many keys there are. Apart: where there
// is no bias, other code at a tile's end makes the compiler order the loop before it anew.
__device__ __forceinline__ void join_sink(OnlineSoftmax<true>& softmax, PerRow<16>& lse,
                                          PerRow<16>& inverse_sum, const Extras& extras, int batch,
                                          int head) {
  if (extras.sinks == nullptr) return;
  PerRow<16> sink = sink_of(extras, batch, head), top, keys_part;
  const auto power = [](float x, float top) {
    return math::exp2((x - (top == -kInfinity ? 0.0f : top)) * kLog2E);
  };
  warp::zip(top, softmax.row_max, sink, [](float keys, float s) { return math::max(keys, s); });
  warp::zip(keys_part, softmax.row_max, top, power);
  warp::zip(sink, sink, top, power);
  warp::zip(softmax.row_sum, softmax.row_sum, keys_part, [](float x, float y) { return x * y; });
  warp::zip(softmax.row_sum, softmax.row_sum, sink, [](float x, float y) { return x + y; });
  softmax.row_max = top;
  warp::zip(inverse_sum, keys_part, softmax.row_sum,
            [](float part, float total) { return total == 0.0f ? 0.0f : part / total; });
  warp::zip(lse, top, softmax.row_sum, [](float x, float sum) { return x + math::log(sum); });
}

}  // namespace tk::attention
