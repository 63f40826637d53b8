// Which tiles of keys a block of the backward pass computes, and which queries each walks.
#pragma once

#include "kernels/attention/attention.h"
#include "kernels/attention/query_steps.cuh"
#include "kernels/attention/turns.cuh"
#include "tk/tk.cuh"

namespace tk::attention {

// The walk over tiles, the same for every role. In waves a tile is whoever's comes first: the
// loading thread takes its number and tells the others.
template <typename Traits>
struct BackwardWalk {
  static constexpr unsigned kFeatures = Traits::kFeatures;
  using QTurns =
      Turns<Traits::kMask, kFeatures, Traits::kHeadDim, Traits::kBlockQ, Traits::kBlockKv>;
  // A tile's place and wave, from the thread that takes it.
  static constexpr int kNumbers = 6;
  using Messages = MessagePipeline<2, kNumbers>;

  struct Tile {
    int n;  // key block
    int kv_head, batch;
  };

  const BackwardParams& params;
  QTurns turns;
  Tile tile;
  Select<QTurns::kInWaves, typename Messages::State, grid::Rounds> place;

  __device__ __forceinline__ explicit BackwardWalk(const BackwardParams& p) : params(p) {
    turns = {p.q_blocks,
             p.kv_blocks,
             p.turn_group,
             {p.seqlen_q, p.seqlen_kv, p.first_offset, p.last_offset}};
    // One round before the first.
    if constexpr (!QTurns::kInWaves) {
      place = {grid::block_x(), grid::blocks_x(), p.tiles};
      place.round = -1;
    }
  }
  // To the next tile, if there is one; from here on, turns are those of the tile. Consumers' warps;
  // a storing thread counts as one.
  __device__ __forceinline__ bool next(Messages& messages) {
    return advance([&](auto& state, auto& numbers) { messages.receive(state, numbers); });
  }
  __device__ __forceinline__ bool next_of_thread(Messages& messages) {
    return advance([&](auto& state, auto& numbers) { messages.receive_by_thread(state, numbers); });
  }
  // The loading thread: takes the next tile, while the last one is still computed, and tells the
  // others. Blocks of a wave that goes up wait for those dealt out after them: who is at one must
  // not be the one to take another, behind its own.
  __device__ __forceinline__ bool deal(Messages& messages, int& wave_dealt) {
    return advance([&](auto& state, auto& numbers) {
      if (turns.wave.up) wait_for_numbers(params.next_tile, wave_dealt);
      const int number = take_number(params.next_tile);
      DealtTile dealt = {-1, 0, {}, 0};
      if (number < params.tiles) dealt = QTurns::deal(params, number);
      wave_dealt = dealt.wave_dealt;
      const int batch = dealt.row / params.num_kv_heads;
      const int told[kNumbers] = {dealt.n,        dealt.row - batch * params.num_kv_heads,
                                  batch,          dealt.wave.first,
                                  dealt.wave.end, dealt.wave.up};
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) numbers[i] = told[i];
      messages.send(state, told);
    });
  }

  // Calls f(head, query block) for the steps of a tile, as query_steps.cuh has them, with fewer
  // registers.
  template <typename F>
  __device__ __forceinline__ void for_each_step(const Tile& tile, F&& f) const {
    if constexpr (QTurns::kMapped) {
      for (MappedSteps s(turns, params, tile.n, tile.kv_head, tile.batch); s.valid(); s.next()) {
        f(s.head, s.q_block());
      }
      return;
    }
    const int group = params.heads_of_group;
    const int first = turns.first_q_block(tile.n);
    const int steps = turns.steps(tile.n);
    if constexpr (QTurns::kInWaves) {
      const int way = turns.wave.up ? 1 : -1;
      int m = turns.wave.up ? first : first + steps - 1;
      for (int left = steps; left > 0; --left, m += way) {
        for (int i = 0; i < group; ++i) f(tile.kv_head * group + i, m);
      }
      return;
    }
    for (int head = tile.kv_head * group; head < (tile.kv_head + 1) * group; ++head) {
      for (int step = 0; step < steps; ++step) f(head, turns.q_block(first, step));
    }
  }

 private:
  template <typename Receive>
  __device__ __forceinline__ bool advance(Receive&& receive) {
    if constexpr (QTurns::kInWaves) {
      int numbers[kNumbers];
      receive(place, numbers);
      tile = {numbers[0], numbers[1], numbers[2]};
      turns.wave = {numbers[3], numbers[4], numbers[5] != 0};
      if (tile.n < 0) return false;
    } else {
      place.next();
      if (!place.valid()) return false;
      const grid::HeadTile at =
          grid::sequential_tile(place.index(), params.kv_blocks, params.num_kv_heads);
      tile = {at.block, at.head, at.batch};
      // Turns go down the key blocks: whoever others wait for has started before them.
      if constexpr (QTurns::kDescending && Traits::kDeterministic) {
        tile.n = params.kv_blocks - 1 - tile.n;
      }
    }
    if constexpr ((kFeatures & kLengths) != 0) {
      turns.set_bounds(bounds_of<kFeatures>(params, tile.batch));
    }
    return true;
  }
};

}  // namespace tk::attention
