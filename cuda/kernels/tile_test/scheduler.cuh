// Which tiles the schedulers hand out, in the order in which they do. Integers alone: the same code
// runs on the host.
#pragma once

#include "tk/grid/scheduler.cuh"

namespace tk::tile_test {

// Every worker's indices of Rounds, a row each, filled up with -1.
__device__ __forceinline__ void list_rounds(int* out, int workers, int slots, int count) {
  for (int worker = 0; worker < workers; ++worker) {
    int slot = 0;
    for (grid::Rounds walk{worker, workers, count}; walk.valid(); walk.next()) {
      out[worker * slots + slot++] = walk.index();
    }
    while (slot < slots) out[worker * slots + slot++] = -1;
  }
}

// Every worker's tiles of SectionedSnake as (block, head, batch), filled up with -1.
__device__ __forceinline__ void list_sections(int* out, int workers, int slots, int blocks,
                                              int heads, int batches, int section) {
  for (int worker = 0; worker < workers; ++worker) {
    int* place = out + worker * slots * 3;
    int* const end = place + slots * 3;
    grid::SectionedSnake walk{worker, workers, blocks, heads, batches, section};
    for (walk.start(); walk.valid(); walk.next()) {
      const grid::HeadTile tile = walk.tile();
      *place++ = tile.block;
      *place++ = tile.head;
      *place++ = tile.batch;
    }
    while (place < end) *place++ = -1;
  }
}

// Tiles 0 .. count - 1 as (row, column, batch).
__device__ __forceinline__ void list_groups(int* out, int count, int rows, int cols, int group) {
  for (int i = 0; i < count; ++i) {
    const grid::MatrixTile tile = grid::grouped_tile(i, rows, cols, group);
    out[3 * i] = tile.row;
    out[3 * i + 1] = tile.col;
    out[3 * i + 2] = tile.batch;
  }
}

// Tiles 0 .. count - 1 as (block, head, batch).
__device__ __forceinline__ void list_sequence(int* out, int count, int blocks, int heads) {
  for (int i = 0; i < count; ++i) {
    const grid::HeadTile tile = grid::sequential_tile(i, blocks, heads);
    out[3 * i] = tile.block;
    out[3 * i + 1] = tile.head;
    out[3 * i + 2] = tile.batch;
  }
}

}  // namespace tk::tile_test
