#include "interpreter/machine.h"

#include <algorithm>
#include <cstring>
#include <exception>

namespace tk::interpreter {
namespace {

constexpr int kAgentsOfWarp = 4;
constexpr std::size_t kSharedAlignment = 1024;

thread_local Machine* current = nullptr;

int warps_of_block(const Launch& launch) { return launch.threads / 32; }

}  // namespace

Machine& machine() { return *current; }

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

Machine::Machine(const Launch& launch, Memory& memory)
    : launch_(launch), memory_(memory), random_(launch.seed + 1) {
  static constexpr double kEagerness[] = {0.5, 0.05, 0.95, 0.2};
  static constexpr double kSteadiness[] = {0.0, 0.8, 0.95};
  eagerness_ = kEagerness[launch.seed % 4];
  steadiness_ = kSteadiness[launch.seed % 3];
  clusters_ = launch.grid[0] / launch.cluster_size * launch.grid[1] * launch.grid[2];
}

Machine::~Machine() = default;

std::optional<Report> Machine::run() {
  current = this;
  while (!report_) {
    while (static_cast<std::int64_t>(resident_.size() + 1) * launch_.cluster_size <=
               std::max(launch_.resident_blocks, launch_.cluster_size) &&
           start_cluster()) {
    }
    if (live_.empty()) break;
    step();
  }
  while (!report_ && complete_something()) {
  }
  current = nullptr;
  return report_;
}

bool Machine::start_cluster() {
  if (next_cluster_ == clusters_) return false;
  const std::int64_t clusters_x = launch_.grid[0] / launch_.cluster_size;
  auto cluster = std::make_unique<Cluster>();
  const int warps = warps_of_block(launch_);
  cluster->next_who = kAgentsOfWarp * warps * launch_.cluster_size;
  cluster->warps_left = warps * launch_.cluster_size;
  for (int rank = 0; rank < launch_.cluster_size; ++rank) {
    // The launcher's bytes include the slack that aligns the first tile; here it is aligned.
    auto block = std::make_unique<Block>(cluster.get(), rank, launch_.shared_bytes);
    block->index[0] = static_cast<int>(next_cluster_ % clusters_x * launch_.cluster_size + rank);
    block->index[1] = static_cast<int>(next_cluster_ / clusters_x % launch_.grid[1]);
    block->index[2] = static_cast<int>(next_cluster_ / clusters_x / launch_.grid[1]);
    block->warps_left = warps;
    for (int index = 0; index < warps; ++index) {
      block->warps.push_back(std::make_unique<Warp>());
      Warp& warp = *block->warps.back();
      warp.block = block.get();
      warp.index = index;
      warp.fiber = std::make_unique<Fiber>([this, &warp] {
        try {
          launch_.entry(launch_.params);
          check_exit(warp);
        } catch (const Stopped&) {
        } catch (const std::exception& error) {
          report(FaultKind::kBudget, std::string("the interpreter failed: ") + error.what(), {},
                 warp.name());
        }
      });
      live_.push_back(&warp);
    }
    cluster->blocks.push_back(std::move(block));
  }
  for (auto& block : cluster->blocks) {
    for (auto& warp : block->warps) warp->clock.raise(warp->plain(), 1);
  }
  resident_.push_back(std::move(cluster));
  ++next_cluster_;
  return true;
}

void Machine::step() {
  if (random_.chance(eagerness_) && complete_something()) return;
  if (run_somebody() || complete_something()) return;
  report_ = deadlock();
}

bool Machine::run_somebody() {
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
  Cluster* cluster = warp.block->cluster;
  if (--warp.block->warps_left == 0) check_exit(*warp.block);
  if (--cluster->warps_left > 0) return;
  check_exit(*cluster);
  std::erase_if(resident_, [&](const auto& other) { return other.get() == cluster; });
}

bool Machine::complete_something() {
  // A load that lands, a step of a copy out, or the oldest product of some warp.
  const std::size_t copies = incoming_.size() + outgoing_.size();
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
    for (std::size_t i = 0; i < copy.ranks.size(); ++i) {
      Block& block = *copy.cluster->blocks[copy.ranks[i]];
      BarrierState& barrier = block.barriers.at(copy.barrier);
      barrier.bytes -= copy.bytes;
      if (!report_) complete_if_due(block, copy.barrier, copy.at);
    }
    return true;
  }
  choice -= incoming_.size();
  advance(*outgoing_[choice], false);
  std::erase_if(outgoing_, [](const auto& copy) { return copy->written; });
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

void Machine::advance(OutgoingCopy& copy, bool to_the_end) {
  if (!copy.read) {
    copy.gather(copy.bytes);
    copy.read = true;
    if (!to_the_end) return;
  }
  if (!copy.written) copy.scatter(copy.bytes);
  copy.written = true;
}

void Machine::yield() {
  if (report_) throw Stopped();
  Warp* self = running_;
  self->fiber->suspend();
  if (report_) throw Stopped();
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

void Machine::report(FaultKind kind, const std::string& message, Location at,
                     const std::string& who) {
  if (!report_) report_ = Report{kind, launch_.kernel, text(at), who, message, launch_.seed};
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
    if (copy.cluster != block.cluster || !lands) continue;
    report(FaultKind::kInFlightAtExit, "the block exits before this copy has landed", copy.at,
           block.warps.front()->name());
    return;
  }
}

void Machine::check_exit(Cluster& cluster) {
  for (const auto& block : cluster.blocks) {
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

Report Machine::deadlock() const {
  constexpr std::size_t kMaxLines = 40;
  std::string message = "nobody can go on.";
  std::size_t lines = 0;
  for (const Warp* warp : live_) {
    if (++lines > kMaxLines) {
      message += "\n  and " + std::to_string(live_.size() - kMaxLines) + " more warps";
      break;
    }
    message += "\n  " + warp->name() + " at " + text(warp->waits_at) + " waits for " +
               (warp->waits_for ? warp->waits_for() : "its turn to run");
  }
  const Warp& first = *live_.front();
  return {FaultKind::kDeadlock, launch_.kernel, text(first.waits_at),
          first.name(),         message,        launch_.seed};
}

std::optional<Report> run(const Launch& launch, Memory& memory) {
  return Machine(launch, memory).run();
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
