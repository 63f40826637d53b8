// The steps of a key block in the backward pass: every query head of its group, and for each the
// query blocks that turns.cuh, and a block map if there is one, let it meet.
#pragma once

#include "kernels/attention/block_map.cuh"
#include "kernels/attention/turns.cuh"

namespace tk::attention {

// Down from the last query block to the first, or up, and for each every head: the steps of all key
// blocks of a wave are the same, as far as they go.
template <typename QTurns>
struct WaveSteps {
  int block, way, left;  // way: 1 or -1
  int head, end_head, group;

  template <typename Params>
  __device__ __forceinline__ WaveSteps(const QTurns& turns, const Params& params, int n,
                                       int kv_head, int)
      : way(turns.wave.up ? 1 : -1),
        left(turns.steps(n)),
        head(kv_head * params.heads_of_group),
        end_head(head + params.heads_of_group),
        group(params.heads_of_group) {
    block = turns.first_q_block(n) + (turns.wave.up ? 0 : left - 1);
  }
  __device__ __forceinline__ bool valid() const { return left > 0; }
  __device__ __forceinline__ int q_block() const { return block; }
  __device__ __forceinline__ void next() {
    if (++head == end_head) {
      head -= group;
      block += way;
      --left;
    }
  }
};

// Head after head, up the query blocks: a counter.
template <typename QTurns>
struct CountedSteps {
  const QTurns& turns;
  int first, steps, left;
  int head;
  int step = 0;

  template <typename Params>
  __device__ __forceinline__ CountedSteps(const QTurns& turns, const Params& params, int n,
                                          int kv_head, int)
      : turns(turns),
        first(turns.first_q_block(n)),
        steps(turns.steps(n)),
        left(params.heads_of_group * steps),
        head(params.heads_of_group * kv_head) {}
  __device__ __forceinline__ bool valid() const { return left > 0; }
  __device__ __forceinline__ int q_block() const { return turns.q_block(first, step); }
  __device__ __forceinline__ void next() {
    --left;
    if (++step == steps) {
      step = 0;
      ++head;
    }
  }
};

// With a map, which may differ by head: the marked blocks of its row n.
struct MappedSteps {
  const BlockMap& map;
  int n, batch;
  int first, end;  // the query blocks that diagonals and lengths leave
  int head, end_head;
  MappedBlocksUp blocks;

  template <typename QTurns, typename Params>
  __device__ __forceinline__ MappedSteps(const QTurns& turns, const Params& params, int n,
                                         int kv_head, int batch)
      : map(params.extras.query_map),
        n(n),
        batch(batch),
        first(turns.first_q_block(n)),
        end(first + turns.steps(n)) {
    const int group = params.heads_of_group;
    head = kv_head * group;
    end_head = head + group;
    blocks.start(first, end, row());
    find_head();
  }
  __device__ __forceinline__ bool valid() const { return head < end_head; }
  __device__ __forceinline__ int q_block() const { return blocks.block; }
  __device__ __forceinline__ void next() {
    blocks.next(row());
    find_head();
  }

 private:
  __device__ __forceinline__ MapRow row() const { return {map, batch, head, n}; }
  __device__ __forceinline__ void find_head() {
    while (!blocks.valid() && ++head < end_head) blocks.start(first, end, row());
  }
};

template <typename QTurns>
using QuerySteps = Select<QTurns::kMapped, MappedSteps,
                          Select<QTurns::kInWaves, WaveSteps<QTurns>, CountedSteps<QTurns>>>;

// The step at hand; then the next step is.
struct Step {
  int q_block, head;
  bool is_whole;  // as far as a block map says
};
template <typename QTurns>
__device__ __forceinline__ Step take_step(CountedSteps<QTurns>& steps) {
  const Step step = {steps.q_block(), steps.head, true};
  steps.next();
  return step;
}
__device__ __forceinline__ Step take_step(MappedSteps& steps) {
  const Step step = {steps.q_block(), steps.head, steps.blocks.is_whole()};
  steps.next();
  return step;
}

}  // namespace tk::attention
