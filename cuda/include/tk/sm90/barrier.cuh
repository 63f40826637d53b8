// Barriers in shared memory, barriers with a name, and turns taken through global memory.
#pragma once

#include "tk/sm90/ptx/fence.cuh"
#include "tk/sm90/ptx/mbarrier.cuh"
#include "tk/sm90/ptx/thread.cuh"

namespace tk {

// Completes a phase when the expected threads have arrived and the expected bytes have landed.
// `phase` is the parity of the phase waited for: 0, 1, 0, ...
struct Barrier {
  uint64 state;

  __device__ __forceinline__ uint32 address() const { return ptx::shared_address(&state); }
  __device__ __forceinline__ void init(int arrivals, Location = {}) {
    ptx::mbarrier_init(address(), arrivals);
  }
  __device__ __forceinline__ void arrive(Location = {}) { ptx::mbarrier_arrive(address()); }
  __device__ __forceinline__ void arrive_remote(int block, Location = {}) {
    ptx::mbarrier_arrive_remote(address(), block);
  }
  __device__ __forceinline__ void expect(int bytes, Location = {}) {
    ptx::mbarrier_arrive_expect(address(), bytes);
  }
  __device__ __forceinline__ void wait(uint32 phase, Location = {}) const {
    ptx::mbarrier_wait(address(), phase);
  }
};

// The thread that initialised barriers calls this, then the block or cluster syncs: copies and
// other blocks see them initialised.
__device__ __forceinline__ void publish_barriers(Location = {}) { ptx::fence_barrier_init(); }

namespace grid {
// Which block this is, and how many there are along x.
__device__ __forceinline__ int block_x() { return static_cast<int>(blockIdx.x); }
__device__ __forceinline__ int block_y() { return static_cast<int>(blockIdx.y); }
__device__ __forceinline__ int block_z() { return static_cast<int>(blockIdx.z); }
__device__ __forceinline__ int blocks_x() { return static_cast<int>(gridDim.x); }
}  // namespace grid

namespace block {
__device__ __forceinline__ void sync(Location = {}) { ptx::block_sync(); }
}  // namespace block

namespace cluster {
__device__ __forceinline__ int rank() { return static_cast<int>(ptx::cluster_rank()); }
__device__ __forceinline__ void sync(Location = {}) {
  ptx::cluster_arrive();
  ptx::cluster_wait();
}
}  // namespace cluster

namespace warpgroup {
// Which warpgroup of the block this is.
__device__ __forceinline__ int index() { return ptx::warp_index() >> 2; }
// One thread of the warpgroup says yes; always the same one.
__device__ __forceinline__ bool leader() { return (ptx::thread_index() & 127) == 0; }
}  // namespace warpgroup

namespace warp {
__device__ __forceinline__ int index() { return ptx::warp_index(); }
// The same where all lanes ask together, as a value that the compiler knows to be one.
__device__ __forceinline__ int uniform_index() { return ptx::uniform_warp_index(); }
__device__ __forceinline__ bool leader() { return ptx::lane_index() == 0; }
// The same, one thread of a warp, where the compiler shall know that it is one: a whole role's.
__device__ __forceinline__ bool elect() { return ptx::elect_one(); }
__device__ __forceinline__ void sync(Location = {}) { ptx::warp_sync(); }
}  // namespace warp

// Named barriers are few and global to a block. A kernel names its own in an enum that starts at
// kFirstKernelBarrier; the library keeps one for each warpgroup.
enum NamedBarrier : int {
  kBlockBarrier = 0,
  kWarpgroupBarrier = 1,  // and the next three
  kFirstKernelBarrier = 5,
};

namespace warpgroup {
// All 128 threads of this warpgroup.
__device__ __forceinline__ void sync(Location = {}) {
  ptx::named_barrier_sync(kWarpgroupBarrier + index(), 128);
}
}  // namespace warpgroup

template <typename Name>
__device__ __forceinline__ void named_sync(Name name, int threads, Location = {}) {
  ptx::named_barrier_sync(static_cast<int>(name), threads);
}
template <typename Name>
__device__ __forceinline__ void named_arrive(Name name, int threads, Location = {}) {
  ptx::named_barrier_arrive(static_cast<int>(name), threads);
}

// Turns: blocks that add to the same memory in a fixed order each wait for their number. One thread
// calls; what it and its completed copies wrote before pass_turn comes before what it and its
// copies do after take_turn. The counter starts at 0: a kernel that runs before resets it.
__device__ __forceinline__ void reset_turns(int* counter, Location = {}) { *counter = 0; }
__device__ __forceinline__ void take_turn(const int* counter, int turn, Location = {}) {
  while (ptx::load_acquire(counter) != turn) __nanosleep(20);
  ptx::fence_async_global();
}
__device__ __forceinline__ void pass_turn(int* counter, Location = {}) {
  ptx::add_release(counter, 1);
}

// Numbers from 0 on, each given to one block: what is dealt out, such as tiles, to whoever comes
// first. One thread calls. The counter is reset as that of turns is.
__device__ __forceinline__ int take_number(int* counter, Location = {}) {
  return ptx::fetch_add(counter, 1);
}
// Waits until so many numbers have been taken.
__device__ __forceinline__ void wait_for_numbers(const int* counter, int count, Location = {}) {
  while (ptx::load_acquire(counter) < count) __nanosleep(100);
}

}  // namespace tk
