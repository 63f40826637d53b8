// A ring of stages between one producer thread and the consumers.
#pragma once

#include "tk/backend.cuh"

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
  __device__ __forceinline__ bool operator!=(const PipelineState& other) const {
    return stage != other.stage || phase != other.phase;
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
  __device__ __forceinline__ void init(int warps, Location at = {}) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      full_[i].init(1, at);
      empty_[i].init(warps, at);
    }
  }
  __device__ __forceinline__ void acquire(const State& state, int bytes, Location at = {}) {
    empty_[state.stage].wait(state.phase ^ 1, at);
    full_[state.stage].expect(bytes, at);
  }
  __device__ __forceinline__ Barrier& full(const State& state) { return full_[state.stage]; }

  __device__ __forceinline__ void wait(const State& state, Location at = {}) const {
    full_[state.stage].wait(state.phase, at);
  }
  // Every consumer warp calls this when all of its lanes are done with the stage.
  __device__ __forceinline__ void release(const State& state, Location at = {}) {
    warp::sync(at);
    if (warp::leader()) empty_[state.stage].arrive(at);
  }
  // The same of a stage that lanes have read into registers, as loads do: the copy that comes next
  // would otherwise overtake reads that are still under way.
  __device__ __forceinline__ void release_read(const State& state, Location at = {}) {
    publish_shared(at);
    release(state, at);
  }
  // The same, of a thread that is all that uses the stage, or waits for those who do.
  __device__ __forceinline__ void release_by_thread(const State& state, Location at = {}) {
    empty_[state.stage].arrive(at);
  }
  // The same, told to another block of the cluster, whose copies also land here.
  __device__ __forceinline__ void release(const State& state, int block, Location at = {}) {
    warp::sync(at);
    if (warp::leader()) empty_[state.stage].arrive_remote(block, at);
  }
  // Waits until every stage has been released: nobody will touch this block's ring again.
  __device__ __forceinline__ void drain(State state, Location at = {}) const {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      empty_[state.stage].wait(state.phase ^ 1, at);
      state.advance();
    }
  }
};

// A ring of messages, a few integers each, from one thread to the consumers: what it works out,
// such as the next tile, they need not.
template <int kStages, int kNumbers>
struct MessagePipeline {
  using Ring = Pipeline<kStages>;
  using State = typename Ring::State;
  SharedVec<int, kNumbers> numbers_[kStages];
  Ring ring_;

  // One thread calls this. `warps` is how many consumer warps there are.
  __device__ __forceinline__ void init(int warps, Location at = {}) { ring_.init(warps, at); }
  __device__ __forceinline__ void send(State& state, const int (&numbers)[kNumbers],
                                       Location at = {}) {
    ring_.empty_[state.stage].wait(state.phase ^ 1, at);
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) store_element(numbers_[state.stage], i, numbers[i], at);
    ring_.full(state).arrive(at);
    state.advance();
  }
  // Every consumer warp.
  __device__ __forceinline__ void receive(State& state, int (&numbers)[kNumbers],
                                          Location at = {}) {
    wait(state, numbers, [at](const auto& from, int i) { return load_element(from, i, at); }, at);
    ring_.release(state, at);
    state.advance();
  }
  // A thread that counts as a warp.
  __device__ __forceinline__ void receive_by_thread(State& state, int (&numbers)[kNumbers],
                                                    Location at = {}) {
    wait(
        state, numbers,
        [at](const auto& from, int i) { return load_element_by_thread(from, i, at); }, at);
    ring_.release_by_thread(state, at);
    state.advance();
  }

 private:
  template <typename Load>
  __device__ __forceinline__ void wait(const State& state, int (&numbers)[kNumbers], Load&& load,
                                       Location at) {
    ring_.wait(state, at);
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) numbers[i] = load(numbers_[state.stage], i);
  }
};

// What all consumer warps say together, once: each may set some bits on its way and closes when it
// is done, and everybody, the producer too, learns which of them any has set.
template <int kWarps>
struct Ballot {
  SharedVec<int, 4> bits_[kWarps];  // a number each, sixteen bytes apart
  Barrier closed_;

  // One thread calls this.
  __device__ __forceinline__ void init(Location at = {}) {
#pragma unroll
    for (int i = 0; i < kWarps; ++i) store_element(bits_[i], 0, 0, at);
    closed_.init(kWarps, at);
  }
  // Every warp of every consumer warpgroup. What a warp has set it may set again, even when all
  // have closed.
  __device__ __forceinline__ void set(int consumer, uint32 bits, Location at = {}) {
    const int place = 4 * consumer + warp::index() % 4;
    const uint32 before = static_cast<uint32>(load_element(bits_[place], 0, at));
    if (warp::leader()) store_element_if_new(bits_[place], 0, static_cast<int>(before | bits), at);
  }
  __device__ __forceinline__ void close(Location at = {}) {
    warp::sync(at);
    if (warp::leader()) closed_.arrive(at);
  }
  // After the last has closed: of a whole warp, and of one thread.
  __device__ __forceinline__ uint32 wait(Location at = {}) const {
    return wait([at](const auto& bits) { return load_element(bits, 0, at); }, at);
  }
  __device__ __forceinline__ uint32 wait_by_thread(Location at = {}) const {
    return wait([at](const auto& bits) { return load_element_by_thread(bits, 0, at); }, at);
  }

 private:
  template <typename Load>
  __device__ __forceinline__ uint32 wait(Load&& load, Location at) const {
    closed_.wait(0, at);
    int all = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) all |= load(bits_[i]);
    return static_cast<uint32>(all);
  }
};

// The way out: consumers fill a stage, one storing thread takes it to global memory.
template <int kStages>
struct StorePipeline {
  Barrier full_[kStages];
  Barrier empty_[kStages];
  using State = PipelineState<kStages>;

  // One thread calls this. `warps` is how many consumer warps fill each stage.
  __device__ __forceinline__ void init(int warps, Location at = {}) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      full_[i].init(warps, at);
      empty_[i].init(1, at);
    }
  }
  // Consumers: wait until the stage has left, fill it, hand it over.
  __device__ __forceinline__ void acquire(const State& state, Location at = {}) const {
    empty_[state.stage].wait(state.phase ^ 1, at);
  }
  __device__ __forceinline__ void hand_over(const State& state, Location at = {}) {
    warp::sync(at);
    if (warp::leader()) full_[state.stage].arrive(at);
  }
  // The storing thread: wait until it is filled, store it, release it once it has been read. It
  // publishes what all consumers stored: their own fences would make them wait for their stores.
  __device__ __forceinline__ void wait(const State& state, Location at = {}) const {
    full_[state.stage].wait(state.phase, at);
    publish_shared(at);
  }
  __device__ __forceinline__ void release(const State& state, Location at = {}) {
    empty_[state.stage].arrive(at);
  }
};

}  // namespace tk
