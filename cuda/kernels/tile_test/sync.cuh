// Barriers, rings, turns, the block template, and the schedulers as a block runs them.
#pragma once

#include "kernels/tile_test/common.cuh"
#include "kernels/tile_test/scheduler.cuh"

namespace tk::tile_test {

// Each warp's and warpgroup's index, and how many of a tile's values leaders hold: eight a lane.
// Every block of a grid of 2 x 3 x 2 writes its own place, the first one the rest. Buffers: warp
// indices (a tile for each warp); warpgroup indices; leaders of warps; of warpgroups; places of
// blocks.
__device__ __forceinline__ void places(const KernelParams& params) {
  const int warp = warp::index();
  RegTile<float, 16, 16> tile;
  const int x = grid::block_x(), y = grid::block_y(), z = grid::block_z();
  const bool first_block = x == 0 && y == 0 && z == 0;
  const auto put = [&](int buffer, float value) {
    warp::fill(tile, value);
    if (first_block) warp::store(matrix<float>(params, buffer, warp), tile, 0, 0);
  };
  put(0, warp::index());
  put(1, warpgroup::index());
  put(2, warp::leader() ? 1.0f : 0.0f);
  put(3, warpgroup::leader() ? 1.0f : 0.0f);
  warp::fill(tile, x + 10.0f * y + 100.0f * z + 1000.0f * grid::blocks_x());
  if (warp == 0) warp::store(matrix<float>(params, 4, x + 2 * y + 6 * z), tile, 0, 0);
}

enum HandoffBarrier : int { kFull = kFirstKernelBarrier, kEmpty };

// One warpgroup hands six tiles to another through one shared tile: by named barriers, or by
// barriers in shared memory on which all 128 threads arrive. Buffers: x; x + 1, x + 2, ...
template <bool kNamed>
__device__ __forceinline__ void handoff(const KernelParams& params) {
  constexpr int kRounds = 6;
  struct Shared {
    SharedTile<float, 64, 32> tile;
    Barrier full, empty;
  };
  Shared& shared = shared_memory<Shared>();
  if (first_thread()) {
    shared.full.init(128);
    shared.empty.init(128);
    publish_barriers();
  }
  block::sync();
  RegTile<float, 16, 32> x;
  if (warpgroup::index() == 0) {
    warpgroup::load(x, matrix<float>(params, 0), 0, 0);
    for (int round = 0; round < kRounds; ++round) {
      if constexpr (kNamed) {
        if (round > 0) named_sync(kEmpty, 256);
      } else {
        shared.empty.wait((round & 1) ^ 1);
      }
      warp::add(x, x, 1.0f);
      warpgroup::store(shared.tile, x);
      if constexpr (kNamed) {
        named_arrive(kFull, 256);
      } else {
        shared.full.arrive();
      }
    }
  } else {
    for (int round = 0; round < kRounds; ++round) {
      if constexpr (kNamed) {
        named_sync(kFull, 256);
      } else {
        shared.full.wait(round & 1);
      }
      warpgroup::load(x, shared.tile);
      if constexpr (kNamed) {
        if (round + 1 < kRounds) named_arrive(kEmpty, 256);
      } else {
        shared.empty.arrive();
      }
      warpgroup::store(matrix<float>(params, 1, round), x, 0, 0);
    }
  }
}

// Eight blocks, a cluster so that they start together, take turns from the last to the first.
// Buffers: x (8 x 64 x 32); two counters; the fragments of ((x7 + x6) + x5) + ...; that sum as
// rows; and y after y = 1, then y = y / 2 + x7, y = y / 2 + x6, ...
__device__ __forceinline__ void turns(const KernelParams& params) {
  struct Shared {
    Fragments<32> part;
  };
  Shared& shared = shared_memory<Shared>();
  const int rank = cluster::rank(), turn = 7 - rank;
  int* counters = data<int>(params, 1);
  float* sums = data<float>(params, 2);
  if (rank == 0 && warpgroup::leader()) {
    reset_turns(counters);
    reset_turns(counters + 1);
  }
  cluster::sync();

  RegTile<float, 16, 32> x, y;
  warpgroup::load(x, matrix<float>(params, 0, rank), 0, 0);
  warpgroup::store(shared.part, x);
  publish_shared();
  warpgroup::sync();
  if (warpgroup::leader()) {
    take_turn(counters, turn);
    if (turn == 0) {
      tma::store(sums, shared.part);
    } else {
      tma::add(sums, shared.part);
    }
    tma::commit();
    tma::wait<0>();
    pass_turn(counters);
    take_turn(counters + 1, turn);
  }
  warpgroup::sync();
  if (turn == 0) {
    warp::fill(y, 1.0f);
  } else {
    warpgroup::load(y, matrix<float>(params, 4), 0, 0);
  }
  warp::zip(y, y, x, [](float before, float added) { return 0.5f * before + added; });
  warpgroup::store(matrix<float>(params, 4), y, 0, 0);
  warpgroup::sync();
  if (warpgroup::leader()) pass_turn(counters + 1);

  cluster::sync();
  if (rank == 0) {
    warpgroup::load_fragments(y, sums);
    warpgroup::store(matrix<float>(params, 3), y, 0, 0);
  }
}

// Eight blocks, a cluster so that they start together, take three numbers each. Buffers: the
// counter; for each block the three, and the first again, when all have been taken.
__device__ __forceinline__ void numbers(const KernelParams& params) {
  struct Shared {
    SharedVec<int, 4> numbers;
  };
  Shared& shared = shared_memory<Shared>();
  const int rank = cluster::rank();
  int* counter = data<int>(params, 0);
  if (rank == 0 && warpgroup::leader()) reset_turns(counter);
  cluster::sync();
  if (warpgroup::leader()) {
    for (int i = 0; i < 3; ++i) store_element(shared.numbers, i, take_number(counter));
    wait_for_numbers(counter, 24);
    store_element_if_new(shared.numbers, 3, load_element_by_thread(shared.numbers, 0));
  }
  warpgroup::sync();
  for (int i = 0; i < 4; ++i) {
    RegTile<float, 16, 16> x;
    warp::fill(x, static_cast<float>(load_element(shared.numbers, i)));
    warpgroup::store(matrix<float>(params, 1, 4 * rank + i), x, 0, 0);
  }
}

// The block template with a ring of three stages in, one of two out and one of messages: y = x
// times its number from 1 on, for 128 x 64 matrices x; each of a cluster's blocks writes its own y.
// Of numbers, one consumer votes for the even and the other for the odd: what a block's producer
// and its consumers learn of it are two integers.
template <typename T, int kClusterSize_>
struct RingKernel {
  static constexpr int kClusterSize = kClusterSize_;
  static constexpr int kConsumers = 2;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  using Tile = SharedTile<T, 128, 64>;
  using Part = SharedTile<T, 64, 64>;
  using InRing = Pipeline<3>;
  using OutRing = StorePipeline<2>;
  using Messages = MessagePipeline<2, 2>;  // a matrix, and its number

  struct Shared {
    Tile x_smem[3];
    Part y_smem[2][kConsumers];
    InRing in_ring;
    OutRing out_ring;
    Messages messages;
    Ballot<4 * kConsumers> ballot;
  };

  __device__ __forceinline__ static int* learnt(const KernelParams& params) {
    return data<int>(params, 2) + 2 * grid::block_x();
  }

  __device__ __forceinline__ static grid::Rounds walk(const KernelParams& params) {
    return {grid::block_x() / kClusterSize, grid::blocks_x() / kClusterSize,
            static_cast<int>(params.buffers[0].shape[0])};
  }
  __device__ __forceinline__ static int rank() { return kClusterSize > 1 ? cluster::rank() : 0; }

  __device__ __forceinline__ static void init(const KernelParams&, Shared& shared) {
    shared.in_ring.init(4 * kConsumers * kClusterSize);
    shared.out_ring.init(4 * kConsumers);
    shared.messages.init(4 * kConsumers + 1);
    shared.ballot.init();
  }

  __device__ __forceinline__ static void load(const KernelParams& params, Shared& shared) {
    InRing::State state;
    Messages::State message_state;
    for (auto rounds = walk(params); rounds.valid(); rounds.next(), state.advance()) {
      shared.messages.send(message_state, {rounds.index(), rounds.index() + 1});
      shared.in_ring.acquire(state, Tile::kBytes);
      Tile& x_smem = shared.x_smem[state.stage];
      Barrier& full = shared.in_ring.full(state);
      if constexpr (kClusterSize == 1) {
        tma::load(x_smem, params.maps[0], full, tma::Keep::kBriefly, 0, 0, rounds.index());
      } else {
        constexpr int kPart = 128 / kClusterSize;
        tma::load_multicast(x_smem.template rows<kPart>(rank()), params.maps[0], full,
                            tma::Keep::kBriefly, (1 << kClusterSize) - 1, 0, kPart * rank(),
                            rounds.index());
      }
    }
    shared.messages.send(message_state, {-1, 0});
    shared.in_ring.drain(state);
    learnt(params)[0] = static_cast<int>(shared.ballot.wait_by_thread());
  }

  __device__ __forceinline__ static void store(const KernelParams& params, Shared& shared, int) {
    OutRing::State state;
    Messages::State message_state;
    for (int message[2];; state.advance()) {
      shared.messages.receive_by_thread(message_state, message);
      if (message[0] < 0) break;
      shared.out_ring.wait(state);
      for (int i = 0; i < kConsumers; ++i) {
        tma::store(params.maps[1], shared.y_smem[state.stage][i], 0, 64 * i,
                   message[0] * kClusterSize + rank());
      }
      tma::commit();
      tma::wait_read<0>();
      shared.out_ring.release(state);
    }
    tma::wait<0>();
  }

  __device__ __forceinline__ static void compute(const KernelParams& params, Shared& shared,
                                                 int consumer) {
    InRing::State in_state;
    OutRing::State out_state;
    Messages::State message_state;
    RegTile<T, 16, 64> x;
    uint32 said = 0;
    for (int message[2];;) {
      shared.messages.receive(message_state, message);
      if (message[0] < 0) break;
      shared.in_ring.wait(in_state);
      warpgroup::load(x, shared.x_smem[in_state.stage].template rows<64>(consumer));
      if constexpr (kClusterSize > 1) {
        shared.in_ring.release_read(in_state);
        shared.in_ring.release(in_state, rank() ^ 1);
      } else {
        publish_shared();
        warp::sync();
        if (warp::leader()) shared.in_ring.release_by_thread(in_state);
      }
      in_state.advance();
      warp::mul(x, x, static_cast<float>(message[1]));
      if (message[1] % kConsumers == consumer) {
        said |= 1u << message[1];
        shared.ballot.set(consumer, said);
      }
      shared.out_ring.acquire(out_state);
      warpgroup::store(shared.y_smem[out_state.stage][consumer], x);
      shared.out_ring.hand_over(out_state);
      out_state.advance();
    }
    shared.ballot.close();
    shared.ballot.set(consumer, said);
    const uint32 all = shared.ballot.wait();
    if (consumer == 0 && warpgroup::leader()) learnt(params)[1] = static_cast<int>(all);
  }
};

template <typename T, int kClusterSize>
__device__ __forceinline__ void ring(const KernelParams& params) {
  using Kernel = RingKernel<T, kClusterSize>;
  static_assert(sizeof(typename Kernel::Shared) + 1024 <= kSharedBytes);
  block::run<Kernel>(params);
}

// Buffers: Rounds (workers x slots), SectionedSnake (workers x slots x 3), grouped and sequential
// tiles (count x 3). Scalars: blocks (or rows), heads (or columns), batches, section (or group).
__device__ __forceinline__ void schedules(const KernelParams& params) {
  const auto shape = [&](int buffer, int axis) {
    return static_cast<int>(params.buffers[buffer].shape[axis]);
  };
  const int blocks = scalar(params, 0), heads = scalar(params, 1), batches = scalar(params, 2);
  const int section = scalar(params, 3);
  if (!first_thread()) return;
  list_rounds(data<int>(params, 0), shape(0, 0), shape(0, 1), blocks * heads * batches);
  list_sections(data<int>(params, 1), shape(1, 0), shape(1, 1), blocks, heads, batches, section);
  list_groups(data<int>(params, 2), shape(2, 0), blocks, heads, section);
  list_sequence(data<int>(params, 3), shape(3, 0), blocks, heads);
}

}  // namespace tk::tile_test
