// What is known to have happened: one count for everyone who does things.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace tk::interpreter {

// What is known of other clusters: learnt from turns alone, so mostly nothing. Each cluster's
// counts are shared by all who know as much.
using Counts = std::vector<std::uint32_t>;
using OtherClusters = std::map<std::int64_t, std::shared_ptr<const Counts>>;

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
    join(other.counts_);
    others_ = merged(others_, other.others_);
  }
  void join(const Counts& other) {
    if (other.size() > counts_.size()) counts_.resize(other.size(), 0);
    for (std::size_t i = 0; i < other.size(); ++i) counts_[i] = std::max(counts_[i], other[i]);
  }
  void clear() {
    counts_.clear();
    others_.reset();
  }

  const Counts& counts() const { return counts_; }
  const std::shared_ptr<const OtherClusters>& others() const { return others_; }
  void learn(const std::shared_ptr<const OtherClusters>& others) {
    others_ = merged(others_, others);
  }
  // What is known of an agent of another cluster.
  std::uint32_t of_cluster(std::int64_t cluster, std::uint32_t who) const {
    if (!others_) return 0;
    const auto known = others_->find(cluster);
    return known == others_->end() || who >= known->second->size() ? 0 : (*known->second)[who];
  }

 private:
  static std::shared_ptr<const OtherClusters> merged(const std::shared_ptr<const OtherClusters>& a,
                                                     const std::shared_ptr<const OtherClusters>& b);

  Counts counts_;
  std::shared_ptr<const OtherClusters> others_;
};

}  // namespace tk::interpreter
