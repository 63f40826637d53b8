// An array in global memory: an address, a shape and any strides, counted in elements.
#pragma once

#include "tk/base.cuh"

namespace tk {

// Rows and columns of one matrix of an array; a kernel that walks a batch moves `data`.
template <typename T_>
struct GlobalView {
  using T = T_;
  T* data;
  int rows, cols;
  int64 row_stride;
  int64 col_stride = 1;

  __device__ __forceinline__ T* at(int row, int col) const {
    return data + row * row_stride + col * col_stride;
  }
};

// Bits of a matrix, in words of 32 neighbouring columns, the lowest bit first. Strides in words.
struct BitView {
  const uint32* data;
  int64 row_stride;
  int64 word_stride;

  __device__ __forceinline__ const uint32* at(int row, int word) const {
    return data + row * row_stride + word * word_stride;
  }
};

// A vector with any stride.
template <typename T_>
struct GlobalVec {
  using T = T_;
  T* data;
  int size;
  int64 stride = 1;

  __device__ __forceinline__ T* at(int index) const { return data + index * stride; }
};

}  // namespace tk
