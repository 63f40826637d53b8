// Barriers in shared memory, barriers with a name, and turns taken through global memory.
#pragma once

#include "tk/interpreter/engine.h"

namespace tk {

struct Barrier {
  uint64 state;  // its place in shared memory is what the engine knows it by

  uint32 address() const { return interpreter::shared_address(&state); }
  void init(int arrivals, Location at = {}) { interpreter::barrier_init(address(), arrivals, at); }
  void arrive(Location at = {}) { interpreter::barrier_arrive(address(), -1, at); }
  void arrive_remote(int block, Location at = {}) {
    interpreter::barrier_arrive(address(), block, at);
  }
  void expect(int bytes, Location at = {}) { interpreter::barrier_expect(address(), bytes, at); }
  void wait(uint32 phase, Location at = {}) const {
    interpreter::barrier_wait(address(), phase, at);
  }
};

inline void publish_barriers(Location at = {}) { interpreter::publish_barriers(at); }

namespace grid {
inline int block_x() { return interpreter::block_index(0); }
inline int block_y() { return interpreter::block_index(1); }
inline int block_z() { return interpreter::block_index(2); }
inline int blocks_x() { return interpreter::block_count(0); }
}  // namespace grid

namespace block {
inline void sync(Location at = {}) { interpreter::block_sync(at); }
}  // namespace block

namespace cluster {
inline int rank() { return interpreter::cluster_rank(); }
inline void sync(Location at = {}) { interpreter::cluster_sync(at); }
}  // namespace cluster

namespace warpgroup {
inline int index() { return interpreter::warp_index() >> 2; }
inline bool leader() {
  if ((interpreter::warp_index() & 3) != 0) return false;
  interpreter::act_as_one_lane();
  return true;
}
}  // namespace warpgroup

namespace warp {
inline int index() { return interpreter::warp_index(); }
inline int uniform_index() { return interpreter::warp_index(); }
inline bool leader() {
  interpreter::act_as_one_lane();
  return true;
}
inline bool elect() { return leader(); }
inline void sync(Location at = {}) { interpreter::warp_sync(at); }
}  // namespace warp

enum NamedBarrier : int {
  kBlockBarrier = 0,
  kWarpgroupBarrier = 1,  // and the next three
  kFirstKernelBarrier = 5,
};

namespace warpgroup {
inline void sync(Location at = {}) {
  interpreter::named_barrier(kWarpgroupBarrier + index(), 128, true, at);
}
}  // namespace warpgroup

template <typename Name>
void named_sync(Name name, int threads, Location at = {}) {
  interpreter::named_barrier(static_cast<int>(name), threads, true, at);
}
template <typename Name>
void named_arrive(Name name, int threads, Location at = {}) {
  interpreter::named_barrier(static_cast<int>(name), threads, false, at);
}

inline void reset_turns(int* counter, Location at = {}) { interpreter::reset_turns(counter, at); }
inline void take_turn(const int* counter, int turn, Location at = {}) {
  interpreter::take_turn(counter, turn, at);
}
inline void pass_turn(int* counter, Location at = {}) { interpreter::pass_turn(counter, at); }
inline int take_number(int* counter, Location at = {}) {
  return interpreter::take_number(counter, at);
}
inline void wait_for_numbers(const int* counter, int count, Location at = {}) {
  interpreter::wait_for_numbers(counter, count, at);
}

}  // namespace tk
