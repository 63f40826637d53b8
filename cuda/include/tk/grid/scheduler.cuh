// Which tiles a block of a persistent grid works on, and in what order.
//
// Every scheduler is a loop: for (Scheduler s(...); s.valid(); s.next()) use s.tile(). All roles of a
// block construct the same one and so agree without talking.
#pragma once

#include "tk/base.cuh"

namespace tk::grid {

// Walks indices 0 .. count - 1 in rounds of `workers`. In every other round the order of the workers
// is turned round, so that where work falls with the index, nobody gets the largest of each round.
struct Snake {
  int worker, workers, count;
  int round = 0;

  __device__ __forceinline__ int index() const {
    return round * workers + ((round & 1) ? workers - 1 - worker : worker);
  }
  __device__ __forceinline__ bool valid() const { return index() < count; }
  __device__ __forceinline__ void next() { ++round; }
};

// The same without turning: worker w gets w, w + workers, ...
struct Rounds {
  int worker, workers, count;
  int round = 0;

  __device__ __forceinline__ int index() const { return round * workers + worker; }
  __device__ __forceinline__ bool valid() const { return index() < count; }
  __device__ __forceinline__ void next() { ++round; }
};

struct MatrixTile {
  int row, col, batch;
};

// Tiles of a matrix in groups of `group` rows, walked down each column of the group: blocks that run
// together then share few rows and columns of the operands, which stay in L2.
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

struct HeadTile {
  int block, head, batch;
};

// Blocks of a sequence for every head and batch entry. Heads are taken in sections whose keys and
// values fit in L2 together; within a section, block 0 of every head comes first, so with blocks
// numbered from the longest on, a section starts with its longest work.
__device__ __forceinline__ HeadTile sectioned_tile(int index, int blocks, int heads, int batches,
                                                   int section) {
  const int rows = heads * batches;
  const int per_section = section * blocks;
  const int first = index / per_section * section;
  const int width = min(section, rows - first);
  const int within = index % per_section;
  const int row = first + within % width;
  return {within / width, row % heads, row / heads};
}

// Blocks of one head after another.
__device__ __forceinline__ HeadTile sequential_tile(int index, int blocks, int heads) {
  const int row = index / blocks;
  return {index % blocks, row % heads, row / heads};
}

}  // namespace tk::grid
