// Walks over the blocks that a block map (attention.h) marks: up or down a row of it, 32 a word.
//
// Without a map, every block of a range is visited; the walks are then plain counters.
#pragma once

#include "kernels/attention/attention.h"
#include "tk/tk.cuh"

namespace tk::attention {

// A row of a map: of a query block, over key blocks, or the other way round.
struct MapRow {
  const BlockMap& map;
  int batch, head, row;

  __device__ __forceinline__ MapWord word(int index) const {
    return load_scalar(map.words + batch * map.batch_stride + head * map.head_stride +
                       row * map.row_stride + index);
  }
  // How many blocks from begin to end - 1 are visited.
  __device__ __forceinline__ int count(int begin, int end) const {
    int count = 0;
    for (int index = begin >> 5; 32 * index < end; ++index) {
      uint32 visited = word(index).visited;
      if (32 * index < begin) visited &= ~0u << (begin & 31);
      if (32 * index + 32 > end) visited &= ~0u >> (32 * index + 32 - end);
      count += math::count_bits(visited);
    }
    return count;
  }
};

// The blocks that are still to visit, where there is no map.
struct BlocksLeft {
  int first, end;

  __device__ __forceinline__ void start(int from, int to, const MapRow&) {
    first = from;
    end = to;
  }
  __device__ __forceinline__ bool valid() const { return first != end; }
};

// Down from the last block to visit before `end` to the first from `first` on.
template <bool kMapped>
struct BlocksDown : BlocksLeft {
  __device__ __forceinline__ int block() const { return end - 1; }
  __device__ __forceinline__ void next(const MapRow&) { --end; }
};
template <>
struct BlocksDown<true> {
  int at, first;
  uint32 left, whole;  // of the word at hand: the blocks that are still to visit, those that are
                       // visible as a whole

  __device__ __forceinline__ void start(int from, int end, const MapRow& row) {
    first = from;
    at = from - 1;
    if (end <= from) return;
    const int index = (end - 1) >> 5;
    take(row, index);
    left &= ~0u >> (32 * index + 32 - end);
    seek(row, index);
  }
  __device__ __forceinline__ bool valid() const { return at >= first; }
  __device__ __forceinline__ int block() const { return at; }
  __device__ __forceinline__ bool is_whole() const { return (whole >> (at & 31) & 1) != 0; }
  __device__ __forceinline__ void next(const MapRow& row) { seek(row, at >> 5); }

 private:
  __device__ __forceinline__ void take(const MapRow& row, int index) {
    const MapWord word = row.word(index);
    left = word.visited;
    whole = word.whole;
  }
  __device__ __forceinline__ void seek(const MapRow& row, int index) {
    while (left == 0) {
      if (--index < first >> 5) {
        at = first - 1;
        return;
      }
      take(row, index);
    }
    const int bit = math::highest_bit(left);
    left ^= 1u << bit;
    at = 32 * index + bit;
  }
};

// Up from the first block to visit to the last before `end`.
struct BlocksUp : BlocksLeft {
  __device__ __forceinline__ int block() const { return first; }
  __device__ __forceinline__ void next(const MapRow&) { ++first; }
};

// The same with a map: up from the first block to visit from `begin` on to the last before `end`.
struct MappedBlocksUp {
  int block, end;
  uint32 left, whole;

  __device__ __forceinline__ void start(int begin, int to, const MapRow& row) {
    end = to;
    block = to;
    if (begin >= to) return;
    const int index = begin >> 5;
    take(row, index);
    left &= ~0u << (begin & 31);
    seek(row, index);
  }
  __device__ __forceinline__ bool valid() const { return block < end; }
  __device__ __forceinline__ bool is_whole() const { return (whole >> (block & 31) & 1) != 0; }
  __device__ __forceinline__ void next(const MapRow& row) { seek(row, block >> 5); }

 private:
  __device__ __forceinline__ void take(const MapRow& row, int index) {
    const MapWord word = row.word(index);
    left = word.visited;
    whole = word.whole;
  }
  __device__ __forceinline__ void seek(const MapRow& row, int index) {
    while (left == 0) {
      if (32 * ++index >= end) {
        block = end;
        return;
      }
      take(row, index);
    }
    const int bit = math::lowest_bit(left);
    left ^= 1u << bit;
    block = 32 * index + bit;
  }
};

}  // namespace tk::attention
