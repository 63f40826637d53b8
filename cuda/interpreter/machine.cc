#include "interpreter/machine.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <utility>

#include "interpreter/grid.h"

namespace tk::interpreter {
namespace {

constexpr int kAgentsOfWarp = 6;
constexpr std::size_t kSharedAlignment = 1024;

// Rounds are long against meeting at their end, and about as long for every cluster, so that no
// core waits; to be out of step with the others, a cluster sits out one now and then.
constexpr int kRoundSteps = 32;
constexpr double kSitsOut = 0.1;

}  // namespace

std::uint32_t Warp::plain() const {
  const auto warps = static_cast<std::uint32_t>(block->warps.size());
  return kAgentsOfWarp * (block->rank * warps + index);
}

std::string Warp::name() const {
  std::string text = "block (";
  for (int axis = 0; axis < 3; ++axis) {
    text += (axis == 0 ? "" : ", ") + std::to_string(block->index[axis]);
  }
  text += ") warp " + std::to_string(index);
  return role.empty() ? text : text + " (" + role + ")";
}

Block::Block(Cluster* cluster, int rank, std::size_t bytes)
    : cluster(cluster),
      rank(rank),
      storage(bytes + kSharedAlignment, std::byte{0xff}),
      shared_bytes(bytes),
      shadow(bytes) {
  const auto start = reinterpret_cast<std::uintptr_t>(storage.data());
  shared = storage.data() + (kSharedAlignment - start % kSharedAlignment) % kSharedAlignment;
}

Machine::Machine(Grid& grid, std::int64_t number)
    : grid_(grid), random_((launch().seed + 1) * 0x9e3779b97f4a7c15u + number) {
  static constexpr double kEagerness[] = {0.5, 0.05, 0.95, 0.2};
  static constexpr double kSteadiness[] = {0.0, 0.8, 0.95};
  eagerness_ = kEagerness[launch().seed % 4];
  steadiness_ = kSteadiness[launch().seed % 3];
  cluster_.number = number;
  start_warps();
}

Machine::~Machine() {
  if (!live_.empty()) unwind();
}

const Launch& Machine::launch() const { return grid_.launch(); }
Memory& Machine::memory() { return grid_.memory(); }

void Machine::start_warps() {
  const Launch& launch = this->launch();
  const std::int64_t clusters_x = launch.grid[0] / launch.cluster_size;
  const int warps = launch.threads / 32;
  cluster_.next_who = kAgentsOfWarp * warps * launch.cluster_size;
  cluster_.warps_left = warps * launch.cluster_size;
  for (int rank = 0; rank < launch.cluster_size; ++rank) {
    // The launcher's bytes include the slack that aligns the first tile; here it is aligned.
    auto block = std::make_unique<Block>(&cluster_, rank, launch.shared_bytes);
    block->index[0] = static_cast<int>(cluster_.number % clusters_x * launch.cluster_size + rank);
    block->index[1] = static_cast<int>(cluster_.number / clusters_x % launch.grid[1]);
    block->index[2] = static_cast<int>(cluster_.number / clusters_x / launch.grid[1]);
    block->warps_left = warps;
    for (int index = 0; index < warps; ++index) {
      block->warps.push_back(std::make_unique<Warp>());
      Warp& warp = *block->warps.back();
      warp.block = block.get();
      warp.index = index;
      warp.fiber = std::make_unique<Fiber>([this, &warp] {
        if (unwinding_) return;
        try {
          this->launch().entry(this->launch().params);
          check_exit(warp);
        } catch (const Stopped&) {
        } catch (const std::exception& error) {
          report(FaultKind::kBudget, std::string("the interpreter failed: ") + error.what(), {},
                 warp.name());
        }
      });
      live_.push_back(&warp);
    }
    cluster_.blocks.push_back(std::move(block));
  }
  for (auto& block : cluster_.blocks) {
    for (auto& warp : block->warps) warp->clock.raise(warp->plain(), 1);
  }
}

bool Machine::run_alone() {
  set_machine(this);
  // Sitting out is no standstill: what it could do, it does later.
  const bool sits_out = random_.chance(kSitsOut);
  const std::size_t steps = sits_out ? 0 : kRoundSteps / 2 + random_.below(kRoundSteps);
  std::size_t done = 0;
  while (done < steps && !report_ && step()) ++done;
  set_machine(nullptr);
  return sits_out || done > 0;
}

bool Machine::meet_others() {
  if (deferred_.empty()) return false;
  set_machine(this);
  Warp* const last = running_;
  const std::vector<Deferred> deferred = std::exchange(deferred_, {});
  for (const Deferred& deed : deferred) {
    if (report_) break;
    running_ = deed.warp;
    try {
      deed.act();
    } catch (const Stopped&) {
    }
  }
  running_ = last;
  set_machine(nullptr);
  return true;
}

bool Machine::copies_done() const {
  return std::all_of(outgoing_.begin(), outgoing_.end(),
                     [](const auto& copy) { return copy->written; });
}

// Lets every warp that is under way leave its functions, so that what they own is freed.
void Machine::unwind() {
  set_machine(this);
  unwinding_ = true;
  for (Warp* warp : live_) {
    running_ = warp;
    if (!warp->fiber->finished()) warp->fiber->resume();
  }
  set_machine(nullptr);
}

bool Machine::step() {
  if (random_.chance(eagerness_) && complete_something()) return true;
  return run_somebody() || complete_something();
}

bool Machine::run_somebody() {
  if (live_.empty()) return false;
  if (running_ != nullptr && !running_->ready && random_.chance(steadiness_)) {
    resume(*running_);
    return true;
  }
  const std::size_t first = random_.below(live_.size());
  for (std::size_t i = 0; i < live_.size(); ++i) {
    Warp& warp = *live_[(first + i) % live_.size()];
    if (warp.ready && !warp.ready()) continue;
    resume(warp);
    return true;
  }
  return false;
}

void Machine::resume(Warp& warp) {
  running_ = &warp;
  warp.ready = nullptr;
  warp.fiber->resume();
  if (warp.fiber->finished() && !report_) finish(warp);
}

void Machine::finish(Warp& warp) {
  running_ = nullptr;
  live_.erase(std::find(live_.begin(), live_.end(), &warp));
  if (--warp.block->warps_left == 0) check_exit(*warp.block);
  if (--cluster_.warps_left == 0) check_exit();
}

bool Machine::complete_something() {
  // A load that lands, a step of a copy out, or the oldest product of some warp.
  std::vector<std::shared_ptr<OutgoingCopy>> staying;
  std::erase_if(outgoing_, [](const auto& copy) { return copy->written; });
  for (const auto& copy : outgoing_) {
    if (!copy->leaving) staying.push_back(copy);
  }
  const std::size_t copies = incoming_.size() + staying.size();
  std::size_t choice = random_.below(copies + 4);
  if (choice >= copies || copies == 0) {
    const std::size_t first = live_.empty() ? 0 : random_.below(live_.size());
    for (std::size_t i = 0; i < live_.size(); ++i) {
      Warp& warp = *live_[(first + i) % live_.size()];
      if (warp.products.empty() || warp.products.back().computed) continue;
      compute_next(warp);
      return true;
    }
    if (copies == 0) return false;
    choice = random_.below(copies);
  }
  if (choice < incoming_.size()) {
    const IncomingCopy copy = std::move(incoming_[choice]);
    incoming_.erase(incoming_.begin() + choice);
    copy.land();
    for (const int rank : copy.ranks) {
      Block& block = *cluster_.blocks[rank];
      BarrierState& barrier = block.barriers.at(copy.barrier);
      barrier.bytes -= copy.bytes;
      if (!report_) complete_if_due(block, copy.barrier);
    }
    return true;
  }
  const auto& copy = staying[choice - incoming_.size()];
  if (!copy->read) {
    read_copy(*copy);
  } else {
    copy->leaving = true;
    defer([copy] { write_copy(*copy); });
  }
  return true;
}

void Machine::compute_next(Warp& warp) {
  for (PendingProduct& pending : warp.products) {
    if (pending.computed) continue;
    pending.product.compute();
    pending.computed = true;
    return;
  }
}

void Machine::read_copy(OutgoingCopy& copy) {
  if (!copy.read) copy.gather(copy.bytes);
  copy.read = true;
}

void Machine::write_copy(OutgoingCopy& copy) {
  if (!copy.written) copy.scatter(copy.bytes);
  copy.written = true;
}

void Machine::yield() {
  if (report_ || unwinding_) throw Stopped();
  running_->fiber->suspend();
  if (report_ || unwinding_) throw Stopped();
}

void Machine::wait(std::function<bool()> ready, std::function<std::string()> what, Location at) {
  yield();
  Warp& self = warp();
  self.waits_for = std::move(what);
  self.waits_at = at;
  while (!ready()) {
    self.ready = ready;
    yield();
  }
  self.waits_for = nullptr;
}

void Machine::exclusive(std::function<void()> act, Location at) {
  bool done = false;
  defer([&] {
    act();
    done = true;
  });
  wait([&done] { return done; }, [] { return std::string("other blocks' use of memory"); }, at);
}

void Machine::account(std::vector<GlobalSpan> spans, GlobalAccess access) {
  access.cluster = cluster_.number;
  access.by = warp().name();
  defer([this, spans = std::move(spans), access = std::move(access), clock = warp().clock] {
    memory().account(spans, access, clock);
  });
}

void Machine::report(FaultKind kind, const std::string& message, Location at,
                     const std::string& who) {
  if (!report_) report_ = Report{kind, launch().kernel, text(at), who, message, launch().seed};
}

void fail(FaultKind kind, const std::string& message, Location at) {
  fail_later(kind, message, at);
  throw Stopped();
}

void fail_later(FaultKind kind, const std::string& message, Location at) noexcept {
  machine().report(kind, message, at, machine().warp().name());
}

void Machine::check_exit(Warp& warp) {
  if (!warp.products.empty()) {
    fail(FaultKind::kInFlightAtExit,
         "the warp exits with a product in flight that nobody waited "
         "for",
         warp.products.front().at);
  }
  for (const auto& copy : warp.copies) {
    if (copy->group < warp.copies_read) continue;
    fail(FaultKind::kInFlightAtExit,
         "the warp exits although the copy engine may still read the block's shared memory for "
         "this copy: wait_read is missing",
         copy->at);
  }
}

void Machine::check_exit(Block& block) {
  for (const IncomingCopy& copy : incoming_) {
    const bool lands =
        std::find(copy.ranks.begin(), copy.ranks.end(), block.rank) != copy.ranks.end();
    if (!lands) continue;
    report(FaultKind::kInFlightAtExit, "the block exits before this copy has landed", copy.at,
           block.warps.front()->name());
    return;
  }
}

void Machine::check_exit() {
  for (const auto& block : cluster_.blocks) {
    for (const auto& [address, barrier] : block->barriers) {
      if (barrier.pending == barrier.arrivals && barrier.bytes == 0) continue;
      report(FaultKind::kBarrier,
             "the block exits in the middle of phase " + std::to_string(barrier.phase) +
                 " of the barrier initialised here: " + std::to_string(barrier.pending) + " of " +
                 std::to_string(barrier.arrivals) + " arrivals and " +
                 std::to_string(barrier.bytes) + " bytes are missing",
             barrier.init_at, block->warps.front()->name());
      return;
    }
  }
}

// How many lines are left; fewer than none where there were more to say.
int Machine::describe_waits(std::string& message, int lines) const {
  for (const Warp* warp : live_) {
    if (--lines < 0) continue;
    message += "\n  " + warp->name() + " at " + text(warp->waits_at) + " waits for " +
               (warp->waits_for ? warp->waits_for() : "its turn to run");
  }
  return lines;
}

// -- Who ------------------------------------------------------------------------------------------
int warp_index() { return machine().warp().index; }
int block_index(int axis) { return machine().block().index[axis]; }
int block_count(int axis) { return static_cast<int>(machine().launch().grid[axis]); }
int cluster_rank() { return machine().block().rank; }

void enter_role(std::string role, int registers) {
  machine().warp().role = std::move(role);
  machine().warp().registers = registers;
}
void act_as_one_lane() { machine().warp().one_lane = true; }
void act_as_warp() { machine().warp().one_lane = false; }
void require_one_lane(const char* what, Location at) {
  if (machine().warp().one_lane) return;
  fail(FaultKind::kLanes, std::string(what) + " by all 32 lanes of a warp: only its leader should",
       at);
}

}  // namespace tk::interpreter
