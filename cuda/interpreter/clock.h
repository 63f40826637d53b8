// What is known to have happened: one count for everyone who does things.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace tk::interpreter {

// Lamport's partial order, by vectors of counts (Mattern 1989; for races, Flanagan and Freund's
// FastTrack, 2009). Counts that were never raised are 0.
class VectorClock {
 public:
  std::uint32_t operator[](std::uint32_t who) const {
    return who < counts_.size() ? counts_[who] : 0;
  }
  void raise(std::uint32_t who, std::uint32_t count) {
    if (who >= counts_.size()) counts_.resize(who + 1, 0);
    counts_[who] = std::max(counts_[who], count);
  }
  void join(const VectorClock& other) {
    if (other.counts_.size() > counts_.size()) counts_.resize(other.counts_.size(), 0);
    for (std::size_t i = 0; i < other.counts_.size(); ++i) {
      counts_[i] = std::max(counts_[i], other.counts_[i]);
    }
  }
  void clear() { counts_.clear(); }

 private:
  std::vector<std::uint32_t> counts_;
};

}  // namespace tk::interpreter
