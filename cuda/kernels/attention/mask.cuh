// Which keys a query sees, by blocks and within a block.
#pragma once

#include "kernels/attention/attention.h"
#include "tk/tk.cuh"

namespace tk::attention {

// The keys from begin to end that some query of a tile sees, and those that all of them see.
struct VisibleKeys {
  int begin, end;
  int all_begin, all_end;
};

// The tile is queries first_query .. first_query + queries - 1, those beyond seqlen_q left out.
template <Mask kMask>
__device__ __forceinline__ VisibleKeys visible_keys(int first_query, int queries, int seqlen_q,
                                                    int seqlen_kv, int first_offset,
                                                    int last_offset) {
  VisibleKeys keys = {0, seqlen_kv, 0, seqlen_kv};
  const auto within = [=](int key) { return max(0, min(seqlen_kv, key)); };
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
                                            int seqlen_kv, int first_offset, int last_offset) {
  const int end = seqlen_kv - first_key, apart = first_query - first_key;
  if constexpr (kMask == Mask::kNone) {
    warpgroup::keep_cols_before(scores, end, -kInfinity);
  } else {
    warpgroup::keep_lower_before(scores, apart + last_offset, end, -kInfinity);
  }
  if constexpr (kMask == Mask::kBand) {
    warpgroup::keep_upper(scores, apart + first_offset, -kInfinity);
  }
}

// The same for transposed scores: 64 keys, as rows, against a block of queries.
template <Mask kMask, typename Tile>
__device__ __forceinline__ void mask_transposed_scores(Tile& scores, int first_query, int first_key,
                                                       int seqlen_kv, int first_offset,
                                                       int last_offset) {
  const int end = seqlen_kv - first_key, apart = first_key - first_query;
  if constexpr (kMask == Mask::kNone) {
    warpgroup::keep_rows_before(scores, end, -kInfinity);
  } else {
    warpgroup::keep_upper_before(scores, apart - last_offset, end, -kInfinity);
  }
  if constexpr (kMask == Mask::kBand) {
    warpgroup::keep_lower(scores, apart - first_offset, -kInfinity);
  }
}

// Heads (of all batch entries) whose keys and values share L2 while their queries are walked: 32 MB
// of its 50.
__device__ __forceinline__ int heads_in_l2(int seqlen_kv, int bytes_per_key) {
  const int64 bytes = static_cast<int64>(seqlen_kv) * bytes_per_key;
  return max(1, static_cast<int>((32 << 20) / bytes));
}

}  // namespace tk::attention
