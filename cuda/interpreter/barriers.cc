// Barriers of every kind: mbarriers, named barriers, whole blocks and clusters, and turns.
#include <algorithm>

#include "interpreter/grid.h"
#include "interpreter/machine.h"

namespace tk::interpreter {
namespace {

std::string describe(const BarrierState& barrier, std::uint32_t phase) {
  return "phase " + std::to_string(phase) + " (parity) of the barrier initialised at " +
         text(barrier.init_at) + ": phase " + std::to_string(barrier.phase) + " is open, " +
         std::to_string(barrier.pending) + " of " + std::to_string(barrier.arrivals) +
         " arrivals and " + std::to_string(barrier.bytes) + " bytes are missing";
}

// What the running warp did up to now is known to whoever joins `clock`.
void release_to(VectorClock& clock) {
  Warp& warp = machine().warp();
  clock.join(warp.clock);
  warp.clock.raise(warp.plain(), warp.clock[warp.plain()] + 1);
}

void arrive(Block& block, std::uint32_t address, Location at) {
  Machine& m = machine();
  BarrierState& barrier = m.barrier(block, address, at);
  const int count = m.warp().one_lane ? 1 : 32;
  if (count > barrier.pending) {
    fail(FaultKind::kBarrier,
         "arrives " + std::to_string(count) + " times where the phase misses " +
             std::to_string(barrier.pending) + " of " + std::to_string(barrier.arrivals) +
             " arrivals" + (count == 32 ? ": all 32 lanes arrive, not the leader alone" : ""),
         at);
  }
  barrier.pending -= count;
  release_to(barrier.arriving);
  m.complete_if_due(block, address);
}

// The fence that is part of a turn: it publishes every ordinary store that `clock` knows of.
void fence_global(VectorClock& clock) {
  for (const auto& block : machine().cluster().blocks) {
    for (const auto& warp : block->warps) {
      clock.raise(warp->published_global(), clock[warp->plain()]);
    }
  }
}

}  // namespace

BarrierState& Machine::barrier(Block& block, std::uint32_t address, Location at) {
  const auto found = block.barriers.find(address);
  if (found == block.barriers.end()) {
    fail(FaultKind::kBarrier, "uses a barrier that nobody has initialised", at);
  }
  BarrierState& barrier = found->second;
  const Warp& initialiser = *block.warps[barrier.initialiser];
  if (running_->clock[initialiser.plain()] < barrier.initialised) {
    fail(FaultKind::kBarrier,
         "uses a barrier although no block or cluster sync says that it is initialised", at);
  }
  return barrier;
}

void Machine::complete_if_due(Block& block, std::uint32_t address) {
  BarrierState& barrier = block.barriers.at(address);
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  for (const IncomingCopy& copy : incoming_) {
    if (copy.barrier != address) continue;
    for (const int rank : copy.ranks) {
      if (rank != block.rank) continue;
      report(FaultKind::kBarrier,
             "a phase of the barrier completes although " + std::to_string(copy.bytes) +
                 " bytes of a copy started on it have not landed: it expects too few bytes",
             copy.at, block.warps.front()->name());
      return;
    }
  }
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  barrier.completed.join(barrier.arriving);
  barrier.arriving.clear();
}

void barrier_init(std::uint32_t address, int arrivals, Location at) {
  Machine& m = machine();
  require_one_lane("a barrier is initialised", at);
  if (arrivals < 1) fail(FaultKind::kBarrier, "a barrier expects at least one arrival", at);
  if (address % 8 != 0 || address + 8 > m.block().shared_bytes) {
    fail(FaultKind::kOutOfBounds, "a barrier lies outside of the block's shared memory", at);
  }
  BarrierState barrier;
  barrier.arrivals = barrier.pending = arrivals;
  barrier.who = m.cluster().next_who++;
  barrier.initialiser = m.warp().index;
  barrier.initialised = m.warp().clock[m.warp().plain()];
  barrier.init_at = at;
  if (!m.block().barriers.emplace(address, barrier).second) {
    fail(FaultKind::kBarrier, "a barrier is initialised twice", at);
  }
}

void publish_barriers(Location) {
  for (auto& [address, barrier] : machine().block().barriers) {
    if (barrier.initialiser == machine().warp().index) barrier.published = true;
  }
}

void barrier_arrive(std::uint32_t address, int block, Location at) {
  Machine& m = machine();
  m.yield();
  if (block < 0) return arrive(m.block(), address, at);
  if (block >= static_cast<int>(m.cluster().blocks.size())) {
    fail(FaultKind::kOutOfBounds,
         "arrives at a barrier of block " + std::to_string(block) + " of a cluster of " +
             std::to_string(m.cluster().blocks.size()),
         at);
  }
  if (m.cluster().blocks[block]->warps_left == 0) {
    fail(FaultKind::kInFlightAtExit,
         "arrives at a barrier of another block of the cluster, which has exited: a cluster sync "
         "before the end is missing",
         at);
  }
  arrive(*m.cluster().blocks[block], address, at);
}

void barrier_expect(std::uint32_t address, int bytes, Location at) {
  Machine& m = machine();
  m.yield();
  require_one_lane("bytes are expected", at);
  if (bytes < 0 || bytes >= 1 << 20) {
    fail(FaultKind::kBarrier, "expects " + std::to_string(bytes) + " bytes; a barrier counts 2^20",
         at);
  }
  m.barrier(m.block(), address, at).bytes += bytes;
  arrive(m.block(), address, at);
}

void barrier_wait(std::uint32_t address, std::uint32_t phase, Location at) {
  Machine& m = machine();
  BarrierState& barrier = m.barrier(m.block(), address, at);
  if (phase > 1) fail(FaultKind::kBarrier, "waits for a phase that is neither 0 nor 1", at);
  m.wait([&barrier, phase] { return (barrier.phase & 1) != phase; },
         [&barrier, phase] { return describe(barrier, phase); }, at);
  m.warp().clock.join(barrier.completed);
  m.warp().clock.raise(barrier.who, barrier.phase);
}

void named_barrier(int id, int threads, bool waits, Location at) {
  Machine& m = machine();
  act_as_warp();
  m.yield();
  if (id < 0 || id > 15) {
    fail(FaultKind::kNamedBarrier,
         "named barrier " + std::to_string(id) + " does not exist: a block has 16", at);
  }
  if (threads % 32 != 0 || threads < 32 || threads > m.launch().threads) {
    fail(FaultKind::kNamedBarrier,
         "named barrier " + std::to_string(id) + " is given " + std::to_string(threads) +
             " threads: whole warps of the block's " + std::to_string(m.launch().threads) +
             " are expected",
         at);
  }
  NamedBarrierState& barrier = m.block().named[id];
  const int self = m.warp().index;
  if (barrier.arrived == 0) barrier.threads = threads;
  if (barrier.threads != threads) {
    fail(FaultKind::kNamedBarrier,
         "named barrier " + std::to_string(id) + " is given " + std::to_string(threads) +
             " threads here and " + std::to_string(barrier.threads) + " by those who came before",
         at);
  }
  if (std::find(barrier.warps.begin(), barrier.warps.end(), self) != barrier.warps.end()) {
    fail(FaultKind::kNamedBarrier,
         "the warp comes to named barrier " + std::to_string(id) +
             " a second time before the others have come once",
         at);
  }
  const auto round = barrier.round;
  barrier.warps.push_back(self);
  barrier.arrived += 32;
  release_to(round->clock);
  if (barrier.arrived == barrier.threads) {
    round->complete = true;
    barrier = NamedBarrierState();
  }
  if (!waits) return;
  m.wait([round] { return round->complete; },
         [&barrier, id] {
           return "named barrier " + std::to_string(id) + ", where " +
                  std::to_string(barrier.arrived) + " of " + std::to_string(barrier.threads) +
                  " threads have come";
         },
         at);
  m.warp().clock.join(round->clock);
}

void block_sync(Location at) { named_barrier(0, machine().launch().threads, true, at); }

void cluster_sync(Location at) {
  Machine& m = machine();
  act_as_warp();
  m.yield();
  Cluster& cluster = m.cluster();
  const int everyone = static_cast<int>(cluster.blocks.size() * m.block().warps.size());
  const auto round = cluster.round;
  release_to(round->clock);
  if (++cluster.arrived == everyone) {
    round->complete = true;
    cluster.round = std::make_shared<Rendezvous>();
    cluster.arrived = 0;
  }
  m.wait([round] { return round->complete; },
         [&cluster, everyone] {
           return "the cluster, of which " + std::to_string(cluster.arrived) + " of " +
                  std::to_string(everyone) + " warps have come";
         },
         at);
  m.warp().clock.join(round->clock);
}

void warp_sync(Location) {
  act_as_warp();
  machine().yield();
}

void reset_turns(int* counter, Location at) {
  require_one_lane("a counter of turns is reset", at);
  const GlobalSpan span = {counter, sizeof(int)};
  write_global({&span, 1}, [counter] { *counter = 0; }, at);
}

void take_turn(const int* counter, int turn, Location at) {
  Machine& m = machine();
  require_one_lane("a turn is taken", at);
  m.memory().check_counter(counter, m.cluster().number, m.warp().clock, at);
  m.wait([=] { return *counter == turn; },
         [=] {
           return "turn " + std::to_string(turn) + " of a counter that is at " +
                  std::to_string(*counter);
         },
         at);
  VectorClock& clock = m.warp().clock;
  if (const auto learnt = m.grid().known_turns(counter)) {
    clock.learn(learnt);
    const auto own = learnt->find(m.cluster().number);
    if (own != learnt->end()) clock.join(*own->second);
  }
  // Copies that follow see the ordinary stores that it knows of.
  fence_global(clock);
}

void pass_turn(int* counter, Location at) {
  Machine& m = machine();
  m.yield();
  require_one_lane("a turn is passed on", at);
  m.memory().check_counter(counter, m.cluster().number, m.warp().clock, at);
  m.memory().check_inside(counter, sizeof(int), GlobalUse::kAdd, at);
  // What others learn with the turn; the fence of taking it is counted in.
  VectorClock known = m.warp().clock;
  fence_global(known);
  OtherClusters mine = {{m.cluster().number, std::make_shared<Counts>(known.counts())}};
  VectorClock turn;
  turn.learn(std::make_shared<OtherClusters>(std::move(mine)));
  turn.learn(known.others());
  VectorClock& own = m.warp().clock;
  own.raise(m.warp().plain(), own[m.warp().plain()] + 1);
  m.exclusive(
      [&] {
        auto& known_turns = m.grid().turns(counter);
        turn.learn(known_turns);
        known_turns = turn.others();
        ++*counter;
      },
      at);
}

int take_number(int* counter, Location at) {
  Machine& m = machine();
  require_one_lane("a number is taken", at);
  m.memory().check_counter(counter, m.cluster().number, m.warp().clock, at);
  m.memory().check_inside(counter, sizeof(int), GlobalUse::kAdd, at);
  int number = 0;
  m.exclusive([&] { number = (*counter)++; }, at);
  return number;
}

void wait_for_numbers(const int* counter, int count, Location at) {
  Machine& m = machine();
  require_one_lane("numbers are waited for", at);
  m.memory().check_counter(counter, m.cluster().number, m.warp().clock, at);
  m.wait([=] { return *counter >= count; },
         [=] {
           return std::to_string(count) + " numbers of a counter that is at " +
                  std::to_string(*counter);
         },
         at);
}

}  // namespace tk::interpreter
