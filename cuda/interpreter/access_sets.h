// Accesses by number, and the sets of them that places in memory refer to. Number 0 is none.
#pragma once

#include <cstdint>
#include <vector>

namespace tk::interpreter {

template <typename Access>
class AccessSets {
 public:
  std::uint32_t add(const Access& access) {
    accesses_.push_back(access);
    return static_cast<std::uint32_t>(accesses_.size() - 1);
  }
  const Access& access(std::uint32_t number) const { return accesses_[number]; }
  const std::vector<std::uint32_t>& set(std::uint32_t number) const { return sets_[number]; }

  // The set with one more access, which stands for earlier ones of the same agent.
  std::uint32_t with(std::uint32_t set, std::uint32_t access) {
    std::vector<std::uint32_t> members;
    for (const std::uint32_t member : sets_[set]) {
      if (!accesses_[member].same_agent(accesses_[access])) members.push_back(member);
    }
    members.push_back(access);
    sets_.push_back(std::move(members));
    return static_cast<std::uint32_t>(sets_.size() - 1);
  }

 private:
  std::vector<Access> accesses_ = {Access{}};
  std::vector<std::vector<std::uint32_t>> sets_ = {{}};
};

}  // namespace tk::interpreter
