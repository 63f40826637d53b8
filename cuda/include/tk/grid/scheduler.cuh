// Which tiles a block of a persistent grid works on, and in what order.
//
// Every scheduler is a loop: for (Scheduler s(...); s.valid(); s.next()) use s.tile(). All roles of
// a block construct the same one and so agree without talking.
#pragma once

#include "tk/base.cuh"

namespace tk::grid {

// Walks indices 0 .. count - 1 in rounds of `workers`: worker w gets w, w + workers, ...
struct Rounds {
  int worker, workers, count;
  int round = 0;

  __device__ __forceinline__ int index() const { return round * workers + worker; }
  __device__ __forceinline__ bool valid() const { return index() < count; }
  __device__ __forceinline__ void next() { ++round; }
};

// A tile for each block of the grid, which start in their order as multiprocessors become free.
struct OneEach {
  int worker;
  bool left = true;

  __device__ __forceinline__ int index() const { return worker; }
  __device__ __forceinline__ bool valid() const { return left; }
  __device__ __forceinline__ void next() { left = false; }
};

struct HeadTile {
  int block, head, batch;
};

struct MatrixTile {
  int row, col, batch;
};

// Tiles of a matrix in groups of `group` rows, walked down each column of the group: blocks that
// run together then share few rows and columns of the operands, which stay in L2.
__device__ __forceinline__ MatrixTile grouped_tile(int index, int rows, int cols, int group) {
  const int per_batch = rows * cols;
  const int batch = index / per_batch;
  const int within = index - batch * per_batch;
  const int per_group = group * cols;
  const int first_row = within / per_group * group;
  const int height = min(group, rows - first_row);
  const int in_group = within % per_group;
  return {first_row + in_group % height, in_group / height, batch};
}

// Blocks of a sequence for every head and batch entry, where the work of a block falls with its
// number: causal attention with its query blocks numbered from the last.
//
// Heads are taken in sections whose keys and values fit in L2 together. A section's blocks are
// dealt out in rounds, block 0 of every head first; every other round goes through the workers
// backwards, so that nobody gets the largest of each, and where a section has an odd number of
// rounds, the next one starts with the other end. Where it has an even number, the last round,
// backwards, may leave out some workers: the next section starts as many workers further, so that
// they are others each time. How even the work is depends on the section; dealing without a fresh
// start at each section came to 0.65.
struct SectionedSnake {
  int worker, workers;
  int blocks, heads, batches;
  int section;  // heads of a section, over all batch entries
  int first = 0;
  int round = 0;
  int shift = 0;  // the worker that a section starts with
  bool backwards = false;

  __device__ __forceinline__ int width() const { return min(section, heads * batches - first); }
  __device__ __forceinline__ int index() const {
    const int place = worker < shift ? worker - shift + workers : worker - shift;
    return round * workers + (backwards ? workers - 1 - place : place);
  }
  __device__ __forceinline__ bool valid() const { return first < heads * batches; }
  __device__ __forceinline__ HeadTile tile() const {
    const int row = first + index() % width();
    return {index() / width(), row % heads, row / heads};
  }
  // To the worker's first tile: a section may have fewer tiles than workers.
  __device__ __forceinline__ void start() {
    if (index() >= width() * blocks) next();
  }
  __device__ __forceinline__ void next() {
    do {
      ++round;
      backwards = !backwards;
      const int count = width() * blocks;
      if (round * workers >= count) {
        if (round % 2 == 0) shift = (shift + count % workers) % workers;
        round = 0;
        first += section;
      }
    } while (valid() && index() >= width() * blocks);
  }
};

// Blocks of one head after another.
__device__ __forceinline__ HeadTile sequential_tile(int index, int blocks, int heads) {
  const int row = index / blocks;
  return {index % blocks, row % heads, row / heads};
}

}  // namespace tk::grid
