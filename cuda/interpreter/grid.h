// A launch: clusters that run side by side on the machine's cores, in rounds.
//
// In a round every resident cluster goes on by itself, on whatever thread: it sees global memory as
// it was when the round began. Whatever it writes there, and its account of what it read, waits for
// the end of the round, when clusters come one after another in an order that the seed gives. So a
// seed stands for one history, however many cores there are, and threads share nothing that
// changes.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "interpreter/crew.h"
#include "interpreter/machine.h"

namespace tk::interpreter {

class Grid {
 public:
  Grid(const Launch& launch, Memory& memory);

  std::optional<Report> run();

  const Launch& launch() const { return launch_; }
  Memory& memory() { return memory_; }
  // What is known to whoever takes a turn on a counter; changed between rounds alone.
  std::shared_ptr<const OtherClusters>& turns(const int* counter) { return turns_[counter]; }
  std::shared_ptr<const OtherClusters> known_turns(const int* counter) const;

 private:
  void start_clusters();
  bool round();
  Report deadlock() const;

  const Launch launch_;
  Memory& memory_;
  Random random_;
  std::int64_t next_cluster_ = 0, clusters_;
  std::vector<std::unique_ptr<Machine>> machines_;  // resident, and those whose copies still leave
  std::map<const int*, std::shared_ptr<const OtherClusters>> turns_;
  std::optional<Report> report_;
};

}  // namespace tk::interpreter
