// What a block gives its roles: shared memory, and registers by role.
#pragma once

#include "tk/sm90/barrier.cuh"
#include "tk/sm90/ptx/registers.cuh"

namespace tk::block {

// The block's dynamic shared memory from the first 1024-byte boundary on, where swizzled tiles may
// start. The launcher adds 1024 bytes for it.
template <typename Shared>
__device__ __forceinline__ Shared& shared_memory() {
  extern __shared__ uint8 bytes[];
  const uint32 start = ptx::shared_address(bytes);
  return *reinterpret_cast<Shared*>(bytes + (round_up(start, 1024u) - start));
}

// Called by all warps of a warpgroup that takes up a role.
template <int kRegisters>
__device__ __forceinline__ void become_producer() {
  ptx::decrease_registers<kRegisters>();
}
template <int kRegisters>
__device__ __forceinline__ void become_consumer(int) {
  ptx::increase_registers<kRegisters>();
}
// A consumer that needs fewer registers than it starts with.
template <int kRegisters>
__device__ __forceinline__ void become_helper(int) {
  ptx::decrease_registers<kRegisters>();
}

}  // namespace tk::block
