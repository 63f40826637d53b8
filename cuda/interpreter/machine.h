// The machine that runs one cluster of blocks: their warps as fibres, and everything that completes
// later than it was issued. Machines of one launch share global memory alone (grid.h).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "interpreter/clock.h"
#include "interpreter/fiber.h"
#include "interpreter/launch.h"
#include "interpreter/memory.h"
#include "interpreter/report.h"
#include "interpreter/shadow.h"

namespace tk::interpreter {

class Grid;
class Machine;
struct Block;
struct Cluster;

// Thrown through a fibre when its launch is over.
struct Stopped {};

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {  // splitmix64 (Steele, Lea and Flood 2014)
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  std::size_t below(std::size_t count) { return next() % count; }
  bool chance(double probability) { return (next() >> 11) * 0x1p-53 < probability; }

 private:
  std::uint64_t state_;
};

// Everyone who waits at a named barrier, or for a whole block or cluster, waits for one of these.
struct Rendezvous {
  VectorClock clock;
  bool complete = false;
};

struct NamedBarrierState {
  int threads = 0, arrived = 0;
  std::vector<int> warps;
  std::shared_ptr<Rendezvous> round = std::make_shared<Rendezvous>();
};

struct BarrierState {
  int arrivals = 0, pending = 0;
  std::int64_t bytes = 0;   // expected and not landed
  std::uint32_t phase = 0;  // phases completed
  std::uint32_t who = 0;    // whose count is the number of completed phases
  VectorClock arriving, completed;
  bool published = false;
  int initialiser = 0;  // warp
  std::uint32_t initialised = 0;
  Location init_at;
};

struct PendingProduct {
  Product product;
  std::uint32_t number;
  std::uint32_t group;
  bool computed = false;
  Location at;
};

// Registers that products own until a wait names them.
struct OwnedRegisters {
  RegisterRange range;
  std::uint32_t number;  // of the last product
  bool accumulator;
  Location at;
};

// A copy out of shared memory: it is read, later written.
struct OutgoingCopy {
  std::uint32_t group;
  std::vector<std::byte> bytes;
  std::function<void(std::vector<std::byte>&)> gather, scatter;
  bool read = false, leaving = false, written = false;
  Location at;
};

struct Warp {
  Block* block;
  int index;
  VectorClock clock;
  std::unique_ptr<Fiber> fiber;
  std::string role;
  int registers = 255;
  bool one_lane = false;

  std::deque<PendingProduct> products;  // issued and not waited for
  std::uint32_t next_product = 1, product_group = 0;
  std::vector<OwnedRegisters> owned;

  std::vector<std::shared_ptr<OutgoingCopy>> copies;  // not known to be written
  std::uint32_t copy_group = 0;                       // the open one
  std::uint32_t copies_read = 0;                      // groups known to be read

  std::function<bool()> ready;  // empty where it can go on
  std::function<std::string()> waits_for;
  Location waits_at;

  // Whose counts they are: plain accesses, what of them the async proxy sees of shared and of
  // global memory, products, and copies out as readers of shared and writers of global memory.
  std::uint32_t plain() const;
  std::uint32_t published() const { return plain() + 1; }
  std::uint32_t published_global() const { return plain() + 2; }
  std::uint32_t product_reads() const { return plain() + 3; }
  std::uint32_t copy_reads() const { return plain() + 4; }
  std::uint32_t copy_writes() const { return plain() + 5; }
  std::string name() const;
};

struct Block {
  Cluster* cluster;
  int rank;      // in the cluster
  int index[3];  // in the grid
  std::vector<std::byte> storage;
  std::byte* shared;  // aligned
  std::size_t shared_bytes;
  Shadow shadow;
  std::map<std::uint32_t, BarrierState> barriers;
  std::array<NamedBarrierState, 16> named;
  std::vector<std::unique_ptr<Warp>> warps;
  int warps_left = 0;

  Block(Cluster* cluster, int rank, std::size_t bytes);
};

struct Cluster {
  std::int64_t number;  // in the grid
  std::vector<std::unique_ptr<Block>> blocks;
  AccessLog log;
  std::uint32_t next_who;
  std::shared_ptr<Rendezvous> round = std::make_shared<Rendezvous>();
  int arrived = 0;
  int warps_left = 0;
};

// A load that has not landed.
struct IncomingCopy {
  std::vector<int> ranks;  // of the blocks where it lands
  std::uint32_t barrier;   // at this address in each
  std::vector<std::uint32_t> phases;
  int bytes;
  std::function<void()> land;
  Location at;
};

// What concerns global memory, and so other clusters too: done between rounds, in the order in
// which it was put off.
struct Deferred {
  Warp* warp;
  std::function<void()> act;
};

class Machine {
 public:
  Machine(Grid& grid, std::int64_t number);
  ~Machine();

  // -- For the grid ---------------------------------------------------------------------------
  // A round: touches nothing that belongs to others. Whether anything happened.
  bool run_alone();
  // What was put off meanwhile, while no other machine does anything. Whether there was any.
  bool meet_others();
  bool warps_done() const { return cluster_.warps_left == 0; }
  bool copies_done() const;
  const std::optional<Report>& report() const { return report_; }
  int describe_waits(std::string& text, int lines) const;
  const Warp* first_waiting() const { return live_.empty() ? nullptr : live_.front(); }

  // -- For the operations ---------------------------------------------------------------------
  Warp& warp() { return *running_; }
  Block& block() { return *running_->block; }
  Cluster& cluster() { return cluster_; }
  const Launch& launch() const;
  Memory& memory();
  Grid& grid() { return grid_; }

  // Others may run now.
  void yield();
  // Others run until it is ready.
  void wait(std::function<bool()> ready, std::function<std::string()> what, Location at);
  void report(FaultKind kind, const std::string& message, Location at, const std::string& who);

  // Once this round is over.
  void defer(std::function<void()> act) { deferred_.push_back({running_, std::move(act)}); }
  // The same, and the warp waits for it.
  void exclusive(std::function<void()> act, Location at);
  // Takes note of an access to global memory, as of now.
  void account(std::vector<GlobalSpan> spans, GlobalAccess access);

  BarrierState& barrier(Block& block, std::uint32_t address, Location at);
  void complete_if_due(Block& block, std::uint32_t address);
  void start_load(IncomingCopy copy) { incoming_.push_back(std::move(copy)); }
  void start_copy(std::shared_ptr<OutgoingCopy> copy) { outgoing_.push_back(std::move(copy)); }
  static void read_copy(OutgoingCopy& copy);
  static void write_copy(OutgoingCopy& copy);
  static void compute_next(Warp& warp);

 private:
  void start_warps();
  bool step();
  bool complete_something();
  bool run_somebody();
  void resume(Warp& warp);
  void finish(Warp& warp);
  void unwind();
  void check_exit(Warp& warp);
  void check_exit(Block& block);
  void check_exit();

  Grid& grid_;
  Random random_;
  double eagerness_;   // how soon asynchronous work is done
  double steadiness_;  // how long the same warp goes on
  Cluster cluster_;
  std::vector<Warp*> live_;
  std::vector<IncomingCopy> incoming_;
  std::vector<std::shared_ptr<OutgoingCopy>> outgoing_;  // not written
  std::vector<Deferred> deferred_;
  Warp* running_ = nullptr;
  bool unwinding_ = false;
  std::optional<Report> report_;
};

// The machine that runs on this thread. Fibres go from thread to thread: nobody may remember where
// this is kept (current.cc).
Machine& machine();
void set_machine(Machine* machine);

}  // namespace tk::interpreter
