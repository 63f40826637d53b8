// Which keys a query sees, by blocks and within a block.
#pragma once

#include "kernels/attention/attention.h"
#include "tk/tk.cuh"

namespace tk::attention {

// A batch element's lengths, and where its diagonals are: query i sees keys from i + first_offset
// to i + last_offset.
struct Bounds {
  int seqlen_q, seqlen_kv;
  int first_offset, last_offset;
};

template <unsigned kFeatures, typename Params>
__device__ __forceinline__ Bounds bounds_of(const Params& params, int batch) {
  Bounds bounds = {params.seqlen_q, params.seqlen_kv, params.first_offset, params.last_offset};
  if constexpr ((kFeatures & kLengths) != 0) {
    const Extras& extras = params.extras;
    const auto within = [=](const int* lengths, int size) {
      return lengths == nullptr ? size : max(0, min(size, load_scalar(lengths + batch)));
    };
    bounds.seqlen_q = within(extras.query_lengths, params.seqlen_q);
    bounds.seqlen_kv = within(extras.kv_lengths, params.seqlen_kv);
    const int diagonal = extras.bottom_right ? bounds.seqlen_kv - bounds.seqlen_q : 0;
    bounds.first_offset = diagonal + extras.window_first;
    bounds.last_offset = diagonal + extras.window_last;
  }
  return bounds;
}

// A batch element's segment ids, and a head's part of a mask.
template <typename Params>
__device__ __forceinline__ GlobalVec<const int> query_segments(const Params& params, int batch) {
  const int64 first = static_cast<int64>(batch) * params.seqlen_q;
  return {params.extras.q_segments + first, params.seqlen_q};
}
template <typename Params>
__device__ __forceinline__ GlobalVec<const int> key_segments(const Params& params, int batch) {
  const int64 first = static_cast<int64>(batch) * params.seqlen_kv;
  return {params.extras.kv_segments + first, params.seqlen_kv};
}
__device__ __forceinline__ BitView bits_of_head(const MaskBits& mask, int batch, int head) {
  return {mask.words + batch * mask.batch_stride + head * mask.head_stride, mask.row_stride,
          mask.word_stride};
}

// The keys from begin to end that some query of a tile sees, and those that all of them see.
struct VisibleKeys {
  int begin, end;
  int all_begin, all_end;
};

// The tile is queries first_query .. first_query + queries - 1, those beyond seqlen_q left out.
template <Mask kMask>
__device__ __forceinline__ VisibleKeys visible_keys(int first_query, int queries,
                                                    const Bounds& bounds) {
  const auto [seqlen_q, seqlen_kv, first_offset, last_offset] = bounds;
  VisibleKeys keys = {0, seqlen_kv, 0, seqlen_kv};
  const auto within = [seqlen_kv](int key) { return max(0, min(seqlen_kv, key)); };
  const int last_query = min(first_query + queries, seqlen_q) - 1;
  if constexpr (kMask != Mask::kNone) {
    keys.end = within(last_query + last_offset + 1);
    keys.all_end = within(first_query + last_offset + 1);
  }
  if constexpr (kMask == Mask::kBand) {
    keys.begin = min(within(first_query + first_offset), keys.end);
    keys.all_begin = within(last_query + first_offset);
  }
  return keys;
}

// Scores of 64 queries against a block of keys: those a query does not see become -inf.
template <Mask kMask, typename Tile>
__device__ __forceinline__ void mask_scores(Tile& scores, int first_query, int first_key,
                                            const Bounds& bounds) {
  const int end = bounds.seqlen_kv - first_key, apart = first_query - first_key;
  if constexpr (kMask == Mask::kNone) {
    warpgroup::keep_cols_before(scores, end, -kInfinity);
  } else {
    warpgroup::keep_lower_before(scores, apart + bounds.last_offset, end, -kInfinity);
  }
  if constexpr (kMask == Mask::kBand) {
    warpgroup::keep_upper(scores, apart + bounds.first_offset, -kInfinity);
  }
}

// The same for transposed scores: 64 keys, as rows, against a block of queries. With lengths, no
// key is seen by queries beyond either.
template <Mask kMask, unsigned kFeatures, typename Tile>
__device__ __forceinline__ void mask_transposed_scores(Tile& scores, int first_query, int first_key,
                                                       const Bounds& bounds) {
  const int end = bounds.seqlen_kv - first_key, apart = first_key - first_query;
  if constexpr (kMask == Mask::kNone) {
    warpgroup::keep_rows_before(scores, end, -kInfinity);
  } else {
    warpgroup::keep_upper_before(scores, apart - bounds.last_offset, end, -kInfinity);
  }
  if constexpr (kMask == Mask::kBand) {
    warpgroup::keep_lower(scores, apart - bounds.first_offset, -kInfinity);
  }
  if constexpr ((kFeatures & kLengths) != 0) {
    warpgroup::keep_cols_before(scores, bounds.seqlen_q - first_query, -kInfinity);
  }
}

// A mask's bits for a tile of scores, where there is a mask.
struct NoBits {};
template <unsigned kFeatures, int kCols>
using TileBits = Select<(kFeatures & kMaskArray) != 0, RegBits<kCols>, NoBits>;

template <unsigned kFeatures, typename Bits>
__device__ __forceinline__ void load_bits(Bits& bits, const MaskBits& mask, int batch, int head,
                                          int first_row, int first_col) {
  if constexpr ((kFeatures & kMaskArray) != 0) {
    warpgroup::load(bits, bits_of_head(mask, batch, head), first_row, first_col);
  }
}

// What segments and a mask hide, in a block that is not visible as a whole.
template <unsigned kFeatures, typename Tile, typename Bits, typename Params>
__device__ __forceinline__ void mask_by_arrays(Tile& scores, const Bits& bits, const Params& params,
                                               int batch, int first_query, int first_key) {
  if constexpr ((kFeatures & kSegments) != 0) {
    warpgroup::keep_equal(scores, query_segments(params, batch), first_query,
                          key_segments(params, batch), first_key, -kInfinity);
  }
  if constexpr ((kFeatures & kMaskArray) != 0) warp::keep_where(scores, bits, -kInfinity);
}
template <unsigned kFeatures, typename Tile, typename Params>
__device__ __forceinline__ void mask_by_arrays(Tile& scores, const Params& params, int batch,
                                               int head, int first_query, int first_key) {
  TileBits<kFeatures, Tile::kCols> bits;
  load_bits<kFeatures>(bits, params.extras.mask, batch, head, first_query, first_key);
  mask_by_arrays<kFeatures>(scores, bits, params, batch, first_query, first_key);
}
// The same for transposed scores.
template <unsigned kFeatures, typename Tile, typename Params>
__device__ __forceinline__ void mask_transposed_by_arrays(Tile& scores, const Params& params,
                                                          int batch, int head, int first_query,
                                                          int first_key) {
  if constexpr ((kFeatures & kSegments) != 0) {
    warpgroup::keep_equal(scores, key_segments(params, batch), first_key,
                          query_segments(params, batch), first_query, -kInfinity);
  }
  if constexpr ((kFeatures & kMaskArray) != 0) {
    TileBits<kFeatures, Tile::kCols> bits;
    load_bits<kFeatures>(bits, params.extras.transposed_mask, batch, head, first_key, first_query);
    warp::keep_where(scores, bits, -kInfinity);
  }
}

// Queries beyond their length see no key, whatever has been computed for them: of 64, those from
// `end` on.
template <typename Output, typename Softmax>
__device__ __forceinline__ void hide_queries(Output& out, Softmax& softmax, int end) {
  if (end >= 64) return;
  warpgroup::keep_rows_before(out, end, 0.0f);
  const auto keep = [=](int row, float x, float hidden) { return row < end ? x : hidden; };
  warpgroup::for_each(softmax.row_max, [=](int row, float x) { return keep(row, x, -kInfinity); });
  warpgroup::for_each(softmax.row_sum, [=](int row, float x) { return keep(row, x, 0.0f); });
  warpgroup::for_each(softmax.excess, [=](int row, float x) { return keep(row, x, 0.0f); });
}

// Heads (of all batch entries) whose keys and values share L2 while their queries are walked: 32 MB
// of its 50.
__device__ __forceinline__ int heads_in_l2(int seqlen_kv, int bytes_per_key) {
  const int64 bytes = static_cast<int64>(seqlen_kv) * bytes_per_key;
  return max(1, static_cast<int>((32 << 20) / bytes));
}

}  // namespace tk::attention
