// A ring of stages between one producer thread and the consumers.
#pragma once

#include "tk/sm90/barrier.cuh"

namespace tk {

// Where a thread stands in a ring: every user of a Pipeline has its own.
template <int kStages>
struct PipelineState {
  int stage = 0;
  uint32 phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The barriers of a ring, in shared memory. The producer acquires a stage, says how many bytes will
// land in it and starts the copies on full(state); consumers wait for it, use it and release it.
template <int kStages>
struct Pipeline {
  Barrier full_[kStages];
  Barrier empty_[kStages];
  using State = PipelineState<kStages>;

  // One thread calls this. `warps` is how many consumer warps release each stage, counted over the
  // cluster where they release it to every block.
  __device__ __forceinline__ void init(int warps) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      full_[i].init(1);
      empty_[i].init(warps);
    }
  }
  __device__ __forceinline__ void acquire(const State& state, int bytes) {
    empty_[state.stage].wait(state.phase ^ 1);
    full_[state.stage].expect(bytes);
  }
  __device__ __forceinline__ Barrier& full(const State& state) { return full_[state.stage]; }

  __device__ __forceinline__ void wait(const State& state) const {
    full_[state.stage].wait(state.phase);
  }
  // Every consumer warp calls this when all of its lanes are done with the stage.
  __device__ __forceinline__ void release(const State& state) {
    warp::sync();
    if (warp::leader()) empty_[state.stage].arrive();
  }
  // The same, told to another block of the cluster, whose copies also land here.
  __device__ __forceinline__ void release(const State& state, int block) {
    warp::sync();
    if (warp::leader()) empty_[state.stage].arrive_remote(block);
  }
  // Waits until every stage has been released: nobody will touch this block's ring again.
  __device__ __forceinline__ void drain(State state) const {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      empty_[state.stage].wait(state.phase ^ 1);
      state.advance();
    }
  }
};

// The way out: consumers fill a stage, one storing thread takes it to global memory.
template <int kStages>
struct StorePipeline {
  Barrier full_[kStages];
  Barrier empty_[kStages];
  using State = PipelineState<kStages>;

  // One thread calls this. `warps` is how many consumer warps fill each stage.
  __device__ __forceinline__ void init(int warps) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      full_[i].init(warps);
      empty_[i].init(1);
    }
  }
  // Consumers: wait until the stage has left, fill it, publish it.
  __device__ __forceinline__ void acquire(const State& state) const {
    empty_[state.stage].wait(state.phase ^ 1);
  }
  __device__ __forceinline__ void publish(const State& state) {
    ptx::fence_async_shared();
    warp::sync();
    if (warp::leader()) full_[state.stage].arrive();
  }
  // The storing thread: wait until it is filled, store it, release it once it has been read.
  __device__ __forceinline__ void wait(const State& state) const {
    full_[state.stage].wait(state.phase);
  }
  __device__ __forceinline__ void release(const State& state) { empty_[state.stage].arrive(); }
};

}  // namespace tk
