// In which order key blocks meet the query blocks, and in which order they add to dq.
//
// A sum in floating point depends on its order, so deterministic dq needs one. It costs nothing
// where blocks that run together are never at the same query block at the same time, each a step
// behind the one before it, and add in just that order.
//
// A causal mask, where causal_in_waves says so, in waves: as many key blocks as there are
// multiprocessors start together, those of some heads side by side and with most to do first. They
// go down from the last query block, all at the same place, and turns go from the lowest n up: each
// is soon a turn behind the one before it. So the highest n, which has least to do, ends first, and
// the first block of the next wave starts there and goes up, as do those that follow: n arrives at
// its diagonal just when the others of its wave do, a turn earlier than n - 1, hence turns go from
// the highest n down. Blocks of a wave share what they read of q and dout, and all end together.
// After two waves, other heads come first: a third would wait where it starts for the second to
// arrive. Those that see all queries alike go down in every wave.
//
// Any other mask, or a block map: key block n starts at the first query block that sees it and goes
// up; a higher n starts further on, or later. All started together, the higher n is always ahead:
// turns go from the highest n down. Otherwise: of a group of blocks that run together, each starts
// at a different query block, evenly spread, goes up and wraps round: turns go by arrival. Groups
// follow one another.
#pragma once

#include "kernels/attention/block_map.cuh"
#include "kernels/attention/mask.cuh"

namespace tk::attention {

// The key blocks of a head that are in one wave, first .. end - 1, and whether they go up.
struct Wave {
  int first, end;
  bool up;
};
struct DealtTile {
  int n, row;  // key block; key/value head, over all batch entries
  Wave wave;
  int wave_dealt;  // as many tiles are dealt out when all of the wave are
};

template <Mask kMask, unsigned kFeatures, int kHeadDim, int kBlockQ, int kBlockKv>
struct Turns {
  static constexpr bool kMapped = (kFeatures & kMapFeatures) != 0;
  // Whether turns go by waves, or from the last key block down, rather than by arrival.
  static constexpr bool kInWaves = causal_in_waves(kHeadDim, kMask, kFeatures);
  static constexpr bool kDescending = !kInWaves && (kMask != Mask::kNone || kMapped);

  int q_blocks;   // query blocks of the sequence
  int kv_blocks;  // key blocks
  int group;      // key blocks that take turns among themselves; in waves: tiles of one
  Bounds bounds;
  Wave wave;  // of the tile at hand

  // The tile with this number of those that are dealt out in waves. In order: phases of as many key
  // blocks as two waves hold, in each of them groups of heads, in each of these key block after
  // key block the heads side by side.
  template <typename Params>
  __device__ __forceinline__ static DealtTile deal(const Params& params, int number) {
    const int tiles_of_phase = params.tile_rows * params.phase_blocks;
    const int phase = number / tiles_of_phase;
    const int first = phase * params.phase_blocks;
    const int blocks = min(params.phase_blocks, params.kv_blocks - first);
    const grid::MatrixTile at = grid::grouped_tile(number - phase * tiles_of_phase,
                                                   params.tile_rows, blocks, params.rows_together);
    const int row = at.row % params.rows_together;
    const int rows = min(params.rows_together, params.tile_rows - at.row + row);
    const int place = at.col * rows + row;
    const int wave = place / params.turn_group;
    const auto start_of = [=, &params](int wave) {
      return first + min(blocks, max(0, ceil_div(wave * params.turn_group - row, rows)));
    };
    const int start = start_of(wave);
    // All roles and heads have to agree: by the offset of the launch, whatever an element's is.
    const bool up = wave % 2 != 0 && start * kBlockKv >= params.last_offset + kBlockQ;
    return {first + at.col,
            at.row,
            {start, start_of(wave + 1), up},
            number - place + min((wave + 1) * params.turn_group, blocks * rows)};
  }

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
    if constexpr (kInWaves) {
      // Whoever sees a key sees those before it.
      return wave.up ? wave.first + min(wave.end, visible_end(m)) - 1 - n : n;
    } else if constexpr (kDescending) {
      const int end = visible_end(m);
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

 private:
  // The end of the key blocks that diagonals let query block m see.
  __device__ __forceinline__ int visible_end(int m) const {
    Bounds whole_block = bounds;
    whole_block.seqlen_q = (m + 1) * kBlockQ;
    const VisibleKeys keys = visible_keys<kMask>(m * kBlockQ, kBlockQ, whole_block);
    return ceil_div(keys.end, kBlockKv);
  }
};

}  // namespace tk::attention
