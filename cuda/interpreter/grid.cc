#include "interpreter/grid.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace tk::interpreter {

Grid::Grid(const Launch& launch, Memory& memory)
    : launch_(launch),
      memory_(memory),
      random_(launch.seed + 1),
      clusters_(launch.grid[0] / launch.cluster_size * launch.grid[1] * launch.grid[2]) {
  memory_.begin_launch();
}

std::optional<Report> Grid::run() {
  const std::int64_t at_once = std::max(1, launch_.resident_blocks / launch_.cluster_size);
  const int cores = launch_.threads_of_host > 0 ? launch_.threads_of_host : available_processors();
  Crew crew(static_cast<int>(std::min<std::int64_t>({cores, at_once, clusters_})));
  std::vector<char> happened;
  while (true) {
    start_clusters();
    if (machines_.empty()) return std::nullopt;
    happened.assign(machines_.size(), 0);
    crew.run(machines_.size(), [&](std::size_t i) { happened[i] = machines_[i]->run_alone(); });
    bool any = std::find(happened.begin(), happened.end(), 1) != happened.end();

    std::vector<std::size_t> order(machines_.size());
    std::iota(order.begin(), order.end(), 0);
    for (std::size_t i = order.size(); i > 1; --i) {
      std::swap(order[i - 1], order[random_.below(i)]);
    }
    for (const std::size_t i : order) {
      any = machines_[i]->meet_others() || any;
      if (const auto& report = machines_[i]->report()) return report;
    }
    std::erase_if(machines_, [](const auto& machine) {
      return machine->warps_done() && machine->copies_done();
    });
    if (!any && !machines_.empty()) return deadlock();
  }
}

void Grid::start_clusters() {
  const std::int64_t at_once = std::max(1, launch_.resident_blocks / launch_.cluster_size);
  std::int64_t resident = std::count_if(machines_.begin(), machines_.end(),
                                        [](const auto& machine) { return !machine->warps_done(); });
  for (; resident < at_once && next_cluster_ < clusters_; ++resident) {
    machines_.push_back(std::make_unique<Machine>(*this, next_cluster_++));
  }
}

std::shared_ptr<const OtherClusters> Grid::known_turns(const int* counter) const {
  const auto known = turns_.find(counter);
  return known == turns_.end() ? nullptr : known->second;
}

Report Grid::deadlock() const {
  constexpr int kMaxLines = 40;
  std::string message = "nobody can go on.";
  int left = kMaxLines;
  const Warp* first = nullptr;
  for (const auto& machine : machines_) {
    if (first == nullptr) first = machine->first_waiting();
    left = machine->describe_waits(message, left);
  }
  if (left < 0) message += "\n  and " + std::to_string(-left) + " more warps";
  return {FaultKind::kDeadlock, launch_.kernel, text(first->waits_at),
          first->name(),        message,        launch_.seed};
}

std::optional<Report> run(const Launch& launch, Memory& memory) {
  return Grid(launch, memory).run();
}

}  // namespace tk::interpreter
