// The block template: one producer warpgroup that loads and stores, consumer warpgroups that
// compute.
//
// A kernel is a struct with
//   Shared                        its shared memory, tiles first
//   kConsumers                    consumer warpgroups
//   kProducerRegisters, kConsumerRegisters   budgets of a thread, by role
//   kHelperRegisters              optional; those of the last consumer warpgroup, a helper
//   kClusterSize                  optional; blocks of a cluster
//   kResidentBlocks               optional; blocks that share a multiprocessor
//   init(params, shared)          one thread: barriers
//   load(params, shared)          one thread of the producer warpgroup: global -> shared
//   kStorers                      optional; storing warps: 1 by default, at most 3
//   store(params, shared, storer) optional; one thread of each storing warp of it: shared -> global
//   tally(params, shared)         optional; the producer warpgroup's last warp, where it stores
//                                 nothing: what is too small for a warpgroup
//   compute(params, shared, consumer)   each consumer warpgroup: load, compute and finish its tiles
//   help(params, shared)          the last one, where it is a helper: what it does instead
// Roles meet only through the barriers in Shared.
#pragma once

#include "tk/backend.cuh"

namespace tk::block {

namespace detail_roles {
// Registers of each thread where so many threads share a multiprocessor, as the compiler sets them.
constexpr int launch_registers(int threads) { return min(65536 / threads / 8 * 8, 240); }

template <typename Kernel, typename Params>
concept Stores = requires(const Params& params, typename Kernel::Shared& shared) {
  Kernel::store(params, shared, 0);
};
template <typename Kernel, typename Params>
concept Tallies = requires(const Params& params, typename Kernel::Shared& shared) {
  Kernel::tally(params, shared);
};
template <typename Kernel>
constexpr int cluster_size() {
  if constexpr (requires { Kernel::kClusterSize; }) {
    return Kernel::kClusterSize;
  } else {
    return 1;
  }
}
template <typename Kernel>
constexpr int resident_blocks() {
  if constexpr (requires { Kernel::kResidentBlocks; }) {
    return Kernel::kResidentBlocks;
  } else {
    return 1;
  }
}
// Of the last consumer warpgroup, if it has a budget of its own; else 0.
template <typename Kernel>
constexpr int helper_registers() {
  if constexpr (requires { Kernel::kHelperRegisters; }) {
    return Kernel::kHelperRegisters;
  } else {
    return 0;
  }
}
template <typename Kernel>
constexpr int all_registers() {
  constexpr int kHelper = helper_registers<Kernel>();
  constexpr int kLast = kHelper > 0 ? kHelper : Kernel::kConsumerRegisters;
  return Kernel::kProducerRegisters + (Kernel::kConsumers - 1) * Kernel::kConsumerRegisters + kLast;
}
template <typename Kernel>
constexpr int storers() {
  if constexpr (requires { Kernel::kStorers; }) {
    return Kernel::kStorers;
  } else {
    return 1;
  }
}
}  // namespace detail_roles

template <typename Kernel, typename Params>
__device__ __forceinline__ void run(const Params& params) {
  using Shared = typename Kernel::Shared;
  constexpr int kThreads = 128 * (1 + Kernel::kConsumers);
  constexpr int kLaunch =
      detail_roles::launch_registers(kThreads * detail_roles::resident_blocks<Kernel>());
  static_assert(128 * detail_roles::all_registers<Kernel>() <= kThreads * kLaunch,
                "the roles' registers exceed what the block starts with: increase would wait for "
                "ever");
  constexpr int kHelper = detail_roles::helper_registers<Kernel>();
  Shared& shared = shared_memory<Shared>();
  const int warp = warp::uniform_index();
  const int warpgroup = warp / 4;
  if (warp == 0 && warp::elect()) {
    Kernel::init(params, shared);
    publish_barriers();
  }
  constexpr bool kClustered = detail_roles::cluster_size<Kernel>() > 1;
  if constexpr (kClustered) {
    cluster::sync();
  } else {
    sync();
  }
  if (warpgroup == 0) {
    become_producer<Kernel::kProducerRegisters>();
    if (warp == 0 && warp::elect()) Kernel::load(params, shared);
    if constexpr (detail_roles::Stores<Kernel, Params>) {
      constexpr int kStorers = detail_roles::storers<Kernel>();
      static_assert(kStorers >= 1 && kStorers <= 3,
                    "the producer warpgroup has three warps to store");
      if (warp >= 1 && warp <= kStorers && warp::elect()) Kernel::store(params, shared, warp - 1);
    }
    if constexpr (detail_roles::Tallies<Kernel, Params>) {
      static_assert(!detail_roles::Stores<Kernel, Params> || detail_roles::storers<Kernel>() < 3,
                    "the producer warpgroup's last warp stores");
      if (warp == 3) Kernel::tally(params, shared);
    }
  } else if (kHelper > 0 && warpgroup == Kernel::kConsumers) {
    if constexpr (kHelper > 0) {
      if constexpr (kHelper <= kLaunch) {
        become_helper<kHelper>(warpgroup - 1);
      } else {
        become_consumer<kHelper>(warpgroup - 1);
      }
      Kernel::help(params, shared);
    }
  } else {
    become_consumer<Kernel::kConsumerRegisters>(warpgroup - 1);
    Kernel::compute(params, shared, warpgroup - 1);
  }
  if constexpr (kClustered) {
    // A block stays until no other block of its cluster can still write to it.
    warp::sync();
    cluster::sync();
  }
}

}  // namespace tk::block
