// Who a thread is: its place in the warp, the block and the cluster, and warp-wide exchanges.
#pragma once

#include "tk/base.cuh"

namespace tk::ptx {

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
// The same as a value of which the compiler knows nothing: what follows from it is made where it is
// used, not kept in registers from before a loop.
__device__ __forceinline__ int fresh_thread_index() {
  int index = thread_index();
  asm volatile("" : "+r"(index));
  return index;
}

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) & 31; }

__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) >> 5; }

// What all lanes have alike, as a value that the compiler knows to be one in all 32 lanes, so that
// branches on it are uniform. All lanes must call it together: in a branch that some do not take,
// it waits for them.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
__device__ __forceinline__ int uniform_warp_index() { return uniform(warp_index()); }

__device__ __forceinline__ bool elect_one() {
  uint32 elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

__device__ __forceinline__ uint32 cluster_rank() {
  uint32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

template <typename T>
__device__ __forceinline__ T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <typename T>
__device__ __forceinline__ T shuffle_up(T x, int delta) {
  return __shfl_up_sync(0xffffffffu, x, delta);
}
template <typename T>
__device__ __forceinline__ T shuffle(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}

__device__ __forceinline__ bool any(bool x) { return __any_sync(0xffffffffu, x); }

__device__ __forceinline__ uint32 shared_address(const void* pointer) {
  return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

// A branch that depends on bits, none of which is ever set. (What it leads to is a loop, which no
// predicate can replace.)
__device__ __forceinline__ void branch_on(uint32 bits) {
  for (; bits != 0; bits &= bits - 1) __nanosleep(20);
}

}  // namespace tk::ptx
