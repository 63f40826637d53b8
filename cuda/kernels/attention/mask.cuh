// Which keys a query sees, by blocks and within a block.
#pragma once

#include "tk/tk.cuh"

namespace tk::attention {

// Of the keys from 0 on, how many some query of a tile sees, and how many all of them see.
struct VisibleKeys {
  int any, all;
};

// The tile is queries first_query .. first_query + queries - 1, those beyond seqlen_q left out.
template <bool kCausal>
__device__ __forceinline__ VisibleKeys visible_keys(int first_query, int queries, int seqlen_q,
                                                    int seqlen_kv, int causal_offset) {
  if constexpr (!kCausal) return {seqlen_kv, seqlen_kv};
  const int end = min(first_query + queries, seqlen_q);
  return {max(0, min(seqlen_kv, end + causal_offset)),
          max(0, min(seqlen_kv, first_query + causal_offset + 1))};
}

// Scores of 64 queries against a block of keys: those a query does not see become -inf.
template <bool kCausal, typename Tile>
__device__ __forceinline__ void mask_scores(Tile& scores, int first_query, int first_key,
                                            int seqlen_kv, int causal_offset) {
  const int end = seqlen_kv - first_key;
  if constexpr (kCausal) {
    warpgroup::keep_lower_before(scores, first_query + causal_offset - first_key, end, -kInfinity);
  } else {
    warpgroup::keep_cols_before(scores, end, -kInfinity);
  }
}

// The same for transposed scores: 64 keys, as rows, against a block of queries.
template <bool kCausal, typename Tile>
__device__ __forceinline__ void mask_transposed_scores(Tile& scores, int first_query, int first_key,
                                                       int seqlen_kv, int causal_offset) {
  const int end = seqlen_kv - first_key;
  if constexpr (kCausal) {
    warpgroup::keep_upper_before(scores, first_key - first_query - causal_offset, end, -kInfinity);
  } else {
    warpgroup::keep_rows_before(scores, end, -kInfinity);
  }
}

// Heads (of all batch entries) whose keys and values share L2 while their queries are walked: 32 MB
// of its 50.
__device__ __forceinline__ int heads_in_l2(int seqlen_kv, int bytes_per_key) {
  const int64 bytes = static_cast<int64>(seqlen_kv) * bytes_per_key;
  return max(1, static_cast<int>((32 << 20) / bytes));
}

}  // namespace tk::attention
