// The gates of a chunk: what is left of one token, or of the state, at another.
//
// With a running sum a in base 2 (chunk_sums.cuh), exp2(a_i - a_j) of token j is left at token i,
// exp2(a_i) of the state before the chunk, and exp2(a_last - a_j) of token j after it. Exponents
// are differences of sums and at most 0 wherever gates are: nothing is formed from its two halves.
// A document that starts within the chunk ends what came before it: tokens see each other only
// where as many documents have started, and the state where none has.
#pragma once

#include "kernels/linear_attention/linear_attention.h"
#include "tk/tk.cuh"

namespace tk::linear_attention {

using TokenVec = SharedVec<float, kChunk>;

// Numbers of a chunk's tokens in registers, as columns: for kernels that use them more than once.
template <unsigned kFeatures>
struct GateColumns {
  PerCol<kChunk> sums;
  PerCol<kChunk> weights;  // with kWeights
};

template <unsigned kFeatures>
struct ChunkGates {
  TokenVec sums;
  TokenVec weights;  // with kWeights
  TokenVec counts;   // with kCounts

  static constexpr int kBytes =
      TokenVec::kBytes * (1 + ((kFeatures & kWeights) != 0) + ((kFeatures & kCounts) != 0));

  // One thread: the gates of a chunk of a head, row = batch * num_heads + head.
  __device__ __forceinline__ void load(const Gates& gates, Barrier& full, int row, int batch,
                                       int chunk, int chunks) {
    const int first = (row * chunks + chunk) * kChunk;  // below 2^31, as B * H * T is
    tma::load(sums, gates.sums + first, full);
    if constexpr ((kFeatures & kWeights) != 0) tma::load(weights, gates.weights + first, full);
    if constexpr ((kFeatures & kCounts) != 0) {
      tma::load(counts, gates.counts + (batch * chunks + chunk) * kChunk, full);
    }
  }

  // The same number that total() is, from memory.
  __device__ __forceinline__ static float load_total(const Gates& gates, int row, int batch,
                                                     int chunk, int chunks) {
    if constexpr ((kFeatures & kCounts) != 0) {
      const int last = (batch * chunks + chunk) * kChunk + kChunk - 1;
      if (load_scalar(gates.counts + last) > 0) return 0.0f;
    }
    return math::exp2(load_scalar(gates.sums + (row * chunks + chunk) * kChunk + kChunk - 1));
  }

  __device__ __forceinline__ void load_columns(GateColumns<kFeatures>& cols) const {
    warp::load(cols.sums, sums);
    if constexpr ((kFeatures & kWeights) != 0) warp::load(cols.weights, weights);
  }

  // Of the state before the chunk, what is left after it.
  __device__ __forceinline__ float total() const {
    if constexpr ((kFeatures & kCounts) != 0) {
      if (load_element(counts, kChunk - 1) > 0) return 0.0f;
    }
    return math::exp2(load_element(sums, kChunk - 1));
  }

  // For each of a warpgroup's rows, which are tokens: of the state before the chunk, what is left.
  __device__ __forceinline__ void before(PerRow<16>& rows) const {
    warpgroup::load(rows, sums);
    warp::map(rows, rows, [](float a) { return math::exp2(a); });
    if constexpr ((kFeatures & kCounts) != 0) {
      PerRow<16> started;
      warpgroup::load(started, counts);
      warp::zip(rows, rows, started, [](float x, float n) { return n > 0 ? 0.0f : x; });
    }
  }
  // Of each of them, what is left after the chunk.
  __device__ __forceinline__ void after(PerRow<16>& rows) const {
    const float last = load_element(sums, kChunk - 1);
    warpgroup::load(rows, sums);
    warp::map(rows, rows, [=](float a) { return math::exp2(last - a); });
    if constexpr ((kFeatures & kCounts) != 0) {
      const float documents = load_element(counts, kChunk - 1);
      PerRow<16> started;
      warpgroup::load(started, counts);
      warp::zip(rows, rows, started, [=](float x, float n) { return n < documents ? 0.0f : x; });
    }
  }

  // What scale_cols_before and scale_cols_after multiply a token's column by, without documents: of
  // a quarter's tokens, which are a warp's rows.
  __device__ __forceinline__ void factors_before(PerRow<16>& rows, int quarter,
                                                 float factor) const {
    static_assert((kFeatures & kCounts) == 0, "documents make columns zero, whatever is in them");
    warp::load(rows, part<16>(sums, quarter));
    warp::map(rows, rows, [=](float a) { return math::exp2(a) * factor; });
  }
  __device__ __forceinline__ void factors_after(PerRow<16>& rows, int quarter) const {
    static_assert((kFeatures & kCounts) == 0, "documents make columns zero, whatever is in them");
    const float last = load_element(sums, kChunk - 1);
    warp::load(rows, part<16>(sums, quarter));
    warp::map(rows, rows, [=](float a) { return math::exp2(last - a); });
    if constexpr ((kFeatures & kWeights) != 0) {
      PerRow<16> of_tokens;
      warp::load(of_tokens, part<16>(weights, quarter));
      warp::mul(rows, rows, of_tokens);
    }
  }

  // A tile whose columns are tokens, times what is left of the state before the chunk at each, and
  // times a factor.
  template <typename Tile>
  __device__ __forceinline__ void scale_cols_before(Tile& tile, float factor) const {
    GateColumns<kFeatures> cols;
    warp::load(cols.sums, sums);
    scale_cols_before(tile, cols, factor);
  }
  template <typename Tile>
  __device__ __forceinline__ void scale_cols_before(Tile& tile, const GateColumns<kFeatures>& cols,
                                                    float factor = 1.0f) const {
    PerCol<kChunk> left;
    warp::map(left, cols.sums, [=](float a) { return math::exp2(a) * factor; });
    warp::mul_cols(tile, tile, left);
    if constexpr ((kFeatures & kCounts) != 0) {
      warp::map_cols(tile, tile, counts, [](float x, float n) { return n > 0 ? 0.0f : x; });
    }
  }
  // The same times each token's weight and what is left of it after the chunk, and a factor.
  template <typename Tile>
  __device__ __forceinline__ void scale_cols_after(Tile& tile, float factor = 1.0f) const {
    GateColumns<kFeatures> cols;
    load_columns(cols);
    scale_cols_after(tile, cols, factor);
  }
  template <typename Tile>
  __device__ __forceinline__ void scale_cols_after(Tile& tile, const GateColumns<kFeatures>& cols,
                                                   float factor = 1.0f) const {
    const float last = load_element(sums, kChunk - 1);
    PerCol<kChunk> left;
    warp::map(left, cols.sums, [=](float a) { return math::exp2(last - a) * factor; });
    if constexpr ((kFeatures & kWeights) != 0) warp::mul(left, left, cols.weights);
    warp::mul_cols(tile, tile, left);
    if constexpr ((kFeatures & kCounts) != 0) {
      const float documents = load_element(counts, kChunk - 1);
      warp::map_cols(tile, tile, counts,
                     [=](float x, float n) { return n < documents ? 0.0f : x; });
    }
  }

  // Of each of a warpgroup's rows, which are tokens: its weight.
  __device__ __forceinline__ void load_weights(PerRow<16>& rows) const {
    if constexpr ((kFeatures & kWeights) != 0) {
      warpgroup::load(rows, weights);
    } else {
      warp::fill(rows, 1.0f);
    }
  }

  // Weights of scores q k^T, of tokens i in rows and j in columns, where j <= i: zero beyond.
  // `cols` are these gates' columns, or the gates themselves.
  template <typename Weights, typename Scores, typename Columns>
  __device__ __forceinline__ void apply(Weights& dst, const Scores& scores,
                                        const Columns& cols) const {
    PerRow<16> rows;
    warpgroup::load(rows, sums);
    if constexpr ((kFeatures & kWeights) != 0) {
      warpgroup::map_lower(
          dst, scores, rows, cols.sums, cols.weights,
          [](float s, float end, float start, float w) { return s * w * math::exp2(end - start); });
    } else {
      warpgroup::map_lower(dst, scores, rows, cols.sums, [](float s, float end, float start) {
        return s * math::exp2(end - start);
      });
    }
    if constexpr ((kFeatures & kCounts) != 0) {
      warpgroup::load(rows, counts);
      warpgroup::map_lower(dst, dst, rows, counts,
                           [](float s, float at, float of) { return at == of ? s : 0.0f; });
    }
  }

  // Of gradients dp of scores so weighted, tokens i in rows and j in columns: adds dp D w, those of
  // the scores as they were, to dscores, and rowsum(dp D w * scores) but for the diagonal, which no
  // gate reaches, to received, whose parts are finished later.
  template <typename Square>
  __device__ __forceinline__ void fold_scores(Square& dscores, PerRow<16>& received,
                                              const Square& dp, const Square& scores) const {
    PerRow<16> on_diagonal;
    warp::zero(on_diagonal);
    with_tokens<(kFeatures & kWeights) != 0>([&](const auto& rows, const auto& cols) {
      warpgroup::fold_lower(dscores, received, on_diagonal, dp, scores, rows, cols,
                            [](float& sum, float dp, float s, const auto& end, const auto& start) {
                              float x = math::exp2(end[0] - start[0]);
                              if constexpr ((kFeatures & kWeights) != 0) x *= start[1];
                              x *= dp;
                              if (!is_seen(end, start)) return 0.0f;
                              sum += x;
                              return x * s;
                            });
    });
  }
  // The other way round, tokens j in rows and i in columns: weighted becomes scores D, without the
  // tokens' weights, which are their rows'; and their products with dp are summed in given, or
  // those of tokens with themselves in kept.
  template <typename Operand, typename Square>
  __device__ __forceinline__ void fold_transposed(Operand& weighted, PerRow<16>& given,
                                                  PerRow<16>& kept, const Square& dp,
                                                  const Square& scores) const {
    warp::zero(weighted);
    with_tokens<false>([&](const auto& rows, const auto& cols) {
      warpgroup::fold_upper(weighted, given, kept, dp, scores, rows, cols,
                            [](float& p, float dp, float s, const auto& start, const auto& end) {
                              if (!is_seen(start, end)) return 0.0f;
                              p = s * math::exp2(end[0] - start[0]);
                              return p * dp;
                            });
    });
  }

 private:
  // Calls f with the vectors of rows and of columns that functions of two tokens take: sums, then
  // of the columns weights, and counts last.
  template <bool kWeighted, typename F>
  __device__ __forceinline__ void with_tokens(F&& f) const {
    constexpr bool kCounted = (kFeatures & kCounts) != 0;
    PerRow<16> row_sums, row_counts;
    const PerRow<16>* rows[1 + kCounted] = {&row_sums};
    const TokenVec* cols[1 + kWeighted + kCounted] = {&sums};
    warpgroup::load(row_sums, sums);
    if constexpr (kWeighted) cols[1] = &weights;
    if constexpr (kCounted) {
      warpgroup::load(row_counts, counts);
      rows[1] = &row_counts;
      cols[1 + kWeighted] = &counts;
    }
    f(rows, cols);
  }
  // Whether two tokens are of one document, where there are any.
  template <int kM, int kN>
  __device__ __forceinline__ static bool is_seen(const float (&row)[kM], const float (&col)[kN]) {
    return (kFeatures & kCounts) == 0 || row[kM - 1] == col[kN - 1];
  }
};

// The state after a chunk, from that before it.
template <typename State, typename Gates, typename KeyTile, typename ValueTile>
__device__ __forceinline__ void step_on(State& state, const Gates& gates, const KeyTile& k_smem,
                                        const ValueTile& v_smem) {
  RegTile<typename ValueTile::T, 16, kChunk> values;
  warpgroup::load_transposed(values, v_smem);
  gates.scale_cols_after(values);
  warp::mul(state, state, gates.total());
  warpgroup::mma_AB(state, values, k_smem);
  warpgroup::mma_commit();
  warpgroup::mma_wait<0>(state, values);
}
// The gradient of the state before a chunk, from that of the state after it.
template <typename State, typename Gates, typename KeyTile, typename ValueTile>
__device__ __forceinline__ void step_back(State& dstate, const Gates& gates, const KeyTile& q_smem,
                                          const ValueTile& dout_smem, float scale) {
  RegTile<typename ValueTile::T, 16, kChunk> values;  // a row for each column of dout
  warpgroup::load_transposed(values, dout_smem);
  gates.scale_cols_before(values, scale);
  warp::mul(dstate, dstate, gates.total());
  warpgroup::mma_AB(dstate, values, q_smem);
  warpgroup::mma_commit();
  warpgroup::mma_wait<0>(dstate, values);
}

}  // namespace tk::linear_attention
