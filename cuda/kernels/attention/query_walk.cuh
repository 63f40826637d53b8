// The walk over tiles of queries, each with the blocks of keys that it sees.
//
// Persistent: a block of the grid takes tile after tile. Where tiles differ in how many keys they
// see, the longest come first, by sections of heads that share L2.
#pragma once

#include "kernels/attention/mask.cuh"

namespace tk::attention {

// One tile of queries and the key blocks it sees.
struct QueryTile {
  int first_query, head, batch;
  int first_block, end_block;        // equal where no query sees a key
  int unmasked_first, unmasked_end;  // of those, the ones that every query sees whole

  __device__ __forceinline__ bool empty() const { return first_block == end_block; }
  // Whether some query does not see the whole block.
  template <Mask kMask>
  __device__ __forceinline__ bool masked(int block) const {
    if constexpr (kMask == Mask::kBand) {
      return block >= unmasked_end || block < unmasked_first;
    } else {
      return block >= unmasked_end;
    }
  }
};

// The same for every role. kKeyBytes is what k and v hold of a key and head.
template <typename Params, Mask kMask, unsigned kFeatures, int kBlockQ, int kBlockKv, int kKeyBytes>
struct QueryWalk {
  static constexpr bool kMasked = kMask != Mask::kNone;
  const Params& params;
  grid::SectionedSnake masked;
  grid::Rounds full;

  __device__ __forceinline__ explicit QueryWalk(const Params& p) : params(p) {
    const int worker = grid::block_x(), workers = grid::blocks_x();
    const int blocks = ceil_div(p.seqlen_q, kBlockQ);
    if constexpr (kMasked) {
      const int section = heads_in_l2(p.seqlen_kv, kKeyBytes) * p.num_heads / p.num_kv_heads;
      masked = {worker, workers, blocks, p.num_heads, p.batch, section};
      masked.start();
    } else {
      full = {worker, workers, blocks * p.num_heads * p.batch};
    }
  }
  __device__ __forceinline__ bool valid() const {
    if constexpr (kMasked) return masked.valid();
    return full.valid();
  }
  __device__ __forceinline__ void next() {
    if constexpr (kMasked) {
      masked.next();
    } else {
      full.next();
    }
  }
  __device__ __forceinline__ QueryTile tile() const {
    const int blocks = ceil_div(params.seqlen_q, kBlockQ);
    grid::HeadTile place;
    if constexpr (kMasked) {
      place = masked.tile();
      place.block = blocks - 1 - place.block;  // the last sees the most keys
    } else {
      place = grid::sequential_tile(full.index(), blocks, params.num_heads);
    }
    const Bounds bounds = bounds_of<kFeatures>(params, place.batch);
    VisibleKeys keys = visible_keys<kMask>(place.block * kBlockQ, kBlockQ, bounds);
    if constexpr ((kFeatures & kLengths) != 0) {
      if (place.block * kBlockQ >= bounds.seqlen_q) keys = {};
    }
    const int end_block = ceil_div(keys.end, kBlockKv);
    const int first_block = keys.begin < keys.end ? keys.begin / kBlockKv : end_block;
    return {place.block * kBlockQ,
            place.head,
            place.batch,
            first_block,
            end_block,
            ceil_div(keys.all_begin, kBlockKv),
            keys.all_end / kBlockKv};
  }
};

}  // namespace tk::attention
