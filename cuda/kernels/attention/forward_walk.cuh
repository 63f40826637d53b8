// Which tiles of queries a block of the forward pass computes, and which keys they visit.
#pragma once

#include "kernels/attention/attention.h"
#include "kernels/attention/block_map.cuh"
#include "kernels/attention/mask.cuh"
#include "tk/tk.cuh"

namespace tk::attention {

// A tile of queries and the key blocks that some of them may see. As the producer's message, its
// last number is negative where no tile is left.
struct ForwardPlace {
  int first_query, head, batch;
  int first_block, end_block;
};

// The walk over tiles. With a mask the producer's alone: where the next tile lies takes several
// divisions, for which consumers would wait between two tiles. Without, it takes few, and all
// roles work it out.
template <typename Traits>
struct ForwardWalk {
  static constexpr int kBlockQ = Traits::kBlockQ, kBlockKv = Traits::kBlockKv;
  static constexpr unsigned kFeatures = Traits::kFeatures;

  // Whether tiles differ in how many keys they see.
  static constexpr bool kMasked = Traits::kMask != Mask::kNone;
  static constexpr bool kMapped = (kFeatures & kMapFeatures) != 0;
  // Whether tiles walk their keys up. Those of a head, which run together, then load the same
  // blocks at the same time, and come to new ones one after another, not all at their start. A
  // consumer asks for the next tile before it gives back what only the other's queries see: of that
  // there must be one block at most, and room for it.
  static constexpr bool kWalksUp = Traits::kMask == Mask::kCausal && !kMapped &&
                                   Traits::kConsumers <= 2 && kBlockKv >= 64 &&
                                   Traits::kStages >= 2;

  using Blocks = Select<kWalksUp, BlocksUp, BlocksDown<kMapped>>;
  // A tile on the way through its key blocks.
  struct Tile {
    int first_query, head, batch;
    Blocks keys;                       // from the first that it visits
    int unmasked_first, unmasked_end;  // key blocks that all of a consumer's queries see whole

    __device__ __forceinline__ bool empty() const { return !keys.valid(); }
  };

  __device__ __forceinline__ static Tile tile_at(const ForwardParams& params,
                                                 const ForwardPlace& place) {
    Tile tile = {place.first_query, place.head, place.batch, {}, 0, 0};
    if constexpr (!kMasked) {
      tile.unmasked_end = bounds_of<kFeatures>(params, place.batch).seqlen_kv / kBlockKv;
    }
    tile.keys.start(place.first_block, place.end_block, map_row(params, tile));
    return tile;
  }

  // A tile's row of the block map.
  __device__ __forceinline__ static MapRow map_row(const ForwardParams& params, const Tile& tile) {
    return {params.extras.key_map, tile.batch, tile.head, tile.first_query / kBlockQ};
  }

  const ForwardParams& params;
  grid::SectionedSnake masked;
  grid::Rounds full;

  __device__ __forceinline__ explicit ForwardWalk(const ForwardParams& p) : params(p) { start(); }
  __device__ __forceinline__ void start() {
    const int worker = grid::block_x(), workers = grid::blocks_x();
    const int blocks = ceil_div(params.seqlen_q, kBlockQ);
    if constexpr (kMasked) {
      masked = {worker, workers, blocks, params.num_heads, params.batch, params.section};
      masked.start();
    } else {
      full = {worker, workers, blocks * params.num_heads * params.batch};
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
  __device__ __forceinline__ ForwardPlace place() const {
    const int blocks = ceil_div(params.seqlen_q, kBlockQ);
    grid::HeadTile tile;
    if constexpr (kMasked) {
      tile = masked.tile();
      tile.block = blocks - 1 - tile.block;  // the last sees the most keys
    } else {
      tile = grid::sequential_tile(full.index(), blocks, params.num_heads);
    }
    const int first_query = tile.block * kBlockQ - forward_lead(params.seqlen_q, kBlockQ,
                                                                Traits::kMask, Traits::kFeatures);
    const Bounds bounds = bounds_of<kFeatures>(params, tile.batch);
    VisibleKeys keys = visible_keys<Traits::kMask>(first_query, kBlockQ, bounds);
    if constexpr ((kFeatures & kLengths) != 0) {
      if (first_query >= bounds.seqlen_q) keys = {};
    }
    const int end_block = ceil_div(keys.end, kBlockKv);
    const int first_block = keys.begin < keys.end ? keys.begin / kBlockKv : end_block;
    return {first_query, tile.head, tile.batch, first_block, end_block};
  }

  // A tile's bit among those that are to be repeated, which others may share.
  template <typename Where>
  __device__ __forceinline__ static uint32 mark_of(const Where& tile) {
    return 1u << ((tile.first_query / 64 + tile.head + tile.batch) & 31);
  }
};

}  // namespace tk::attention
