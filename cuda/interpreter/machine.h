// The machine that runs a launch: clusters of blocks, their warps as fibres, and everything that
// completes later than it was issued.
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

struct GlobalSpan {
  std::byte* begin;
  std::size_t bytes;
};

// A copy out of shared memory: it is read, later written.
struct OutgoingCopy {
  std::uint32_t group;
  std::vector<std::byte> bytes;
  std::function<void(std::vector<std::byte>&)> gather, scatter;
  std::vector<GlobalSpan> spans;
  bool add;
  bool read = false, written = false, waited = false;
  std::string who;
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

  // Whose counts they are: plain accesses, what of them is published, products, copies out.
  std::uint32_t plain() const;
  std::uint32_t published() const { return plain() + 1; }
  std::uint32_t product_reads() const { return plain() + 2; }
  std::uint32_t copy_reads() const { return plain() + 3; }
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
  std::vector<std::unique_ptr<Block>> blocks;
  AccessLog log;
  std::uint32_t next_who;
  std::shared_ptr<Rendezvous> round = std::make_shared<Rendezvous>();
  int arrived = 0;
  int warps_left = 0;
};

// A load that has not landed.
struct IncomingCopy {
  Cluster* cluster;
  std::vector<int> ranks;  // of the blocks where it lands
  std::uint32_t barrier;   // at this address in each
  std::vector<std::uint32_t> phases;
  int bytes;
  std::function<void()> land;
  Location at;
};

class Machine {
 public:
  Machine(const Launch& launch, Memory& memory);
  ~Machine();

  std::optional<Report> run();

  // -- For the operations ---------------------------------------------------------------------
  Warp& warp() { return *running_; }
  Block& block() { return *running_->block; }
  Cluster& cluster() { return *running_->block->cluster; }
  const Launch& launch() const { return launch_; }
  Memory& memory() { return memory_; }

  // Others may run now.
  void yield();
  // Others run until it is ready.
  void wait(std::function<bool()> ready, std::function<std::string()> what, Location at);
  void report(FaultKind kind, const std::string& message, Location at, const std::string& who);

  BarrierState& barrier(Block& block, std::uint32_t address, Location at);
  void complete_if_due(Block& block, std::uint32_t address, Location at);
  void start_load(IncomingCopy copy) { incoming_.push_back(std::move(copy)); }
  void start_copy(std::shared_ptr<OutgoingCopy> copy, Location at);
  static void advance(OutgoingCopy& copy, bool to_the_end);
  static void compute_next(Warp& warp);

 private:
  bool start_cluster();
  void step();
  bool complete_something();
  bool run_somebody();
  void resume(Warp& warp);
  void finish(Warp& warp);
  void check_exit(Warp& warp);
  void check_exit(Block& block);
  void check_exit(Cluster& cluster);
  [[nodiscard]] Report deadlock() const;

  const Launch launch_;
  Memory& memory_;
  Random random_;
  double eagerness_;   // how soon asynchronous work is done
  double steadiness_;  // how long the same warp goes on
  std::int64_t next_cluster_ = 0, clusters_;
  std::vector<std::unique_ptr<Cluster>> resident_;
  std::vector<Warp*> live_;
  std::vector<IncomingCopy> incoming_;
  std::vector<std::shared_ptr<OutgoingCopy>> outgoing_;  // not written
  std::vector<std::shared_ptr<OutgoingCopy>> unwaited_;  // not known to be written
  Warp* running_ = nullptr;
  std::optional<Report> report_;
};

// The machine that runs on this thread.
Machine& machine();

// Fails where the address is no barrier or its initialisation is not known to the running warp.
BarrierState& usable_barrier(std::uint32_t address, Location at);

}  // namespace tk::interpreter
