// Single numbers in shared and global memory.
#pragma once

#include "tk/shared_tile.cuh"
#include "tk/sm90/ptx/matrix.cuh"
#include "tk/sm90/ptx/thread.cuh"

namespace tk {

// An element of a vector in shared memory: of whoever asks, by one lane or several the same.
template <int kN>
__device__ __forceinline__ float load_element(const SharedVec<float, kN>& src, int index,
                                              Location = {}) {
  return ptx::load_shared_f32(ptx::shared_address(src.data) + 4 * index);
}
template <int kN>
__device__ __forceinline__ void store_element(SharedVec<float, kN>& dst, int index, float x,
                                              Location = {}) {
  ptx::store_shared_f32(ptx::shared_address(dst.data) + 4 * index, x);
}
// The same of integers, by all lanes of a warp: the compiler knows that they get the same.
template <int kN>
__device__ __forceinline__ int load_element(const SharedVec<int, kN>& src, int index,
                                            Location = {}) {
  return ptx::uniform(
      static_cast<int>(ptx::load_shared_u32(ptx::shared_address(src.data) + 4 * index)));
}
// By one thread.
template <int kN>
__device__ __forceinline__ int load_element_by_thread(const SharedVec<int, kN>& src, int index,
                                                      Location = {}) {
  return static_cast<int>(ptx::load_shared_u32(ptx::shared_address(src.data) + 4 * index));
}
template <int kN>
__device__ __forceinline__ void store_element(SharedVec<int, kN>& dst, int index, int x,
                                              Location = {}) {
  ptx::store_shared_u32(ptx::shared_address(dst.data) + 4 * index, static_cast<uint32>(x));
}
// The same where others may be reading it, if it is not there already.
template <int kN>
__device__ __forceinline__ void store_element_if_new(SharedVec<int, kN>& dst, int index, int x,
                                                     Location = {}) {
  store_element(dst, index, x);  // the same bits once more are none
}
// A number from global memory, the same for whoever asks.
template <typename T>
__device__ __forceinline__ T load_scalar(const T* address, Location = {}) {
  return *address;
}

}  // namespace tk
