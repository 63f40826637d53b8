// In which order key blocks meet the query blocks, and in which order they add to dq.
//
// A sum in floating point depends on its order, so deterministic dq needs one. It costs nothing
// where blocks that run together are never at the same query block at the same time, each a step
// behind the one before it, and add in just that order.
//
// A causal mask, where causal_longest_first says so: key blocks with most to do are started first,
// those of all heads side by side, so that none of them is left over at the end. All go down from
// the last query block, for which turns go from the lowest n up: whoever started together is soon
// apart by the time that a turn takes. Any other mask, or a block map: key block n starts at the
// first query block that sees it and goes up; a higher n starts further on, or later. All started
// together, the higher n is always ahead: turns go from the highest n down. Otherwise: of a group
// of blocks that run together, each starts at a different query block, evenly spread, goes up and
// wraps round: turns go by arrival. Groups follow one another.
#pragma once

#include "kernels/attention/block_map.cuh"
#include "kernels/attention/mask.cuh"

namespace tk::attention {

template <Mask kMask, unsigned kFeatures, int kHeadDim, int kBlockQ, int kBlockKv>
struct Turns {
  static constexpr bool kMapped = (kFeatures & kMapFeatures) != 0;
  // Whether turns go from the first key block up, or from the last down, rather than by arrival.
  static constexpr bool kAscending =
      kMask == Mask::kCausal && !kMapped && causal_longest_first(kHeadDim, kFeatures);
  static constexpr bool kDescending = !kAscending && (kMask != Mask::kNone || kMapped);

  int q_blocks;   // query blocks of the sequence
  int kv_blocks;  // key blocks
  int group;      // key blocks that take turns among themselves
  Bounds bounds;

  // Of a batch element whose lengths are its own. Key blocks beyond its keys meet no query.
  __device__ __forceinline__ void set_bounds(const Bounds& of_element) {
    bounds = of_element;
    q_blocks = ceil_div(bounds.seqlen_q, kBlockQ);
    kv_blocks = ceil_div(bounds.seqlen_kv, kBlockKv);
  }

  // The query blocks that key block n meets, in order: step i of steps(n) is at q_block(n, i).
  __device__ __forceinline__ int first_q_block(int n) const {
    if constexpr (kMask != Mask::kNone) {
      // The first whose last query sees key n * kBlockKv.
      return min(q_blocks, max(0, n * kBlockKv - bounds.last_offset) / kBlockQ);
    } else if constexpr (kMapped) {
      return 0;
    } else {
      int members = min(group, kv_blocks - n / group * group);
      if constexpr ((kFeatures & kLengths) != 0) members = max(1, members);
      return n % group * q_blocks / members;
    }
  }
  __device__ __forceinline__ int steps(int n) const {
    if constexpr ((kFeatures & kLengths) != 0) {
      if (n >= kv_blocks) return 0;
    }
    if constexpr (kMask == Mask::kBand) {
      // Up to the last whose first query sees the block's last key.
      const int last_query = min((n + 1) * kBlockKv, bounds.seqlen_kv) - 1 - bounds.first_offset;
      const int end = last_query < 0 ? 0 : last_query / kBlockQ + 1;
      return max(0, min(q_blocks, end) - first_q_block(n));
    } else if constexpr (kMask == Mask::kCausal) {
      return q_blocks - first_q_block(n);
    } else {
      return q_blocks;
    }
  }
  __device__ __forceinline__ int q_block(int first, int step) const {
    const int block = first + step;
    return block < q_blocks ? block : block - q_blocks;
  }

  // How many key blocks add to query block m before key block n does. `row` is m's, of a map.
  __device__ __forceinline__ int turn(int n, int m, const MapRow& row) const {
    if constexpr (kAscending) {
      return n;  // whoever sees a key sees those before it
    } else if constexpr (kDescending) {
      Bounds whole_block = bounds;
      whole_block.seqlen_q = (m + 1) * kBlockQ;
      const VisibleKeys keys = visible_keys<kMask>(m * kBlockQ, kBlockQ, whole_block);
      const int end = ceil_div(keys.end, kBlockKv);
      if constexpr (kMapped) return row.count(n + 1, end);
      return end - 1 - n;
    } else {
      const int first = n / group * group;
      const int members = min(group, kv_blocks - first);
      const int place = n - first;
      // The member that starts at m or most closely before it comes first.
      const int leader = min(members - 1, ceil_div((m + 1) * members, q_blocks) - 1);
      return first + (place <= leader ? leader - place : leader + members - place);
    }
  }
};

}  // namespace tk::attention
